"""Ids of texts against llama.cpp: every pre-tokenizer that GGUF files name, SentencePiece, Gemma.

The vocabulary of the pre-tokenizers has a token for every pair of bytes, so that a wrong boundary
between two pretokens changes the ids. llama.cpp differs from the published tokenizer.json files in
few places, where the tokenizers library agrees with us (`DIFFERENT`): such texts are changed before
they are compared. Code points that Python does not know become spaces, because llama.cpp's Unicode
tables are older than ours. Left out are user-defined pieces that contain a space, which only
SentencePiece and we find in a text, ▁ in a text beside user-defined runs of it, and special names
of user-defined tokens, which we read on request only.
"""

from __future__ import annotations

import io
import json
import random
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from byte_level_families import CODE_POINTS, mixed_text
from corpora import in_context, some
from glassllama import hub
from glassllama.formats.gguf import open_gguf
from glassllama.tokenizers.pretokenizer import OTHER_SPLITS, SPLITS
from glassllama.weights.tokenizer_gguf import PRE_TOKENIZERS, tokenizer_from_gguf
from long_mode import LONG
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: the bench extra")

from llama_cpp_vocabulary import LlamaCppTokenizer

PRES = [
    "qwen2", "deepseek-r1-qwen", "deepseek-llm", "llama-bpe", "smollm", "tekken", "gpt-4o", "gpt-2",
    "refact", "olmo", "dbrx", "default",
]  # fmt: skip
PRES += [pre for pre in PRE_TOKENIZERS if LONG and pre not in PRES]
SEEDS, SIZE = (30, 400_000) if LONG else (6, 10_000)  # mixed texts; characters of a file
PROSE = (Path(__file__).parents[1] / "romeo_and_juliet.txt").read_text("utf-8")
FOREIGN = "Größe naïve café Привет, как дела? 日本語のテキスト 한국어 हिन्दी 😀 x²+y³ "
SPECIALS, ADDED = ["<|begin|>", "<|eot_id|>", "<|im_end|>"], ["<tool>", "[INST]"]
UNMERGED = ["Ġunmerged", "xyzzy", "Ġlove"]  # tokens that no merge makes
ODD = [
    "", " ", "  \n  b   ", "\r\n\r\n  a", "\t\ta\t", "\0", "\ufeff", "unmerged xyzzy love", " love",
    "a<tool> x [INST]\n<|eot_id|>", "<tool>", "1234567890 12 ٣٤٥٦", "'S 'LL I'm don't", "é" * 9,
    "<s>a</s> <unk> <0x41>", "▁", "a▁b", "<h1> a <h1>b", "\n\n\n", "\U0010ffff",
]  # fmt: skip
# Ideographs, Hangul, private use: in each all code points are split alike.
UNIFORM = (
    range(0x3400, 0xA000), range(0xAC00, 0xD7A4), range(0xE000, 0xF900), range(0x20000, 0x30000)
)  # fmt: skip
MARKED = ("Lu", "Ll", "Lt", "Mn", "Mc", "Me")  # cased letters and marks
PIECES_ONLY = "default of SentencePiece"
LONG_S = re.compile("'(?=ſ)")

# Texts whose ids differ in llama.cpp: its patterns know only ASCII's cases, only ASCII's whitespace
# or no case of the long s, and it does not normalize.
DIFFERENT = {
    "tekken": "aÀ éAb हिन्दी ǅa ÀÉa",
    "gpt-4o": "aÀ éAb हिन्दी ǅa ÀÉa",
    "deepseek-llm": "a\u2003b\u3000c\u2003d",
    "deepseek-coder": "a\u2003b\u3000c\u2003d",
    "llama-bpe": "'ſa'ſb",
    "qwen2": "a\u0301 \u1100\u1161",
}


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: learned from text without boundaries, then all pairs of bytes."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, show_progress=False, max_token_length=10
    )
    learned.train_from_iterator([*PROSE.splitlines(keepends=True), FOREIGN * 20], trainer)
    inner = json.loads(learned.to_str())["model"]
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    pairs = [(a, b) for a in alphabet for b in alphabet if a + b not in inner["vocab"]]
    random.Random(0).shuffle(pairs)
    tokens += ["".join(pair) for pair in pairs]
    tokens += [token for token in UNMERGED if token not in inner["vocab"]]
    return tokens, [" ".join(merge) for merge in [*inner["merges"], *pairs]]


