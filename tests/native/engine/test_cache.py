"""Sequences with the same beginning share pages: bit-identical results, less memory, less work."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import CACHE_NUMBER
from glassllama.native.engine.executor import Engine
from glassllama.native.engine.kv_cache import bytes_per_token
from glassllama.native.engine.layout import ITEM_BYTES, PAGE, KVType
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.pack import pack
from rows import Rows
from tiny_models import META_SHAPE, hf_model, write_gguf

SHAPE = {
    **META_SHAPE, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 40, "intermediate_size": 160, "vocab_size": 203,
}  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 203, 700)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("q8") / "tiny.gguf"
    return open_checkpoint(write_gguf(hf_model(**SHAPE), path, gguf.GGMLQuantizationType.Q8_0))


@pytest.fixture(scope="module", params=["int16", "int8"])
def engine(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> Engine:
    return pack(checkpoint, cache=request.param)


KNOWN: dict[tuple[int, tuple[int, ...]], Any] = {}


def alone(engine: Engine, ids: list[int]) -> Any:
    """Logits after the last of these ids, from an engine with an empty cache."""
    text = (engine.cache_kind, tuple(ids))
    if text not in KNOWN:
        gc.collect()
        assert not engine._pages.root.children, "memory of another test is still allocated"
        KNOWN[text] = Rows(engine).next_logits([ids])[0]
    return KNOWN[text]


SAME = IDS[:300]
BATCHES = {
    "one system prompt": [SAME + IDS[300 + 20 * n : 310 + 27 * n] for n in range(4)],
    "one prompt": [SAME] * 5,
    "whole pages": [SAME[: 2 * PAGE]] * 3,
    "one is the beginning of another": [SAME, SAME[:100], SAME[:65], SAME[:64], SAME[:1]],
    "a fork in a fork": [SAME, SAME[:200] + IDS[400:500], SAME[:200] + IDS[400:450] + IDS[:9]],
    "little in common": [IDS[:20] + IDS[100:200], IDS[:20] + IDS[300:400], [], IDS[:21]],
    "nothing in common": [IDS[:80], IDS[80:160], IDS[160:400]],
}


@pytest.mark.parametrize("name", BATCHES)
def test_results_are_bit_identical_with_and_without_sharing(engine: Engine, name: str) -> None:
    rows = BATCHES[name]
    cache = Rows(engine, len(rows))
    first = cache.next_logits(rows)
    assert cache.lengths == [len(row) for row in rows]
    new = [[n + 1] for n in range(len(rows))]
    second = cache.next_logits(new)
    del cache
    for row, ids in enumerate(rows):
        if ids:
            assert (first[row] == alone(engine, ids)).all()
        assert (second[row] == alone(engine, ids + new[row])).all()


def test_equal_beginnings_are_computed_and_stored_once(engine: Engine) -> None:
    cache = Rows(engine, 5)
    cache.next_logits([SAME] * 5)  # four whole pages and 44 tokens
    page = PAGE * bytes_per_token(engine.plan, engine.cache_kind)
    assert cache.reused == 4 * (len(SAME) - 1)
    assert cache.nbytes == (4 + 5) * page
    for row in range(1, 5):
        cache.truncate(row, 0)
    assert cache.nbytes == 5 * page
    cache.truncate(0, 64)
    assert cache.nbytes == page


@pytest.mark.parametrize("piece", [100, 128])
def test_prompts_in_chunks_are_shared_completely(engine: Engine, piece: int) -> None:
    """Each row computes the last id of a chunk itself; its page is then merged with equal ones."""
    cache, logits = Rows(engine, 3), None
    for start in range(0, 700, piece):
        logits = cache.next_logits([IDS[start : start + piece]] * 3)
    assert logits is not None
    page = PAGE * bytes_per_token(engine.plan, engine.cache_kind)
    assert cache.nbytes == (700 // PAGE + 3) * page
    assert cache.reused == 2 * (700 - -(-700 // piece))  # all but the last of each chunk
    del cache
    assert (logits == alone(engine, IDS)).all()


def test_memory_of_removed_sequences_is_freed(engine: Engine) -> None:
    cache, other = Rows(engine, 2), Rows(engine)
    cache.next_logits([SAME, SAME])
    other.next_logits([SAME])
    assert other.reused == len(SAME) - 1
    pages = [page.memory for page in engine._pages.root.children]
    assert len(pages) == 1
    del cache
    gc.collect()
    assert len(engine._pages.root.children) == 1, "the other cache still uses it"
    del other
    gc.collect()
    assert not engine._pages.root.children


def test_a_shared_page_is_copied_before_it_is_written(engine: Engine) -> None:
    cache = Rows(engine, 2)
    cache.next_logits([SAME, SAME])
    cache.truncate(1, 100)  # within a page that row 0 still uses
    changed = cache.next_logits([[7], IDS[500:520]])
    cache.truncate(0, 299)
    again = cache.next_logits([[8], []])
    del cache
    assert (changed[0] == alone(engine, [*SAME, 7])).all()
    assert (changed[1] == alone(engine, SAME[:100] + IDS[500:520])).all()
    assert (again[0] == alone(engine, [*SAME[:299], 8])).all()


def test_random_sequences_of_operations(engine: Engine) -> None:
    """Appending, truncating and forking in any order give the same results as from scratch."""
    chance = np.random.default_rng(11)
    for _ in range(2):
        cache, texts = Rows(engine, 3), [[], [], []]
        checks: list[tuple[list[int], Any]] = []
        for _ in range(8):
            news = []
            for row, text in enumerate(texts):
                keep = int(chance.integers(0, len(text) + 1)) if chance.random() < 0.4 else None
                if keep is not None:
                    cache.truncate(row, keep)
                    del text[keep:]
                source = texts[chance.integers(0, 3)] if chance.random() < 0.5 else IDS
                start, count = len(text), int(chance.integers(1, 130))
                news.append((source[start:] or IDS[start:])[:count])
            logits = cache.next_logits(news)
            for text, new, out in zip(texts, news, logits, strict=True):
                text += new
                checks.append(([*text], out))
            assert cache.lengths == [len(text) for text in texts]
        del cache
        for ids, out in checks[::4]:
            assert (out == alone(engine, ids)).all()


def test_all_logits_and_perplexity_do_not_use_the_prefix_cache(engine: Engine) -> None:
    first_row = Rows(engine)
    whole = first_row.all_logits(IDS[:150])
    cache = Rows(engine)
    assert (cache.all_logits(IDS[:150]) == whole).all()
    assert cache.reused == 0


def test_a_refused_call_does_not_change_the_cache(engine: Engine) -> None:
    cache = Rows(engine, 2)
    cache.next_logits([IDS[:90], IDS[:90]])
    longest = engine.config.max_seq_len
    for rows, words in (([[1], [1] * longest], "context full"), ([[1], [999]], "id 999")):
        with pytest.raises(GenerationError, match=words):
            cache.next_logits(rows)
        assert cache.lengths == [90, 90]


def test_bytes_per_token(engine: Engine) -> None:
    """Keys and values of two layers, as stored in a page."""
    config = engine.config
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    scales = 4 * numbers // config.head_dim
    assert bytes_per_token(engine.plan, KVType.FLOAT32) == 4 * numbers
    assert bytes_per_token(engine.plan, KVType.INT16) == 2 * numbers + scales
    assert bytes_per_token(engine.plan, KVType.INT8) == numbers + scales


def test_the_error_of_integer_caches(tmp_path: Path) -> None:
    """With float32 weights, so that nothing else is rounded: 127 steps, or 258 times as many."""
    path = write_gguf(hf_model(**SHAPE), tmp_path / "x.gguf", gguf.GGMLQuantizationType.F32)
    checkpoint = open_checkpoint(path)
    exact, int16, int8 = (
        Rows(e).all_logits(IDS[:200])
        for e in (pack(checkpoint, exact=True), pack(checkpoint), pack(checkpoint, cache="int8"))
    )
    errors = [np.sqrt(np.mean((ours - exact) ** 2)) / exact.std() for ours in (int16, int8)]
    assert 0 < 100 * errors[0] < errors[1] <= 0.05, errors


def test_the_next_turn_of_a_chat_computes_only_new_tokens(default_model: Path) -> None:
    from glassllama import load
    from glassllama.tokenizers.chat import Message

    llm = load(default_model)
    turns = [Message("user", "Name three colours. " * 20)]
    first = llm.chat(turns, max_tokens=12)
    assert first.timings.reused_tokens == 0
    turns += [Message("assistant", first.text), Message("user", "And three more.")]
    second = llm.chat(turns, max_tokens=12)
    assert second.timings.reused_tokens >= len(first.prompt_ids)
    fresh = load(default_model).chat(turns, max_tokens=12)
    assert fresh.timings.reused_tokens == 0
    assert fresh.ids == second.ids


def test_sizes_of_stored_numbers_are_those_of_the_memory_plan() -> None:
    """Compiled code has its own table, because the cache digest does not cover constants outside
    native/."""
    assert {KVType.INT16: CACHE_NUMBER["int16"], KVType.INT8: CACHE_NUMBER["int8"],
                          KVType.FLOAT32: 4} == ITEM_BYTES  # fmt: skip
