"""The object of `--json`: fields, numbers, documentation; and the command in a new process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len

from glassllama.walkthrough.export import CANDIDATES, SCHEMA, plain, to_json
from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake
from glassllama.walkthrough.tracing import trace
from glassllama.walkthrough.walkthrough import Walkthrough, open_walkthrough

PAGE = Path(__file__).parent.parent.parent / "docs" / "walkthrough.md"
TOP_LEVEL = [
    "schema", "model", "prompt", "layer", "head", "config", "tokens", "steps", "residual_norms",
    "attention", "logit_lens", "predictions", "probabilities", "angles", "windows",
    "layers", "mistakes",
]  # fmt: skip


@pytest.fixture(scope="module")
def walk(with_text: Path) -> Walkthrough:
    return open_walkthrough(with_text, "lambda forms 🙂", layer=1, head=2)


@pytest.fixture(scope="module")
def walked(walk: Walkthrough) -> dict[str, Any]:
    done = [compare_with_mistake(walk, MISTAKES["scale"])]
    return json.loads(json.dumps(to_json(walk, layers=[0, 1], mistakes=done)))  # type: ignore[no-any-return]


def unflat(array: dict[str, Any]) -> np.ndarray:
    return np.array(array["values"]).reshape(array["shape"])


def test_fields_and_shapes(walk: Walkthrough, walked: dict[str, Any]) -> None:
    t, n_layers = len(walk.ids), walk.config.n_layers
    assert list(walked) == TOP_LEVEL
    assert walked["schema"] == SCHEMA
    assert [token["id"] for token in walked["tokens"]] == list(walk.ids)
    assert b"".join(bytes(token["bytes"]) for token in walked["tokens"]).decode() == walk.prompt
    assert [step["number"] for step in walked["steps"]] == list(range(18))
    for step in walked["steps"]:
        assert set(step) == {
            "number", "name", "title", "question", "shapes", "sources", "text", "numbers",
            "picture", "checks", "what_if", "data",
        }  # fmt: skip
        assert all(cell_len(line) <= 80 for line in step["picture"])
        assert all(check["relative"] <= check["allowed"] for check in step["checks"])
        for shown in step["numbers"]:
            assert len(shown["first"]) == min(math.prod(shown["shape"]), 8)
    assert np.shape(walked["residual_norms"]) == (n_layers + 1, t)
    assert np.shape(walked["logit_lens"]["ids"]) == (n_layers + 1, t, 5)
    assert np.shape(walked["logit_lens"]["pieces"]) == (n_layers + 1, t, 5)
    assert np.shape(walked["predictions"]["probabilities"]) == (t, 5)
    assert walked["angles"]["shape"] == [t, walk.config.head_dim // 2]
    assert list(walked["layers"]) == ["0", "1"]


def test_tensors_equal_the_trace(walk: Walkthrough, walked: dict[str, Any]) -> None:
    recorded = trace(walk.model, walk.ids)
    for number, layer in walked["layers"].items():
        for name, array in layer.items():
            if name in ("input", "output"):
                continue
            expected = recorded[f"layers.{number}.{name}"][0].numpy()
            assert np.allclose(unflat(array), expected, rtol=1e-3, atol=1e-6), name
        assert np.allclose(unflat(layer["output"]), recorded[f"layers.{number}"][0], rtol=1e-3)
    assert np.allclose(unflat(walked["layers"]["1"]["input"]), recorded["layers.0"][0], rtol=1e-3)
    for number, heads in walked["attention"]["weights"].items():
        expected = recorded[f"layers.{number}.attention.weights"][0]
        for head, flat in enumerate(heads):
            lower = np.zeros(expected[head].shape)
            lower[np.tril_indices(len(lower))] = flat
            assert np.allclose(lower, expected[head], rtol=1e-3, atol=1e-6)
    assert len(walked["attention"]["weights"]) == walk.config.n_layers


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_at_any_temperature_follow_from_the_object(
    walk: Walkthrough, walked: dict[str, Any], temperature: float
) -> None:
    """From the listed logits and the sum of all others a page computes exact probabilities."""
    listed = walked["probabilities"]
    assert len(listed["ids"]) == min(CANDIDATES, walk.config.vocab_size)
    assert listed["others"]["count"] == walk.config.vocab_size - len(listed["ids"])
    rest = listed["others"]["log_sums"][listed["others"]["temperatures"].index(temperature)]
    powers = np.exp(np.array(listed["logits"]) / temperature)
    probs = powers / (powers.sum() + math.exp(rest))
    expected = (walk.logits[0, -1] / temperature).softmax(-1)[listed["ids"]]
    assert np.allclose(probs, expected, atol=1e-4)


def test_one_step_only(walk: Walkthrough) -> None:
    assert [step["number"] for step in to_json(walk, steps=[9])["steps"]] == [9]


def test_mistakes_are_included(walk: Walkthrough, walked: dict[str, Any]) -> None:
    [done] = walked["mistakes"]
    assert done["name"] == "scale"
    assert done["wrong"]["weights"]["shape"] == [len(walk.ids)] * 2
    assert done["correct"]["predictions"]["ids"][-1][0] == int(walk.logits[0, -1].argmax())
    assert len(done["divergence_bits"]) == len(walk.ids)


def test_numbers_have_four_significant_digits() -> None:
    values = {"a": torch.tensor([[1 / 3, 12345.678]]), "b": (1, "x", None, 2e-9 / 3)}
    assert plain(values) == {"a": [[0.3333, 12350.0]], "b": [1, "x", None, 6.667e-10]}


def test_the_documentation_names_every_field(walked: dict[str, Any]) -> None:
    page = PAGE.read_text()
    fields = {*walked, *walked["tokens"][0], *walked["steps"][0], *walked["probabilities"]}
    fields |= {*walked["mistakes"][0], *walked["attention"], *walked["layers"]["0"]}
    assert [field for field in sorted(fields) if f"`{field}`" not in page] == []


def glassllama(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "90", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "glassllama", "walkthrough", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_in_a_new_process(with_text: Path) -> None:
    done = glassllama("lambda forms", "-m", with_text, "--layer", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    headings = [line for line in done.stdout.splitlines() if line.startswith("━━ ")]
    assert [heading.split()[1] for heading in headings] == [str(n) for n in range(18)]
    assert "✓ layers.1.attention.q_rope" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(cell_len, done.stdout.splitlines())) <= 90


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["", "--step", 1], 1, "error: the prompt is empty"),
        (["lambda", "--step", 18], 1, "error: --step 18 is out of range: there are 0 … 17"),
        (["lambda", "--layer", 3], 1, "error: --layer 3 is out of range: this model has 0 … 2"),
        (["lambda", "--text", "--json"], 2, "not together with --text"),
    ],
)
def test_invalid_input_at_the_command_line(
    arguments: list[object], code: int, line: str, with_text: Path, verb: Any
) -> None:
    done = verb("walkthrough", *arguments, "-m", with_text)
    assert done.code == code
    assert line in done.err
    assert done.out == ""


def test_the_command_prints_one_object(with_text: Path, verb: Any) -> None:
    done = verb("walkthrough", "lambda", "-m", with_text, "--json", "--step", 3, "--scale", "wrong")
    walked = json.loads(done.out)
    assert done.code == 0
    assert walked["mistakes"][0]["name"] == "scale"
    shown = verb("walkthrough", "-m", with_text, "--no-mask", "--rope-layout", "wrong", stdin="is")
    assert shown.out.count("━━ Mistake: ") == 2