def write_vocabulary(
    path: Path, model: str, pre: str, tokens: list[str], types: list[int], bos: int, **more: Any
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(bos + 1)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_byte_level(path: Path, pre: str) -> Path:
    tokens, merges = vocabulary()
    types = [1] * len(tokens) + [3] * len(SPECIALS) + [4] * len(ADDED)
    whole = [*tokens, *SPECIALS, *ADDED]
    return write_vocabulary(path, "gpt2", pre, whole, types, len(tokens), token_merges=merges)


def comparable(pre: str, text: str) -> str:
    """The text without what llama.cpp splits in another way than the published pattern."""
    split = PRE_TOKENIZERS.get(pre)
    text = "".join(c if is_known(c) else " " for c in text)
    if pre == PIECES_ONLY:
        text = text.replace("\u2581", "")
    if split == "qwen2":
        text = unicodedata.normalize("NFC", text)
    if split in ("llama3", "qwen2", "gpt-4o"):
        text = LONG_S.sub("", text)
    if split in ("tekken", "gpt-4o"):
        text = "".join(c for c in text if c.isascii() or unicodedata.category(c) not in MARKED)
    if split in ("deepseek-llm", "deepseek-coder"):
        text = "".join(" " if c.isspace() and not c.isascii() else c for c in text)
    return text


def is_known(point: str) -> bool:
    return unicodedata.category(point) != "Cn"


@cache
def texts() -> list[tuple[str, bool]]:
    """Texts, and whether special tokens are parsed in them."""
    step = 1 if LONG else 61
    points = [
        c for c in CODE_POINTS
        if is_known(c) and (ord(c) % step == 0 or not any(ord(c) in some for some in UNIFORM))
    ]  # fmt: skip
    in_text = in_context(points, "a{0} {0}{0} 1{0}2\n{0}")
    files = (text[:SIZE] for text in (*some("code")[:3], *some("prose")[:5]))
    short = [*ODD, *map(mixed_text, range(SEEDS))]
    return [(text, True) for text in short] + [(text, False) for text in (*short, *in_text, *files)]


def differences(ours: Any, theirs: LlamaCppTokenizer, pre: str = "") -> Iterator[str]:
    for text, specials in texts():
        text = comparable(pre, text)
        ids = ours.encode(text, bos=True, specials=specials)
        if ids != theirs.encode(text, bos=True, specials=specials):
            yield text[:80]


def both(path: Path) -> tuple[Any, LlamaCppTokenizer]:
    return tokenizer_from_gguf(dict(open_gguf(path).metadata)), LlamaCppTokenizer(path)


@pytest.mark.parametrize("pre", PRES)
@pytest.mark.identical("ids of pre-tokenizers in GGUF files", "llama.cpp")
def test_pre_tokenizers(pre: str, tmp_path: Path) -> None:
    assert list(differences(*both(write_byte_level(tmp_path / "m.gguf", pre)), pre)) == []


@pytest.mark.parametrize("pre", DIFFERENT)
def test_where_llama_cpp_differs_from_the_tokenizers_library(pre: str, tmp_path: Path) -> None:
    ours, theirs = both(write_byte_level(tmp_path / "m.gguf", pre))
    tokens, merges = vocabulary()
    split = {**SPLITS, **OTHER_SPLITS}[PRE_TOKENIZERS[pre]]
    vocab = {token: id for id, token in enumerate(tokens)}
    library = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    if split.normalize_nfc:
        library.normalizer = normalizers.NFC()
    stages = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    end = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*stages, end])
    library.decoder = decoders.ByteLevel()
    text = DIFFERENT[pre]
    ids = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids != theirs.encode(text)


PIECES: dict[str, dict[str, Any]] = {
    "llama": {"split_digits": True, "allow_whitespace_only_pieces": True},
    "gemma": {
        "user_defined_symbols": ["<h1>", "\u2581\u2581", "\n\n", "\n"],
        "control_symbols": ["<ctrl>", "[INST]"],
    },
    "across spaces": {"split_by_whitespace": False, "split_by_unicode_script": False},
}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", PIECES)
@pytest.mark.identical("SentencePiece: GGUF vocabulary", "llama.cpp")
def test_sentencepiece(name: str, prefix: bool, tmp_path: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*PROSE.splitlines(), *[FOREIGN] * 20]), model_writer=written,
        model_type="bpe", vocab_size=1000, normalization_rule_name="identity", minloglevel=2,
        byte_fallback=True, remove_extra_whitespaces=False, **PIECES[name],
    )  # fmt: skip
    pieces = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue()).pieces
    texts, types, scores = zip(*((p.piece, p.type, p.score) for p in pieces), strict=True)
    path = write_vocabulary(
        tmp_path / "m.gguf", "llama", "default", texts, types, 1, token_scores=scores,
        add_space_prefix=prefix,
    )  # fmt: skip
    assert list(differences(*both(path), PIECES_ONLY)) == []


@pytest.mark.identical("ids of Gemma 3 270M", "llama.cpp")
def test_gemma_3() -> None:
    """All code points, tokens and texts are in benchmarks/agreement.py."""
    if hub.terms_before_download("gemma3-270m") is not None:
        pytest.skip("Gemma 3 270M is not in the cache: glassllama download gemma3-270m")
    ours, theirs = both(hub.resolve("gemma3-270m"))
    assert list(differences(ours, theirs)) == []
    for id in range(0, ours.vocab_size, 1 if LONG else 29):
        text = ours.decode([id])
        assert ours.encode(text, specials=True) == theirs.encode(text, specials=True)
