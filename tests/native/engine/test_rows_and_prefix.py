"""Rows of images instead of embeddings, and prefixes whose tokens all see each other.

The engine against the reference, and both against the mask written out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import NewTokens, row_ids
from glassllama.native.engine.executor import CHUNKS, Engine
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model
from glassllama.weights.pack import pack
from tiny_families import FAMILIES, write_family
from tolerances import difference, logits_tolerance

IDS = [n * 37 % 131 for n in range(50)]
PICTURE = np.random.default_rng(0).standard_normal((21, 48)).astype(np.float32)
OF_PICTURE = row_ids(PICTURE.tobytes(), len(PICTURE))
ROWS = dict(zip(OF_PICTURE, PICTURE, strict=True))
TEXT = [*IDS[:3], *OF_PICTURE, *IDS[3:20]]  # longer than the windows
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["llama yarn", "gemma", "gemma2", "mistral", "smollm3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Any:
    path: Path = tmp_path_factory.mktemp("model")
    return open_checkpoint(write_family(request.param, path, "hf"))


@pytest.fixture(scope="module")
def model(checkpoint: Any) -> Any:
    return load_model(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(checkpoint: Any) -> Engine:
    return pack(checkpoint, exact=True)


def embedded(model: Any, ids: list[int], rows: dict[int, np.ndarray]) -> torch.Tensor:
    """(1, T, C) as a reader of the paper would write it."""
    x = [torch.tensor(rows[i]) if i < 0 else model.embed(torch.tensor([i]))[0] for i in ids]
    return torch.stack(x)[None]


@torch.inference_mode()
def expected(model: Any, ids: list[int], prefix: int = 0) -> np.ndarray:
    """(T, V) logits without a cache: the mask of the whole text is written out."""
    x, count = embedded(model, ids, ROWS), len(ids)
    cache = model.new_cache(1, count)
    none = torch.zeros(1, count, dtype=torch.long)
    parts = [model.hidden(none[:, :prefix], cache, embeddings=x[:, :prefix], prefix=True)]
    if prefix < count:
        parts.append(model.hidden(none[:, prefix:], cache, embeddings=x[:, prefix:]))
    return model.logits(torch.cat(parts[prefix == 0 :], 1))[0].numpy()


def fed(executor: Any, *parts: NewTokens | tuple[list[int], bool], count: int = 1) -> np.ndarray:
    """(T, V) logits of a new sequence, fed part by part: ids, and whether they are a prefix."""
    cache = executor.new_cache()
    sequence = cache.add()
    return np.concatenate([
        executor.forward([NewTokens(sequence, ids, "all", ROWS, is_prefix)], cache)
        for ids, is_prefix in parts
    ])  # fmt: skip


def test_rows_instead_of_embeddings(checkpoint: Any, model: Any, engine: Engine) -> None:
    bar, logits = logits_tolerance(checkpoint.config), expected(model, TEXT)
    assert difference(fed(engine, (TEXT, False)), logits) <= bar
    assert difference(fed(TorchExecutor(model), (TEXT, False)), logits) <= bar
    in_parts = fed(engine, (TEXT[:7], False), (TEXT[7:8], False), (TEXT[8:], False))
    assert np.array_equal(in_parts, fed(engine, (TEXT, False)))


@torch.inference_mode()
def test_a_prefix_by_the_mask_written_out(model: Any) -> None:
    """The last layer's input at one position changes with any token of the prefix, and no later."""
    prefix, x = 9, embedded(model, IDS[:20], {}).clone()
    none = torch.zeros(1, 20, dtype=torch.long)

    def hidden(x: torch.Tensor) -> torch.Tensor:
        cache = model.new_cache(1, 20)
        first = model.hidden(none[:, :prefix], cache, embeddings=x[:, :prefix], prefix=True)
        second = model.hidden(none[:, prefix:], cache, embeddings=x[:, prefix:])
        return torch.cat([first, second], 1)[0]

    before = hidden(x)
    for changed in (0, 8, 9, 15):
        other = x.clone()
        other[0, changed] += 1
        differs = ((hidden(other) - before).abs().amax(1) > 1e-6).tolist()
        first = 0 if changed < prefix else changed
        assert differs[:first] == [False] * first
        assert differs[first:prefix] == [True] * (prefix - first)
        assert differs[changed]


@pytest.mark.parametrize("prefix", [1, 2, 24, 40, len(TEXT)])
def test_a_prefix(checkpoint: Any, model: Any, engine: Engine, prefix: int) -> None:
    bar, logits = logits_tolerance(checkpoint.config), expected(model, TEXT, prefix)
    rest = [(TEXT[prefix:], False)] if prefix < len(TEXT) else []
    assert difference(fed(engine, (TEXT[:prefix], True), *rest), logits) <= bar
    assert difference(fed(TorchExecutor(model), (TEXT[:prefix], True), *rest), logits) <= bar
    one_by_one = [([id], False) for id in TEXT[prefix:]]
    single = fed(engine, (TEXT[:prefix], True), *one_by_one)
    assert np.array_equal(single, fed(engine, (TEXT[:prefix], True), *rest))
    if prefix > 1:
        assert difference(expected(model, TEXT)[0], logits[0]) > bar  # it sees what follows


