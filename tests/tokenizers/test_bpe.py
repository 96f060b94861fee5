"""BPE: computed manually, in plain loops and with a heap; hostile and unusual input, added tokens,
limits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_level_families import mixed_text
from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.formats.gguf import open_gguf
from glassllama.native.tokenizers import COMPILED
from glassllama.tokenizers import bpe
from glassllama.tokenizers.backend import PYTHON
from glassllama.tokenizers.bpe import BytePairTokenizer, merge
from glassllama.tokenizers.pretokenizer import SPLITS
from glassllama.tokenizers.tiktoken_file import read_meta_tokenizer
from glassllama.tokenizers.vocabulary import BYTES, NEVER, AddedToken, Vocabulary
from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf
from processor_time import seconds

Pairs = dict[tuple[bytes, bytes], int]


def small(merges: Pairs | None, joined: list[bytes], **more: object) -> BytePairTokenizer:
    """A tokenizer of the 256 bytes, some merged tokens, and two special tokens."""
    tokens = [*BYTES, *joined]
    specials = {"<begin>": len(tokens), "<end>": len(tokens) + 1}
    added = [AddedToken(id=id, text=text, is_special=True) for text, id in specials.items()]
    added += more.pop("added", [])  # type: ignore[operator]
    settings = {"split": SPLITS["gpt2"], "ignore_merges": False, "added_tokens": (*added,)} | more
    texts = [text.encode() for text in specials]
    vocabulary = Vocabulary(
        tokens=(*tokens, *texts, None),
        ids={token: id for id, token in enumerate(tokens)},
        merges=merges,
        **settings,  # type: ignore[arg-type]
    )
    return BytePairTokenizer(vocabulary, bos=specials["<begin>"], stop_ids=[specials["<end>"]])


@pytest.fixture(scope="module")
def meta(llama3_ranks: Path) -> BytePairTokenizer:
    return read_meta_tokenizer(llama3_ranks, COMPILED)


@pytest.fixture(scope="module")
def smollm(default_model: Path) -> BytePairTokenizer:
    tokenizer = tokenizer_from_gguf(open_gguf(default_model).metadata)
    assert isinstance(tokenizer, BytePairTokenizer)
    return tokenizer


def test_manually_computed_merges() -> None:
    """low lower lowest, with the merges l·o, lo·w, e·r in this order."""
    ranks = {(b"l", b"o"): 0, (b"lo", b"w"): 1, (b"e", b"r"): 2}
    rank = lambda left, right: ranks.get((left, right), NEVER)  # noqa: E731
    assert merge([*map(BYTES.__getitem__, b"lower")], rank) == [b"low", b"er"]
    assert merge([*map(BYTES.__getitem__, b"lowest")], rank) == [b"low", b"e", b"s", b"t"]
    assert merge([], rank) == []


def test_the_lowest_rank_is_merged_first_and_then_the_leftmost_pair() -> None:
    assert small({(b"b", b"c"): 0, (b"a", b"b"): 1}, [b"bc", b"ab"]).encode("abc") == [97, 256]
    assert small({(b"a", b"b"): 0, (b"b", b"c"): 1}, [b"ab", b"bc"]).encode("abc") == [256, 99]
    assert small({(b"a", b"a"): 0}, [b"aa"]).encode("aaa") == [
        256,
        97,
    ]  # the leftmost of equal ones


def test_ranks_of_tiktoken_are_ids() -> None:
    """Without a list of merges, any two parts may merge if their concatenation is a token."""
    tokenizer = small(None, [b"ab", b"cd", b"abcd"])
    assert tokenizer.encode("abcd") == [258]
    assert small(None, [b"bc", b"ab", b"abcd"]).encode("abcd") == [97, 256, 100]
    whole = small(None, [b"bc", b"ab", b"abcd"], ignore_merges=True)
    assert whole.encode("abcd") == [258]


@settings(deadline=None)  # the first call compiles
@given(st.binary(max_size=300), st.randoms(use_true_random=False), st.booleans())
def test_heaps_equal_the_plain_loop(word: bytes, chance: random.Random, by_list: bool) -> None:
    word = bytes(b"abc"[byte % 3] for byte in word)
    tokens, merges = [b"a", b"b", b"c"], Pairs()
    for rank in range(40):
        left, right = chance.choice(tokens), chance.choice(tokens)
        merges.setdefault((left, right), rank)
        tokens += [left + right] if left + right not in tokens else []
    tokenizer = small(merges if by_list else None, tokens[3:])
    vocabulary = tokenizer.vocabulary
    symbols = np.frombuffer(word, np.uint8).astype(np.int32)  # a byte's id is its value here
    plain = merge([*map(BYTES.__getitem__, word)], vocabulary.rank)
    for backend in (PYTHON, COMPILED):
        heap = backend.merger(vocabulary.pair_rows())(symbols).tolist()
        assert heap == [vocabulary.ids[part] for part in plain]


def test_heaps_equal_the_plain_loop_on_real_vocabularies(
    meta: BytePairTokenizer, smollm: BytePairTokenizer
) -> None:
    plain_smollm = BytePairTokenizer(smollm.vocabulary, bos=None)
    for tokenizer in (meta, smollm, plain_smollm):
        for seed in range(20):
            word = mixed_text(seed, pieces=200).encode()
            vocabulary = tokenizer.vocabulary
            parts = [byte for byte in map(BYTES.__getitem__, word) if byte in vocabulary.ids]
            plain = [vocabulary.ids[part] for part in merge(parts, vocabulary.rank)]
            assert tokenizer._encode_long_pretoken(word) == plain


def test_no_folder_for_machine_code() -> None:
    """A read-only installation and home: long words compile in memory."""
    script = (
        "from glassllama.native.tokenizers.corpus_decoder import total_size\n"
        "import numpy\n"
        "assert total_size(numpy.uint32([1, 1]), numpy.int64([5, 3])) == 6\n"
    )
    # Only the folder of NUMBA_CACHE_DIR is allowed, and there is none.
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    environment.pop("NUMBA_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.parametrize("char", [" ", "\n", "^", "a", "0", "😀", "\u0301"])
@pytest.mark.parametrize("name", ["meta", "smollm"])
def test_a_million_of_the_same_character(
    name: str, char: str, request: pytest.FixtureRequest
) -> None:
    """Round trip, at most 5 s: quadratic time would be minutes."""
    tokenizer = request.getfixturevalue(name)
    tokenizer.encode("a" * 2000)  # compiled once
    text = char * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert seconds(partial(tokenizer.encode, text), enough=5) <= 5


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("pattern", [" x", " \n", "\n ", "a ", "'", "  0", "\r\n \t", "a\u0301"])
def test_split_patterns_take_linear_time(pattern: str, name: str) -> None:
    split, text, made = SPLITS[name], (pattern * 400_000)[:400_000] + "x", list[list[str]]()
    assert seconds(lambda: made.append(split.pretokens(text)), enough=5) <= 5
    assert "".join(made[0]) == text or split.normalize_nfc


def test_unusual_text(meta: BytePairTokenizer, smollm: BytePairTokenizer) -> None:
    for tokenizer in (meta, smollm):
        assert tokenizer.encode("") == []
        assert tokenizer.decode([]) == ""
        for text in ("\x00", "\ufeffabc", "a\x00b", "\ufffe\uffff", "\U0010ffff", "\ufffd"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        for text, place in (("\ud800", 0), ("ab\udfff\ud800", 2), ("x" * 5000 + "\udc80", 5000)):
            with pytest.raises(TokenizerError, match=f"character {place} is U\\+D"):
                tokenizer.encode(text)


def test_bytes_that_are_not_utf8(meta: BytePairTokenizer) -> None:
    ids = meta.encode("é😀")
    single = [meta.vocabulary.ids[bytes([byte])] for byte in "é😀".encode()]
    assert meta.decode(single) == meta.decode(ids) == "é😀"
    assert meta.decode(single[:1]) == meta.decode(single[1:2]) == "\ufffd"
    assert meta.decode([single[0], *meta.encode("x")]) == "\ufffdx"
    assert b"".join(map(meta.token_bytes, single)) == "é😀".encode()


def test_bytes_without_a_token_are_dropped(smollm: BytePairTokenizer) -> None:
    """As by the tokenizers that the model was trained with; parity tests compare them."""
    lacking = [byte for byte in BYTES if byte not in smollm.vocabulary.ids and byte < b"\x80"]
    assert lacking == [b"\x04", b"\x06", b"\x13", b"\x14", b"\x16", b"\x1d"]
    assert smollm.encode("a\x04b") == [*smollm.encode("a"), *smollm.encode("b")]
    assert smollm._encode_long_pretoken(b"a\x04b") == smollm.encode("ab")


@pytest.mark.parametrize("id", [-1, -128_256, 128_256, 2**31, 2**64])
def test_ids_outside_the_vocabulary(meta: BytePairTokenizer, id: int) -> None:
    for read in (meta.token_bytes, lambda id: meta.decode([1, id])):
        with pytest.raises(TokenizerError, match=f"id {id}: not in .* 0 … 128255"):
            read(id)


def test_an_id_without_a_token() -> None:
    tokenizer = small(None, [])
    with pytest.raises(TokenizerError, match="id 258: not in the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size - 1])
    with pytest.raises(TokenizerError, match="id 999"):
        BytePairTokenizer(tokenizer.vocabulary, bos=None, stop_ids=[999])


def test_bos_specials_added() -> None:
    joined = [b"<tool>", b"<tool>s"]
    added = [AddedToken(id=256, text="<tool>"), AddedToken(id=257, text="<tool>s")]
    tokenizer = small(None, joined, added=added)
    begin, end = tokenizer.specials["<begin>"], tokenizer.specials["<end>"]
    assert tokenizer.encode("a", bos=True) == [begin, 97]
    assert tokenizer.encode("<tool>a<tool>sb") == [256, 97, 257, 98]  # the longest of two
    assert tokenizer.encode("<end>a", specials=True) == [end, 97]
    assert not {begin, end} & {*tokenizer.encode("<end><begin>", bos=False)}
    assert tokenizer.decode([begin, 97, end]) == "<begin>a<end>"
    assert tokenizer.token_bytes(end) == b"<end>"
    without = BytePairTokenizer(tokenizer.vocabulary, bos=None)
    assert without.encode("a", bos=True) == [97]


def test_encode_array_gives_the_same_ids(smollm: BytePairTokenizer) -> None:
    text = mixed_text(7)
    ids = smollm.encode_array(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == smollm.encode(text)
    assert smollm.decode(ids.tolist()) == smollm.decode(smollm.encode(text))
    assert smollm.encode_array("").shape == (0,)


def test_cache_is_bounded(smollm: BytePairTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BytePairTokenizer(smollm.vocabulary, bos=None)
    monkeypatch.setattr(bpe, "CACHED_PRETOKENS", 100)
    text = " ".join(f"{a}{b}" for a, b in pairwise(map(chr, range(0x4E00, 0x4F00))))
    assert tokenizer.encode(text) == smollm.encode(text)
    assert 0 < len(tokenizer._cache) <= 100
    tokenizer.encode("x" * 500)
    assert max(map(len, tokenizer._cache)) <= bpe.CACHED_LENGTH


def test_vocabulary_is_frozen(meta: BytePairTokenizer) -> None:
    with pytest.raises(AttributeError):
        meta.vocabulary.tokens = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        meta.specials["<|mine|>"] = 0  # type: ignore[index]


def test_it_implements_the_tokenizer_protocol(meta: BytePairTokenizer) -> None:
    tokenizer: Tokenizer = meta
    assert tokenizer.bos == 128_000
