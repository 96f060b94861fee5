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
from glassllama.native.engine.kv_cache import number_bytes
from glassllama.native.engine.layout import ITEM_BYTES, PAGE, KVType
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.pack import pack
from handmade_engines import SMALL, with_windows
from rows import Rows
from tiny_models import META_SHAPE, hf_model, write_gguf

SHAPE = {
    **META_SHAPE, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 40, "intermediate_size": 160, "vocab_size": 203,
}  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 203, 700)]
WINDOW = 100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("q8") / "tiny.gguf"
    return open_checkpoint(write_gguf(hf_model(**SHAPE), path, gguf.GGMLQuantizationType.Q8_0))


@pytest.fixture(scope="module")
def engines(checkpoint: Checkpoint) -> dict[str, Engine]:
    """Two without windows, and one whose first and last layers have windows."""
    return {
        "int16": pack(checkpoint, cache="int16"), "int8": pack(checkpoint, cache="int8"),
        "windows": with_windows(WINDOW),
    }  # fmt: skip


@pytest.fixture(params=["int16", "int8", "windows"])
def engine(engines: dict[str, Engine], request: pytest.FixtureRequest) -> Engine:
    return engines[request.param]


@pytest.fixture(params=["int16", "int8"])
def without_windows(engines: dict[str, Engine], request: pytest.FixtureRequest) -> Engine:
    return engines[request.param]


def page_bytes(engine: Engine) -> int:
    return PAGE * engine.plan.kv_bytes(*number_bytes(engine.cache_kind))


KNOWN: dict[tuple[int, tuple[int, ...]], Any] = {}


def alone(engine: Engine, ids: list[int]) -> Any:
    """Logits after the last of these ids, from an engine with an empty cache."""
    text = (id(engine), tuple(ids))
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


def test_equal_beginnings_are_computed_and_stored_once(without_windows: Engine) -> None:
    cache, page = Rows(without_windows, 5), page_bytes(without_windows)
    cache.next_logits([SAME] * 5)  # four whole pages and 44 tokens
    assert cache.reused == 4 * (len(SAME) - 1)
    assert cache.nbytes == (4 + 5) * page
    for row in range(1, 5):
        cache.truncate(row, 0)
    assert cache.nbytes == 5 * page
    cache.truncate(0, 64)
    assert cache.nbytes == page


@pytest.mark.parametrize("piece", [100, 128])
def test_prompts_in_chunks_are_shared_completely(without_windows: Engine, piece: int) -> None:
    """Each row computes the last id of a chunk itself; its page is then merged with equal ones."""
    engine, logits = without_windows, None
    cache = Rows(engine, 3)
    for start in range(0, 700, piece):
        logits = cache.next_logits([IDS[start : start + piece]] * 3)
    assert logits is not None
    assert cache.nbytes == (700 // PAGE + 3) * page_bytes(engine)
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


def test_bytes_of_a_text(engines: dict[str, Engine]) -> None:
    """Keys and values of all layers, as stored in a page; of a window only the last ones."""
    plan, sizes = engines["int16"].plan, {KVType.FLOAT32: 4, KVType.INT16: 2, KVType.INT8: 1}
    config = engines["int16"].config
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    scales = 4 * numbers // config.head_dim
    for kind, size in sizes.items():
        of_token = size * numbers + (scales if size < 4 else 0)
        assert plan.kv_bytes(*number_bytes(kind), 7) == 7 * of_token
    local, of_layer = engines["windows"].plan, 2 * SMALL.n_kv_heads * (2 * SMALL.head_dim + 4)
    assert local.kv_bytes(2, 4, WINDOW - 1) == 3 * (WINDOW - 1) * of_layer
    assert local.kv_bytes(2, 4, 1000) == (1000 + 2 * WINDOW) * of_layer


# --- windows --------------------------------------------------------------------------------------


def local_pages(rows: Rows) -> int:
    """Pages that have memory for the layers with a window."""
    cache: Any = rows.cache
    pages = {id(page): page for row in rows.sequences for page in cache.get(row)}
    return sum(page.local is not None for page in pages.values())


def local_pages_during_steps(engine: Engine, rows: Rows) -> list[int]:
    """Of a prompt in several chunks, after each of them."""
    step, used = engine._step, list[int]()

    def counted(*arguments: Any) -> None:
        step(*arguments)
        used.append(local_pages(rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_step", counted)
        rows.next_logits([IDS])
    return used


# The most pages that WINDOW tokens reach into, and one more for texts that are cut back a little.
KEPT = -(-(WINDOW - 1) // PAGE) + 1 + 1


def test_memory_that_no_window_reaches_is_freed(engines: dict[str, Engine]) -> None:
    """During a long prompt, too: only what one chunk of it needs is there at a time."""
    engine = engines["windows"]
    rows = Rows(engine)
    used = local_pages_during_steps(engine, rows)
    assert len(used) > 2
    assert max(used) <= KEPT + engine.capabilities.prefill_chunk // PAGE
    assert local_pages(rows) <= KEPT
    for n in range(3 * PAGE):
        logits = rows.next_logits([[n]])
        assert local_pages(rows) <= KEPT
    page, pages = page_bytes(engine), -(-(len(IDS) + 3 * PAGE) // PAGE)
    assert rows.nbytes <= page // 3 * (pages + 2 * KEPT)
    del rows
    assert (logits[0] == alone(engine, [*IDS, *range(3 * PAGE)])).all()


@pytest.mark.parametrize("back", [1, PAGE, 2 * PAGE, 200, 500, 650, 699])
def test_a_text_that_is_cut_back_is_computed_again_where_its_window_was_freed(
    engines: dict[str, Engine], back: int
) -> None:
    engine = engines["windows"]
    rows, before = Rows(engine, 2), len(IDS) - back
    rows.next_logits([IDS, []])
    rows.truncate(0, before)
    cache: Any = rows.cache
    assert cache.can_continue(cache.get(rows.sequences[0])) == (back <= PAGE)
    rows.sequences[1] = cache.fork(rows.sequences[0])
    logits = rows.next_logits([[7, 8], [9]])
    assert rows.lengths == [before + 2, before + 1]
    del rows, cache
    assert (logits[0] == alone(engine, [*IDS[:before], 7, 8])).all()
    assert (logits[1] == alone(engine, [*IDS[:before], 9])).all()


def test_a_beginning_whose_window_was_freed_is_not_shared(engines: dict[str, Engine]) -> None:
    """At the same time it is: the memory is kept until the other text of the batch has begun."""
    engine, texts = engines["windows"], [IDS, [*IDS[:333], 5, 6], [*IDS[:333], 7, 8]]
    rows = Rows(engine, 4)
    together = rows.next_logits([texts[0], texts[1], [], []])
    assert rows.reused == 333
    rows.truncate(1, 0)
    rows.next_logits([[1] * PAGE, [], [], []])  # memory is freed at the end of a page
    later = rows.next_logits([[], [], texts[2], []])
    assert rows.reused == 0
    again = rows.next_logits([[], [], [], texts[1]])
    assert rows.reused == 333, "now the third text has a window there"
    del rows
    for logits, text in zip([*together[:2], later[2], again[3]], [*texts[:2], texts[2], texts[1]],
                            strict=True):  # fmt: skip
        assert (logits == alone(engine, text)).all()


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
