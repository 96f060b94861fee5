"""Compiled encoding: pretokens equal those of the patterns, ids equal those of `encode`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_level_families import mixed_text
from glassllama.base.errors import TokenizerError
from glassllama.formats.gguf import open_gguf
from glassllama.native.jit.memory import PADDING, WINDOW, padded
from glassllama.native.tokenizers import COMPILED, corpus_encoder, pair_table
from glassllama.native.tokenizers.pretokenizer import RULES, character_classes, word_ends
from glassllama.tokenizers.bpe import MANY_IDS, BytePairTokenizer
from glassllama.tokenizers.pretokenizer import DIGIT_RUNS, GPT2, SPLITS, Split
from glassllama.tokenizers.tiktoken_file import read_meta_tokenizer
from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf
from long_mode import LONG, SEEDS
from processor_time import seconds

PRE = {"llama3": "llama-bpe", "gpt2": "gpt-2", "smollm": "smollm", "qwen2": "qwen2"}


@pytest.fixture(scope="module")
def meta(llama3_ranks: Path) -> BytePairTokenizer:
    return read_meta_tokenizer(llama3_ranks, COMPILED)


@pytest.fixture(scope="module", params=["meta", *PRE])
def tokenizer(
    request: pytest.FixtureRequest, meta: BytePairTokenizer, default_model: Path
) -> BytePairTokenizer:
    if request.param == "meta":
        return meta
    metadata = dict(open_gguf(default_model).metadata) | {"tokenizer.ggml.pre": PRE[request.param]}
    made = tokenizer_from_gguf(metadata)
    assert isinstance(made, BytePairTokenizer)
    return made


def compiled_words(text: str, split: Split) -> list[str]:
    data = padded(text)
    ends = np.empty(len(data) + WINDOW, np.int64)
    n = word_ends(data, len(data) - PADDING, RULES[split.patterns], character_classes(), ends)
    cuts = [0, *ends[:n].tolist()]
    return [bytes(data[a:b]).decode() for a, b in pairwise(cuts)]


def contexts(sample: int) -> Iterator[str]:
    """Every code point next to letters, digits, spaces, newlines, apostrophes and itself.

    Beyond U+0300 only one of `sample` code points.
    """
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    alike = (range(0x3400, 0xA000), range(0xAC00, 0xF900), range(0x12000, 0x110000))
    chance = random.Random(0)
    if not LONG:  # ideographs, private-use and unassigned code points: one of a hundred
        points = [
            c for c in points if not any(ord(c) in r for r in alike) or chance.random() < 0.01
        ]
    low = [c for c in points if ord(c) < 0x300]
    points = [*low, *points[len(low) :: sample]]
    for at in range(0, len(points), 256):
        yield "".join(
            f"a{c}b 1{c}2 {c}{c}\n{c} '{c}'l{c}'{c}e \r{c}\n  {c}" for c in points[at : at + 256]
        )


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.identical("words of the compiled splitter, every code point", "the regex")
def test_words_of_every_code_point(name: str) -> None:
    """The table of classes is the same for all splits: one of them tests every entry."""
    split = replace(SPLITS[name], normalize_nfc=False)
    texts = contexts(1 if LONG or name == "llama3" else 16)
    wrong = [text[:20] for text in texts if compiled_words(text, split) != split.pretokens(text)]
    assert wrong == []


@pytest.mark.parametrize("name", SPLITS)
def test_classes_and_short_texts(name: str) -> None:
    """The table has the UTF-8 widths; short and unusual texts are split as by the pattern."""
    classes, split = character_classes(), SPLITS[name]
    assert [len(chr(c).encode()) for c in (0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000)] == [
        classes[c] >> 3 for c in (0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000)
    ]
    for text in ("", "a", " ", "\n", "'", "'s", "é", "😀", "'ſ", "'Ll", "'LL", "1234", " \n "):
        plain = replace(split, normalize_nfc=False)
        assert compiled_words(text, plain) == plain.pretokens(text)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.identical("words of the compiled splitter, 100 seeds", "the regex")
def test_words_of_mixed_texts(name: str) -> None:
    split = replace(SPLITS[name], normalize_nfc=False)
    for seed in range(SEEDS):
        text = mixed_text(seed)
        assert compiled_words(text, split) == split.pretokens(text)


ODDS = ("a", "b", "x" * 9, " ", "  ", "\n", "\r", "\t", "'", "'s", "'ll", "'LL", ",", ".", "-", "1",
        "23", "\u2003", "\xa0", "é", "—", "ſ", "日", "²", "\x0b", "\x1c", "\0", "_",
        "яблоко", "Ω", "漢字", "क", "\u093f", "\u0301", "😀", "𝔘", "、", "\u3000", "٣",
        "’")  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_words_of_unusual_mixtures(name: str) -> None:
    """Character classes in all orders, at all positions of the windows of 64 bytes."""
    split = replace(SPLITS[name], normalize_nfc=False)
    chance = random.Random(11)
    for _ in range(10 * SEEDS):
        few = chance.sample(ODDS, chance.choice([3, 6, 12, len(ODDS)]))
        text = "".join(chance.choices(few, k=200))
        assert compiled_words(text, split) == split.pretokens(text)


@settings(deadline=None)
@given(st.text(alphabet="ab 1'slé\n\r\t-日\u2003", max_size=40), st.sampled_from(list(SPLITS)))
def test_words_of_short_texts(text: str, name: str) -> None:
    split = replace(SPLITS[name], normalize_nfc=False)
    assert compiled_words(text, split) == split.pretokens(text)


def test_ids_are_those_of_encode(tokenizer: BytePairTokenizer) -> None:
    for seed in range(SEEDS):
        text = mixed_text(seed)
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text)
    assert tokenizer.encode_array("").shape == (0,)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=80))
def test_ids_of_any_text(meta: BytePairTokenizer, text: str) -> None:
    assert meta.encode_array(text).tolist() == meta.encode(text)


def test_words_of_every_length(tokenizer: BytePairTokenizer) -> None:
    """The limits of the tables: 8 and 15 bytes in a slot, 62 bytes merged without a heap."""
    chance = random.Random(3)
    words = ["".join(chance.choices("etaoinshrdlé", k=n)) for n in range(1, 90) for _ in range(4)]
    text = " ".join([*words, *words[::-1], *words])
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_a_full_cache_is_cleared(default_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that are too small for a word grow; a long text gets its own buffer."""
    monkeypatch.setattr(
        corpus_encoder, "BATCH_WORDS", 2
    )  # and up to 64 that are found in one window
    monkeypatch.setattr(corpus_encoder, "WORD_SLOTS", 128)
    monkeypatch.setattr(corpus_encoder, "LONG_WORD_BYTES", 72 * 66)
    monkeypatch.setattr(corpus_encoder, "POOL_IDS", 64 * 66)
    monkeypatch.setattr(corpus_encoder, "BUFFER_IDS", 128)
    monkeypatch.setattr(corpus_encoder, "MAX_REUSED", 1500)
    monkeypatch.setattr(corpus_encoder, "COPY_CHUNK", 100)
    small = tokenizer_from_gguf(open_gguf(default_model).metadata)
    for seed in range(20):
        text = mixed_text(seed) + "x" * 1000
        assert small.encode_array(text).tolist() == small.encode(text)


