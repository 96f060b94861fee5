"""Settings, states and logs with invalid values: a clean error, or a correct result."""

from __future__ import annotations

import json
import os
import random
import time
import tomllib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glassllama.base.errors import GlassError
from glassllama.train.checkpoint import read_state
from glassllama.train.metrics import read_log
from glassllama.train.model import planned_parameters
from glassllama.train.settings import PRESETS, from_tables, load_settings, parse, preset_names
from glassllama.train.tokens import open_tokens
from train.recipes import make_steps, new_run, write_text

# "long mode": GLASSLLAMA_MUTANTS=20000 pytest tests/train/test_mutants.py
MUTANTS = int(os.environ.get("GLASSLLAMA_MUTANTS", "300"))
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**18, -(10**400), 10**400, 0.5, -0.0, 1e-320,
    1e300, float("nan"), float("inf"), "", "x", "10", "é\u2028\n" * 50, "a" * 70_000, [], [1], [[]],
    {}, {"a": 1}, [10**400], "\ud800",
]  # fmt: skip
SECONDS, BYTES = 1.0, 64_000_000


def mutants(values: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Copies with one to three fields, at any depth, replaced, removed, or renamed."""
    chance = random.Random(seed)
    for _ in range(MUTANTS):
        copy = json.loads(json.dumps(values))
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            place = copy
            while inner := [v for v in place.values() if isinstance(v, dict) and v]:
                if chance.random() < 0.2:
                    break
                place = chance.choice(inner)
            key = chance.choice(list(place))
            what = chance.random()
            if what < 0.08:
                del place[key]
            elif what < 0.16:
                place[key + "x" * chance.choice((1, 5000))] = place.pop(key)
            else:
                place[key] = chance.choice(ODD)
            if not copy or not place:
                break
        yield copy


def clean(check: Any) -> bool:
    """Whether it was refused with a short line, within limits on time and memory."""
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        check()
        refused = False
    except GlassError as error:
        refused = True
        line = str(error)
        assert "\n" not in line
        assert len(line) < 600, line[:200]
        line.encode()
    assert time.process_time() - start < SECONDS
    assert tracemalloc.get_traced_memory()[1] - before < BYTES
    return refused


@pytest.fixture
def traced() -> Iterator[None]:
    planned_parameters(
        load_settings("llama-shakespeare-bpe"), vocab_size=69
    )  # modules that PyTorch imports when they are first used
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["llama-shakespeare-bpe", "gpt-tinyshakespeare-cpu"])
def test_settings(name: str, traced: None) -> None:
    """Types, then the memory of a model with these sizes: nothing is allocated by claimed sizes."""
    tables = tomllib.loads((PRESETS / f"{name}.toml").read_text())
    tables["run"].setdefault("device", "cpu")

    def check(mutant: dict[str, Any]) -> None:
        planned_parameters(from_tables("mine.toml", mutant), vocab_size=69)

    refused = sum(clean(lambda m=m: check(m)) for m in mutants(tables, 1))  # type: ignore[misc]
    assert refused > MUTANTS / 2


@pytest.mark.parametrize(
    "text",
    ["a." * 20_000 + "b=1", "x=" + "[" * 30_000, "x=" + "{a=" * 9_000, "x=" + "9" * 60_000,
     "[model]\n" * 3, "x=2026-11-29", '"' + "k" * 60_000 + '"=1', "#" * 70_000, "\ud800"],
)  # fmt: skip
def test_files_of_settings(text: str, tmp_path: Path, traced: None) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert clean(lambda: load_settings(str(file)))


def test_preset_files_are_settings() -> None:
    for name in preset_names():
        assert parse(name, (PRESETS / f"{name}.toml").read_text())


@pytest.fixture
def checkpoint(tmp_path: Path, romeo_and_juliet: Path) -> Path:
    run = new_run(tmp_path / "run", write_text(tmp_path, romeo_and_juliet), "bigram")
    make_steps(run, stop_after=4)
    return run.checkpoints / "step-000004"


def test_states(checkpoint: Path, traced: None) -> None:
    path = checkpoint / "state.json"
    refused = 0
    for mutant in mutants(json.loads(path.read_text()), 2):
        path.write_text(json.dumps(mutant), encoding="utf-8")
        refused += clean(lambda: read_state(checkpoint))
    assert refused > MUTANTS / 6  # the identity is compared later


def test_logs_and_sidecars(checkpoint: Path, traced: None) -> None:
    folder = checkpoint.parent.parent
    log, sidecar = folder / "log.jsonl", folder / "data" / "train.json"
    record, about = json.loads(log.read_text().splitlines()[-1]), json.loads(sidecar.read_text())
    refused = [0, 0]
    for mutant in mutants(record, 3):
        log.write_text(json.dumps(mutant) + "\n", encoding="utf-8")
        refused[0] += clean(lambda: read_log(folder))
    for mutant in mutants(about, 4):
        sidecar.write_text(json.dumps(mutant), encoding="utf-8")
        refused[1] += clean(lambda: open_tokens(sidecar.with_suffix(".bin")))
    assert min(refused) > MUTANTS / 3


def damage(tensors: dict[str, torch.Tensor], name: str, how: str) -> None:
    tensor = tensors[name]
    changed = {
        "nan": torch.full_like(tensor, float("nan")),
        "inf": torch.full_like(tensor, float("inf")),
        "negative": -torch.ones_like(tensor),
        "float64": tensor.double(),
        "int": tensor.to(torch.int32),
        "shape": torch.zeros(*tensor.shape, 1),
        "one": torch.zeros(1),
    }
    tensors[name] = changed[how]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((f"weights.{'tok_embeddings.weight'}", how) for how in ("nan", "inf", "float64", "one")),
        ("adamw.exp_avg.tok_embeddings.weight", "int"),
        ("adamw.exp_avg_sq.tok_embeddings.weight", "negative"),
        ("adamw.exp_avg_sq.tok_embeddings.weight", "shape"),
        ("adamw.step.tok_embeddings.weight", "negative"),
        ("adamw.step.tok_embeddings.weight", "nan"),
    ],
)
def test_tensors_of_a_state(name: str, how: str, checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "training.safetensors"
    tensors = load_file(path)
    damage(tensors, name, how)
    save_file(tensors, path)
    with pytest.raises(GlassError, match=name.replace(".", r"\.")):
        new_run(tmp_path / "run", tmp_path / "text.txt", "bigram")
