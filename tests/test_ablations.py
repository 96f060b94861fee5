"""benchmarks/ablations.py: its variants equal models of the package, its page is up to date."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassllama.base.config import LlamaConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.llama import Llama
from tolerances import assert_logits

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
models = importlib.import_module("ablation_models")
ablations = importlib.import_module("ablations")
ablations_page = importlib.import_module("ablations_page")

SIZES = {"dim": 24, "n_layers": 3, "n_heads": 6, "vocab_size": 31}
CONTEXT = 16


def gpt(**changes: Any) -> GPT:
    return GPT(GPTConfig(**SIZES, ffn_dim=40, max_seq_len=CONTEXT, bias=False, **changes))


def llama(**changes: Any) -> Llama:
    fixed = {"head_dim": 4, "ffn_dim": 40, "max_seq_len": CONTEXT, "norm_eps": 1e-5}
    return Llama(LlamaConfig(**SIZES, **fixed, rope_theta=1e4, tie_embeddings=True, **changes))


PAIRS = {
    "GPT": (lambda: gpt(), 6),
    "+ SwiGLU": (lambda: llama(n_kv_heads=6), 6),
    "+ GQA": (lambda: llama(n_kv_heads=2), 2),
    "+ QK-norm": (lambda: llama(n_kv_heads=2, qk_norm=True), 2),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_variants_equal_models_of_the_package(name: str, packed: bool) -> None:
    make, kv_heads = PAIRS[name]
    model, random = make(), torch.Generator().manual_seed(5)
    with torch.no_grad():  # no weight is one or zero, so that an unused weight is detected
        for weight in model.parameters():
            weight.copy_(torch.rand(weight.shape, generator=random) - 0.3)
    sizes = models.Sizes(**SIZES, max_seq_len=CONTEXT, ffn_dim=40, n_kv_heads=kv_heads)
    variant = ablations.BY_NAME[name].model(sizes)
    variant.load_state_dict(model.state_dict())  # strict: the same names and shapes
    ids = torch.randint(SIZES["vocab_size"], (3, CONTEXT), generator=random)
    segments = torch.arange(CONTEXT)[None].ge(5).long().expand(3, -1) if packed else None
    found = variant.logits(variant.hidden(ids, segments=segments))
    expected = model(ids, segments=segments)
    assert expected.std() > 0.1
    assert_logits(found, expected, model.config)


def test_every_variant_differs_from_the_one_before() -> None:
    """Also the variants that equal no model of the package."""
    classes = dict.fromkeys(variant.model for variant in ablations.VARIANTS[1:])
    random, results = torch.Generator().manual_seed(5), []
    numbers = torch.rand(64, 64, generator=random) - 0.3
    for model in classes:
        variant = model(models.Sizes(**SIZES, max_seq_len=CONTEXT, ffn_dim=40, n_kv_heads=6))
        with torch.no_grad():  # the same numbers for all, whatever weights they have
            for weight in variant.parameters():
                source = numbers[0] if weight.ndim == 1 else numbers
                weight.copy_(source[tuple(map(slice, weight.shape))])
            results.append(variant.logits(variant.hidden(torch.arange(CONTEXT)[None])))
    assert len(results) == 5
    for one, other in pairwise(results):
        assert (one - other).abs().max() > 1e-3


def test_variants_have_similar_numbers_of_parameters() -> None:
    counts = {
        variant.name: sum(
            p.numel()
            for p in variant.model(
                models.Sizes(vocab_size=69, max_seq_len=64, **variant.sizes)
            ).parameters()
        )
        for variant in ablations.VARIANTS[1:]
    }
    assert max(counts.values()) / min(counts.values()) < 1.011  # the table of positions is 1 %


def test_only_missing_runs_are_run_and_runs_are_reproducible(
    tinyshakespeare: Path, tmp_path: Path
) -> None:
    """Existing results are not changed; missing ones are the same from any process."""
    lines = [
        ablations.measure(ablations.Task("bigram", seed, "characters", 3, str(tmp_path)))
        for seed in (1, 2)
    ]
    path = tmp_path / "lines.jsonl"
    given = ["--variants", "bigram", "--steps", "3", "--seeds", "2"]
    lines[0]["seconds"] = -1.0  # a marker, which a new run would overwrite
    path.write_text(json.dumps(lines[0]) + "\n")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "ablations.py"),
        *given,
        "--out",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 runs are done" in done.stderr
    found = ablations_page.read_lines(path)
    assert found[0] == lines[0]
    for varying in ("seconds", "cpu_seconds"):
        found[1].pop(varying), lines[1].pop(varying)
    assert found[1] == lines[1]


def test_results_with_other_settings_are_an_error(tinyshakespeare: Path, tmp_path: Path) -> None:
    other = ablations.Task("bigram", 1, "characters", 4, str(tmp_path)).identity()
    task = ablations.Task("bigram", 1, "characters", 3, str(tmp_path))
    with pytest.raises(SystemExit, match="steps was 4, is now 3; write new results"):
        ablations.missing([task], [other], tmp_path)


# --- the page -------------------------------------------------------------------------------


def test_every_variant_is_described_and_compared() -> None:
    assert list(ablations_page.PARTS) == [variant.name for variant in ablations.VARIANTS]
    assert {part.before for part in ablations_page.PARTS.values()} - {""} < set(ablations.BY_NAME)


def some_lines(losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "variant": variant, "seed": seed, "val_loss": loss, "bits_per_byte": loss,
            "kv_bytes": 8, "parameters": 9, "steps": 20, "batch": 2, "context": 3,
            "curve": [3.0, loss], "optimizer": {"lr": 0.1},
        }
        for variant, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]  # fmt: skip


def test_differences_are_computed_by_pairs_of_the_same_seed() -> None:
    """Seeds differ much more than variants; the difference is still significant."""
    pairs = {"GPT": [2.0, 3.0, 4.0], "+ RMSNorm": [1.9, 2.88, 3.89], "+ RoPE": [2.0, 2.6, 4.2]}
    found = ablations_page.by_variant(some_lines(pairs))
    gain = ablations_page.change(found, "+ RMSNorm")
    assert gain.mean == pytest.approx(-0.11)
    assert gain.within == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert str(gain) == "−0.110 ± 0.025"
    assert gain.verdict == "it helps here"
    assert ablations_page.change(found, "+ RoPE").verdict == "no difference that 3 seeds can show"
    assert ablations_page.change(found, "GPT") is None


def test_the_quantiles_of_students_t() -> None:
    """The density, integrated numerically: 97.5 % are below."""
    for n, quantile in enumerate(ablations_page.STUDENT, 1):
        x = np.linspace(0, quantile, 200_001)
        factor = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        density = factor * (1 + x**2 / n) ** (-(n + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-5)


def test_incomplete_results_are_marked(tmp_path: Path) -> None:
    whole = {name: [1.0, 1.1, 1.2] for name in ablations_page.PARTS}
    assert not ablations_page.unfinished(ablations_page.by_variant(some_lines(whole)))
    whole["+ Muon"].pop()
    part = ablations_page.unfinished(ablations_page.by_variant(some_lines(whole)))
    assert "26 of 27 runs are done" in part
    path = tmp_path / "ablations-characters.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in some_lines(whole)))
    assert part in ablations_page.page(tmp_path)


def test_the_page_is_up_to_date() -> None:
    assert ablations_page.PAGE.read_text() == ablations_page.page(), (
        "run benchmarks/ablations.py --render"
    )


def test_the_picture_is_small_and_reproducible(tmp_path: Path) -> None:
    found = ablations_page.by_variant(
        some_lines({name: [1.0, 1.1] for name in ablations_page.PARTS})
    )
    for name in ("one.svg", "two.svg"):
        ablations_page.draw(found, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert ablations_page.PICTURE.stat().st_size < 100_000