def test_pairs_after_a_full_line(default_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_table, "MAX_LOAD", 1.0)
    crowded = tokenizer_from_gguf(open_gguf(default_model).metadata)
    assert isinstance(crowded, BytePairTokenizer)
    full = pair_table.of_vocabulary(crowded.vocabulary).slots[:, -1] != 0
    assert full.mean() > 0.05
    for seed in range(30):
        text = mixed_text(seed)
        assert crowded.encode_array(text).tolist() == crowded.encode(text)


def test_bytes_without_a_token_are_dropped(default_model: Path) -> None:
    smollm = tokenizer_from_gguf(open_gguf(default_model).metadata)
    for text in ("\x04", "a\x04b\x06", "\x04" * 500, "x" * 70 + "\x04" + "y" * 70):
        assert smollm.encode_array(text).tolist() == smollm.encode(text)


def test_a_lone_surrogate_is_refused(tokenizer: BytePairTokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"character 3 is U\+D800"):
        tokenizer.encode_array("abc\ud800")


def test_special_tokens_are_encoded_as_text(meta: BytePairTokenizer) -> None:
    text = "a <|eot_id|> b <|begin_of_text|>"
    assert not {*meta.encode_array(text).tolist()} & {*meta.specials.values()}


def test_a_split_that_is_not_compiled(meta: BytePairTokenizer) -> None:
    other = replace(meta.vocabulary, split=Split((DIGIT_RUNS, GPT2)))
    tokenizer = BytePairTokenizer(other, bos=None, backend=COMPILED)
    text = mixed_text(1)
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_threads_share_a_tokenizer(meta: BytePairTokenizer) -> None:
    texts = [mixed_text(seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(meta.encode_array, texts))
    assert [ids.tolist() for ids in arrays] == [meta.encode(text) for text in texts]


def test_many_ids_are_decoded_like_a_few(tokenizer: BytePairTokenizer) -> None:
    text = "".join(map(mixed_text, range(20)))
    ids = tokenizer.encode(text)
    many = ids * (MANY_IDS // len(ids) + 1)
    few = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert tokenizer.decode(many) == few * (MANY_IDS // len(ids) + 1)
    assert tokenizer.decode(np.array(many, np.uint32)) == tokenizer.decode(many)
    cut = [*many, *tokenizer.encode("😀")[:1]]
    assert tokenizer.decode(cut).endswith("\ufffd")


@pytest.mark.parametrize("id", [-1, 128_256, 2**31, 2**32, 2**64])
def test_one_wrong_id_among_many(meta: BytePairTokenizer, id: int) -> None:
    with pytest.raises(TokenizerError, match=f"id {id}: not in .* 0 … 128255"):
        meta.decode([5] * MANY_IDS + [id])


HOSTILE = (" ", "\n", "^", "a", "0", "😀", "\u0301", " \n", "\r\n \t", "a\u0301")


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("tokenizer", ["meta", "smollm"], indirect=True)
def test_a_million_of_the_same_character(tokenizer: BytePairTokenizer, unit: str) -> None:
    """Round trip, at most 5 s: quadratic time would be minutes."""
    tokenizer.encode_array(unit * 200)  # compiled
    text, made = unit * (1_000_000 // len(unit)), list[Any]()
    assert seconds(lambda: made.append(tokenizer.encode_array(text)), enough=5) <= 5
    if not tokenizer.vocabulary.split.normalize_nfc:
        assert tokenizer.decode(made[-1].tolist()) == text
