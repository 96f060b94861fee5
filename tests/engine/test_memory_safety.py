"""Fault M1: compiled code checks no index, so whatever it indexes by is checked before."""

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
from glassllama.generation import GenerationSettings, generate
from glassllama.native.engine.attention import SPAN
from glassllama.native.engine.executor import Engine, Weights
from glassllama.native.engine.workspace import FIRST_SPANS
from handmade_engines import SMALL, handmade, weights
from long_mode import LONG

IDS = [int(i) for i in np.random.default_rng(5).integers(0, SMALL.vocab_size, 2100)]


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


@pytest.mark.parametrize("length", [2049, 8449, 10**9])
def test_no_cache_is_longer_than_the_context(executor: Any, length: int) -> None:
    with pytest.raises(GenerationError, match=f"{length} tokens.*context of 2048.*shorten"):
        executor.new_cache(1, length)


@pytest.mark.parametrize(
    ("batch", "length"), [(0, 5), (-1, 5), (1, 0), (1, -3), (1.5, 5), (1, "9")]
)
def test_no_cache_has_no_rows_or_no_room(executor: Any, batch: Any, length: Any) -> None:
    with pytest.raises(GenerationError, match="must be a whole number from 1"):
        executor.new_cache(batch, length)


def test_ids_beyond_the_caches_room_are_refused(executor: Any) -> None:
    cache = executor.new_cache(1, 2048)
    with pytest.raises(GenerationError, match=r"2049 tokens.*holds 2048"):
        executor.next_logits([IDS[:2049]], cache)
    with pytest.raises(GenerationError, match=r"2049 tokens.*holds 2048"):
        executor.all_logits(IDS[:2049], cache)
    assert cache.lengths == [0]
    cache = executor.new_cache(1, 3)
    executor.all_logits(IDS[:3], cache)
    with pytest.raises(GenerationError, match=r"4 tokens.*holds 3"):
        executor.next_logits([[1]], cache)


def test_rows_and_ids_that_are_none(executor: Any) -> None:
    """Rows without ids are left alone; too few or too many rows are refused."""
    cache = executor.new_cache(2, 8)
    assert executor.next_logits([[], []], cache).shape == (2, SMALL.vocab_size)
    assert executor.all_logits([], executor.new_cache(1, 8)).shape == (0, SMALL.vocab_size)
    for rows in ([], [[1]], [[1], [2], [3]]):
        with pytest.raises(GenerationError, match=f"{len(rows)} rows of ids for a cache of 2"):
            executor.next_logits(rows, cache)
    assert cache.lengths == [0, 0]


def test_a_cache_of_another_model_is_refused(engine: Engine) -> None:
    other = handmade(replace(SMALL, n_layers=1))
    torch = torch_executor()
    for executor, cache in (
        (engine, other.new_cache(1, 8)), (engine, torch.new_cache(1, 8)),
        (torch, engine.new_cache(1, 8)),
    ):  # fmt: skip
        with pytest.raises(GenerationError, match="cache of another executor"):
            executor.next_logits([[1]], cache)
        with pytest.raises(GenerationError, match="cache of another executor"):
            executor.all_logits([1], cache)


@pytest.mark.parametrize("id", [1.5, "3", None, 2.0])
def test_ids_are_whole_numbers(engine: Engine, id: Any) -> None:
    with pytest.raises(GenerationError, match="whole numbers"):
        engine.next_logits([[id]], engine.new_cache(1, 8))


def test_ids_of_numpy_are_ids(engine: Engine) -> None:
    array = np.array(IDS[:9], np.uint32)
    fed = engine.next_logits([array], engine.new_cache(1, 9))
    assert (fed == engine.next_logits([IDS[:9]], engine.new_cache(1, 9))).all()


def test_generation_is_refused_beyond_the_context(executor: Any) -> None:
    for count in (2048, 2049):
        with pytest.raises(GenerationError, match=f"{count} ids and the context holds 2048"):
            generate(executor, [IDS[:count]], GenerationSettings())
    with pytest.raises(GenerationError, match="context 2049 is more than the model's 2048"):
        generate(executor, [[1]], GenerationSettings(context=2049))


@pytest.mark.parametrize("length", [SPAN - 1, SPAN, SPAN + 1, FIRST_SPANS * SPAN + 1, 2048])
def test_spans_find_room_as_the_row_grows(engine: Engine, length: int) -> None:
    """A single token looks at all spans: as the same token among others, to the bit."""
    cache = engine.new_cache(1, length)
    engine.next_logits([IDS[: length - 1]], cache)
    alone = engine.next_logits([IDS[length - 1 : length]], cache)[0]
    assert (alone == engine.all_logits(IDS[:length], engine.new_cache(1, length))[-1]).all()


def test_a_long_context_takes_no_memory_before_it_is_used() -> None:
    packed = weights(SMALL)
    Engine(SMALL, packed)  # compiled before memory is counted
    peaks = []
    for context in (2048, 2**31 - 1):
        tracemalloc.start()
        try:
            engine = Engine(replace(SMALL, max_seq_len=context), packed)
            engine.next_logits([[1, 2, 3]], engine.new_cache(1, context))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1_000_000


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 128}, {"ffn_dim": 192}, {"n_layers": 3}, {"n_heads": 8}, {"vocab_size": 204}],
)
def test_weights_of_another_shape_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(WeightsError, match="packed matrices"):
        Engine(replace(SMALL, **wrong), weights(SMALL))


def test_one_matrix_of_another_shape_is_refused() -> None:
    """Of the second layer: tables are sized by the first."""
    good, wide = weights(SMALL), weights(replace(SMALL, ffn_dim=192))
    matrices = [*good.matrices[:7], *wide.matrices[7:14], good.matrices[-1]]
    with pytest.raises(WeightsError, match="192"):
        Engine(SMALL, Weights(matrices, good.embeddings, good.norms))


@pytest.mark.skipif(sys.platform != "linux", reason="walls of memory are made as Linux makes them")
def test_nothing_is_touched_beyond_a_table() -> None:
    """All tables, weights, pages and logits end at memory that nobody may touch."""
    calls = "5000" if LONG else "48"
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("walls.py"), calls],
        capture_output=True, text=True, timeout=3600 if LONG else 300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (child.returncode, child.stdout) == (0, f"{calls} calls\n"), child.stderr[-2000:]
