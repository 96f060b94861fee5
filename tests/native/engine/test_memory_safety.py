"""Compiled code does not check indexes, so all indexes are checked before it is called."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassllama.base.errors import GenerationError, WeightsError
from glassllama.base.interfaces import NewTokens
from glassllama.base.layer_plan import llama_plan
from glassllama.generation import GenerationSettings, generate
from glassllama.native.engine.attention import SPAN
from glassllama.native.engine.executor import Engine, Weights
from glassllama.native.engine.workspace import FIRST_SPANS
from handmade_engines import SMALL, handmade, weights
from long_mode import LONG
from rows import Rows

IDS = [int(i) for i in np.random.default_rng(5).integers(0, SMALL.vocab_size, 2100)]
# Two float32 computations of the same logits: 2 layers of about 10 successive products of up to 160
ROUNDINGS = 160 * 2 * 10 * np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def engine() -> Engine:
    return handmade()


def torch_executor() -> Any:

    from glassllama.models.llama import Llama
    from glassllama.weights.load import TorchExecutor

    return TorchExecutor(Llama(SMALL).requires_grad_(False).eval())


@pytest.fixture(scope="module", params=["engine", "torch"])
def executor(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("engine") if request.param == "engine" else torch_executor()


def test_ids_beyond_the_context_are_refused(executor: Any) -> None:
    cache = Rows(executor)
    full = r"context full: 2049 tokens.*context of 2048; shorten"
    with pytest.raises(GenerationError, match=full):
        cache.next_logits([IDS[:2049]])
    with pytest.raises(GenerationError, match=full):
        cache.all_logits(IDS[:2049])
    assert cache.lengths == [0]
    cache.all_logits(IDS[:2047])
    cache.next_logits([[1]])
    with pytest.raises(GenerationError, match=full):
        cache.next_logits([[1]])
    assert cache.lengths == [2048]


def test_invalid_batches_are_refused(executor: Any) -> None:
    """A sequence without new ids, one that occurs twice, and one that is not in the cache."""
    cache = Rows(executor, 2)
    sequence, other = cache.sequences
    assert executor.forward([], cache.cache).shape == (0, SMALL.vocab_size)
    for batch, message in (
        ([NewTokens(sequence, [])], "empty"),
        ([NewTokens(sequence, [1]), NewTokens(sequence, [2])], "twice in one batch"),
        ([NewTokens(other, [1]), NewTokens(99, [2])], "no sequence 99"),
    ):
        with pytest.raises(GenerationError, match=message):
            executor.forward(batch, cache.cache)
    assert cache.lengths == [0, 0]


def test_sequences_are_added_and_removed_in_any_order(executor: Any) -> None:
    """Logits equal those of a sequence alone, after any sequences were added, forked and
    removed."""
    cache = executor.new_cache()
    first, second = cache.add(), cache.add()
    executor.forward([NewTokens(first, IDS[:70]), NewTokens(second, IDS[70:150])], cache)
    fork = cache.fork(first)
    cache.remove(second)
    with pytest.raises(GenerationError, match=f"no sequence {second}"):
        cache.length(second)
    third = cache.add()
    assert (cache.length(fork), cache.length(third)) == (70, 0)
    new = {first: IDS[200:203], fork: IDS[300:301], third: IDS[:90]}
    logits = executor.forward([NewTokens(*item) for item in new.items()], cache)
    texts = [IDS[:70] + IDS[200:203], IDS[:70] + IDS[300:301], IDS[:90]]
    for text, row in zip(texts, logits, strict=True):
        alone = executor.forward([NewTokens((c := executor.new_cache()).add(), text)], c)
        difference = np.abs(row - alone[0]).max()
        slack = 0 if executor.capabilities.batch_invariant else ROUNDINGS * np.abs(alone).max()
        assert difference <= slack
    cache.rewind(fork, 3)
    assert cache.length(first) == 73
    with pytest.raises(GenerationError, match="has 3 tokens"):
        cache.rewind(fork, 4)


def test_a_cache_of_another_model_is_refused(engine: Engine) -> None:
    other, torch = handmade(replace(SMALL, n_layers=1)), torch_executor()
    for executor, foreign in ((engine, other), (engine, torch), (torch, engine)):
        cache = foreign.new_cache()
        with pytest.raises(GenerationError, match="cache of another executor"):
            executor.forward([NewTokens(cache.add(), [1])], cache)


def test_a_closed_engine_is_an_error() -> None:
    engine = handmade()
    cache = Rows(engine)
    cache.next_logits([[1]])
    engine.close()
    engine.close()
    with pytest.raises(GenerationError, match="closed"):
        cache.next_logits([[2]])


@pytest.mark.parametrize("id", [1.5, "3", None, 2.0])
def test_ids_must_be_integers(engine: Engine, id: Any) -> None:
    with pytest.raises(GenerationError, match="whole number"):
        Rows(engine).next_logits([[id]])


def test_ids_may_be_numpy_integers(engine: Engine) -> None:
    array = np.array(IDS[:9], np.uint32)
    fed = Rows(engine).next_logits([array])
    assert (fed == Rows(engine).next_logits([IDS[:9]])).all()


def test_generation_is_refused_beyond_the_context(executor: Any) -> None:
    for count in (2048, 2049):
        with pytest.raises(GenerationError, match=f"{count} ids and the context holds 2048"):
            generate(executor, [IDS[:count]], GenerationSettings())
    with pytest.raises(GenerationError, match="context 2049 is more than the model's 2048"):
        generate(executor, [[1]], GenerationSettings(context=2049))


@pytest.mark.parametrize("length", [SPAN - 1, SPAN, SPAN + 1, FIRST_SPANS * SPAN + 1, 2048])
def test_scratch_for_spans_grows_with_the_row(engine: Engine, length: int) -> None:
    """A single token attends to all spans; its result is bit-identical to that among other
    tokens."""
    cache = Rows(engine)
    cache.next_logits([IDS[: length - 1]])
    alone = cache.next_logits([IDS[length - 1 : length]])[0]
    assert (alone == Rows(engine).all_logits(IDS[:length])[-1]).all()


def test_a_long_context_takes_no_memory_before_it_is_used() -> None:
    packed = weights(SMALL)
    Engine(SMALL, packed, plan=llama_plan(SMALL))  # compile before memory is measured
    peaks = []
    for context in (2048, 2**31 - 1):
        tracemalloc.start()
        try:
            config = replace(SMALL, max_seq_len=context)
            engine = Engine(config, packed, plan=llama_plan(config))
            Rows(engine).next_logits([[1, 2, 3]])
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1_000_000


@pytest.mark.parametrize(
    "wrong", [{"dim": 128}, {"ffn_dim": 192}, {"n_layers": 3}, {"n_heads": 8}, {"vocab_size": 204}]
)
def test_weights_of_another_shape_are_refused(wrong: dict[str, int]) -> None:
    config = replace(SMALL, **wrong)
    with pytest.raises(WeightsError, match="packed matrices"):
        Engine(config, weights(SMALL), plan=llama_plan(config))


def test_one_matrix_of_another_shape_is_refused() -> None:
    """In the second layer; the buffers are sized by the first."""
    good, wide = weights(SMALL), weights(replace(SMALL, ffn_dim=192))
    matrices = [*good.matrices[:7], *wide.matrices[7:14], good.matrices[-1]]
    with pytest.raises(WeightsError, match="192"):
        Engine(SMALL, Weights(matrices, good.embeddings, good.vectors), plan=llama_plan(SMALL))


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are implemented for Linux only")
def test_no_access_beyond_a_buffer() -> None:
    """All buffers, weights, pages and logits end at guard pages."""
    calls = "5000" if LONG else "48"
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("guard_pages.py"), calls],
        capture_output=True, text=True, timeout=3600 if LONG else 300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert (child.returncode, child.stdout) == (0, f"{calls} calls\n"), child.stderr[-2000:]
