"""The engine against transformers and against the reference model, on tiny random models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from glassllama.base.errors import GenerationError, GlassError
from glassllama.native.engine.executor import CHUNKS, Engine
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model
from glassllama.weights.pack import pack
from rows import Rows
from tiny_models import META_SHAPE, VARIANTS, hf_model, write_gguf, write_hf
from tolerances import (
    assert_logits,
    difference,
    eight_bit_error,
    eight_bit_tolerance,
    logits_tolerance,
    rms_difference,
)

WIDE = {
    **META_SHAPE, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 40, "intermediate_size": 160, "vocab_size": 203,
}  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 131, 290)]  # two chunks, five pages
assert len(IDS) > CHUNKS[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_hf(hf_model(), tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("q4") / "tiny.gguf"
    return open_checkpoint(write_gguf(hf_model(**WIDE), path, gguf.GGMLQuantizationType.Q4_1))


@pytest.fixture(scope="module")
def engine(quantized: Checkpoint) -> Engine:
    return pack(quantized)


def logits(engine: Any, ids: list[int]) -> Any:
    return Rows(engine).all_logits(ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path, parity: Any) -> None:
    model = hf_model(**VARIANTS[variant])
    with torch.no_grad():
        theirs = model(torch.tensor([IDS])).logits[0].numpy()
    checkpoint = open_checkpoint(write_hf(model, tmp_path))
    apart = difference(logits(pack(checkpoint, exact=True), IDS), theirs)
    bar = logits_tolerance(checkpoint.config)
    parity("logits, engine exact", "transformers, tiny random models", bar, apart)
    assert apart <= bar


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "F16", "BF16", "F32"])
def test_every_weight_type(kind: str, tmp_path: Path) -> None:
    """`exact` equals the reference; the default differs by the rounding of int8 inputs and int16
    keys."""
    path = write_gguf(
        hf_model(**WIDE), tmp_path / "x.gguf", getattr(gguf.GGMLQuantizationType, kind)
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.rope_layout == "interleaved"
    model = load_model(checkpoint, dtype=torch.float32)
    reference, eight_bit = (
        model(torch.tensor([IDS]))[0],
        eight_bit_error(model, torch.tensor([IDS])),
    )
    assert_logits(logits(pack(checkpoint, exact=True), IDS), reference, checkpoint.config)
    assert rms_difference(logits(pack(checkpoint), IDS), reference) <= 1.5 * eight_bit


def test_blocks_are_computed_in_the_format_that_is_stored(tmp_path: Path) -> None:
    path = write_gguf(hf_model(**WIDE), tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q5_1)
    how, *notes = pack(open_checkpoint(path)).describe()
    assert "Q5_1" in how
    assert not any("another format" in line for line in notes)


def test_qk_norm(tiny: Checkpoint) -> None:
    """RMSNorm without weights after RoPE, which transformers' Llama does not have."""
    checkpoint = replace(tiny, config=replace(tiny.config, qk_norm=True))
    ours = logits(pack(checkpoint, exact=True), IDS)
    reference = logits(TorchExecutor(load_model(checkpoint, dtype=torch.float32)), IDS)
    assert_logits(ours, reference, checkpoint.config)
    assert difference(ours, logits(pack(tiny, exact=True), IDS)) > 0.01


@pytest.mark.parametrize("pieces", [[290], [1] * 290, [7, 64, 1, 65, 153], [257, 33]])
def test_a_prompt_in_chunks_or_token_by_token_is_bit_identical(
    engine: Engine, pieces: list[int]
) -> None:
    cache, parts, past = Rows(engine), [], 0
    for count in pieces:
        parts.append(cache.all_logits(IDS[past : past + count]))
        past += count
    assert (np.concatenate(parts) == logits(engine, IDS)).all()


def test_a_row_is_bit_identical_alone_and_in_a_batch(engine: Engine) -> None:
    rows = [IDS[:3], IDS, [], IDS[40:41], IDS[9:99]]
    cache = Rows(engine, len(rows))
    first = cache.next_logits(rows)
    assert cache.lengths == [3, 290, 0, 1, 90]
    second = cache.next_logits([[1], [], [2, 3], [4], [5]])
    for row, (new, more) in enumerate(zip(rows, [[1], [], [2, 3], [4], [5]], strict=True)):
        alone = Rows(engine)
        if new:
            assert (alone.next_logits([new])[0] == first[row]).all()
        if more:
            assert (alone.next_logits([more])[0] == second[row]).all()


def test_the_number_of_threads_changes_nothing(quantized: Checkpoint, engine: Engine) -> None:
    assert (logits(pack(quantized, threads=1), IDS) == logits(engine, IDS)).all()


def test_concurrent_callers_are_independent(engine: Engine) -> None:
    texts = [IDS[n : n + 60] for n in range(0, 80, 10)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ids: logits(engine, ids), texts))
    for ids, result in zip(texts, together, strict=True):
        assert (result == logits(engine, ids)).all()


def test_truncate_removes_tokens(engine: Engine) -> None:
    cache = Rows(engine)
    cache.next_logits([IDS])
    cache.truncate(0, 70)
    assert cache.lengths == [70]
    assert (cache.next_logits([IDS[70:80]])[0] == logits(engine, IDS[:80])[-1]).all()
    with pytest.raises(GenerationError, match="cannot keep 99"):
        cache.truncate(0, 99)


@pytest.mark.parametrize("bad", [-1, 203, 2**40])
def test_ids_outside_the_vocabulary_are_refused(engine: Engine, bad: int) -> None:
    cache = Rows(engine)
    cache.next_logits([[1, 2]])
    with pytest.raises(GenerationError, match=rf"id {bad} at position 1 is outside"):
        cache.next_logits([[3, bad]])
    assert cache.lengths == [2]


def test_a_notice_about_more_threads_than_processors(quantized: Checkpoint) -> None:
    many = pack(quantized, threads=10_000)
    assert any("10000 threads asked for" in line for line in many.describe())
    assert many.threads < 10_000


def test_a_tier_can_be_forced(quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    best = logits(pack(quantized), IDS)
    monkeypatch.setenv("GLASSLLAMA_TIER", "plain")
    plain = logits(pack(quantized), IDS)
    assert rms_difference(plain, best) <= eight_bit_tolerance(quantized.config.n_layers)
    monkeypatch.setenv("GLASSLLAMA_TIER", "quantum")
    with pytest.raises(GlassError, match="GLASSLLAMA_TIER=quantum: this processor can run"):
        pack(quantized)


def test_nan_weights_give_nan_logits(tmp_path: Path) -> None:
    """The sampler must see it; a NaN must not become a number on the way."""
    model = hf_model(**WIDE)
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    path = write_gguf(model, tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q8_0)
    assert np.isnan(logits(pack(open_checkpoint(path)), IDS[:5])).any(-1).all()