def test_prefixes_of_several_chunks(checkpoint: Any, model: Any, engine: Engine) -> None:
    """Every chunk sees all others; the numbers do not depend on where they are divided."""
    bar = logits_tolerance(checkpoint.config)
    for count in (CHUNKS[0], CHUNKS[0] + 1, 400):
        ids = (TEXT * 12)[:count]
        logits = expected(model, ids, count)
        assert difference(fed(engine, (ids, True)), logits) <= bar


def test_a_prefix_is_shared_as_a_whole(checkpoint: Any, engine: Engine) -> None:
    """A second text with the same prefix finds it; one with another end of the prefix does not."""
    long, cache = (TEXT * 4)[:150], engine.new_cache()
    one, other, third = (cache.add() for _ in range(3))
    first = engine.forward([NewTokens(one, long, rows=ROWS, prefix=True)], cache)
    again = engine.forward([NewTokens(other, long, rows=ROWS, prefix=True)], cache)
    freed = max(engine.plan.windows()) > 0  # of a window's pages, so all is computed again
    assert cache.reused(other) == (0 if freed else len(long) - 1)
    assert np.array_equal(first, again)
    longer = [*long, 5]
    apart = engine.forward([NewTokens(third, longer, rows=ROWS, prefix=True)], cache)
    assert cache.reused(third) == 0
    assert np.array_equal(apart[0], fed(engine, (longer, True))[-1])
    fork = cache.fork(one)
    steps = [engine.forward([NewTokens(n, [7])], cache) for n in (one, fork, other)]
    assert all(np.array_equal(step, steps[0]) for step in steps)


def test_rows_are_shared_by_content(engine: Engine) -> None:
    """Placeholders of two pictures have different ids, so nothing of the first is reused."""
    second = PICTURE[::-1].copy()
    theirs = row_ids(second.tobytes(), len(second))
    rows = ROWS | dict(zip(theirs, second, strict=True))
    cache = engine.new_cache()
    one, same, other = (cache.add() for _ in range(3))
    ids = [OF_PICTURE * 4, OF_PICTURE * 4, theirs * 4]
    logits = [
        engine.forward([NewTokens(n, some, rows=rows)], cache)
        for n, some in zip((one, same, other), ids, strict=True)
    ]
    assert np.array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[0], logits[2])
    assert [cache.reused(n) for n in (one, same, other)] == [0, 83, 0]


def test_a_batch_of_prefixes_and_texts(engine: Engine) -> None:
    texts = [(TEXT, True), (IDS, False), (TEXT[:30], True), (TEXT, False), (TEXT, True)]
    cache = engine.new_cache()
    batch = [NewTokens(cache.add(), ids, "last", ROWS, prefix) for ids, prefix in texts]
    together = engine.forward(batch, cache)
    for row, text in zip(together, texts, strict=True):
        assert np.array_equal(row, fed(engine, text)[-1])


def test_a_freed_window_is_computed_again(engine: Engine) -> None:
    """Also where the beginning is a prefix with rows."""
    cache = engine.new_cache()
    sequence, rest = cache.add(), (IDS * 10)[:300]
    engine.forward([NewTokens(sequence, TEXT, rows=ROWS, prefix=True)], cache)
    engine.forward([NewTokens(sequence, rest)], cache)
    cache.rewind(sequence, len(TEXT) + 10)
    again = engine.forward([NewTokens(sequence, [9])], cache)
    whole = fed(engine, (TEXT, True), ([*rest[:10], 9], False))
    assert np.array_equal(again[0], whole[-1])


def test_what_is_refused(model: Any, engine: Engine) -> None:
    for executor in (engine, TorchExecutor(model)):
        cache = executor.new_cache()
        sequence = cache.add()
        wrong: list[tuple[NewTokens, str]] = [
            (NewTokens(sequence, [-5]), "-5 at position 0 is outside the vocabulary"),
            (NewTokens(sequence, [-5], rows={-5: PICTURE[0, :7]}), r"row -5.*48 finite.*\(7,\)"),
            (NewTokens(sequence, [-5], rows={-5: PICTURE[0].astype(np.float64)}), "float64"),
            (NewTokens(sequence, [-5], rows={-5: PICTURE[0] * np.nan}), "row -5"),
            (NewTokens(sequence, [5], rows={5: PICTURE[0]}), "a negative id"),
        ]  # fmt: skip
        for tokens, words in wrong:
            with pytest.raises(GenerationError, match=words):
                executor.forward([tokens], cache)
        assert cache.length(sequence) == 0
        executor.forward([NewTokens(sequence, TEXT[:9], rows=ROWS, prefix=True)], cache)
        with pytest.raises(GenerationError, match="a prefix begins a sequence, this one has 9"):
            executor.forward([NewTokens(sequence, IDS, prefix=True)], cache)
    cache = engine.new_cache()
    sequence = cache.add()
    engine.forward([NewTokens(sequence, IDS, prefix=True)], cache)
    with pytest.raises(GenerationError, match="the first 50 tokens see each other"):
        cache.rewind(sequence, 49)
    cache.rewind(sequence, 0)
    engine.forward([NewTokens(sequence, IDS[:5], prefix=True)], cache)


def test_families_of_these_tests_have_what_matters() -> None:
    assert FAMILIES["mistral"]["sliding_window"] < len(TEXT)
    assert FAMILIES["gemma2"]["sliding_window"] < len(TEXT)
