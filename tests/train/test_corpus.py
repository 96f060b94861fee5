"""Corpora: reading, splitting, and errors for files that are not text."""

from __future__ import annotations

import json
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from glassllama.base.errors import GlassError
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.tokenizers.tiktoken_file import read_meta_tokenizer
from glassllama.train import corpus as corpora
from glassllama.train.corpus import (
    SPLITS,
    Corpus,
    CorpusError,
    Split,
    char_tokenizer,
    encode_split,
    open_corpus,
)
from glassllama.train.tokens import Tokens, write_tokens

VAL = 0.1  # share of the validation split


def splits_of(corpus: Corpus) -> dict[Split, list[str]]:
    """The complete documents of each split."""
    out: dict[Split, list[str]] = {}
    for split in SPLITS:
        documents: dict[int, str] = {}
        for document, _, characters in corpus.texts(split, VAL):
            documents[document] = documents.get(document, "") + characters
        out[split] = list(documents.values())
    return out


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, val_fraction: float = VAL
) -> dict[Split, Tokens]:
    splits: list[Split] = ["train", "val"] if val_fraction else ["train"]
    return {
        split: write_tokens(
            folder / f"{split}.bin",
            encode_split(corpus, tokenizer, split, val_fraction),
            tokenizer.vocab_size,
        )
        for split in splits
    }


def test_tiny_shakespeare_is_split_as_nanogpt_does(tinyshakespeare: Path, tmp_path: Path) -> None:
    text = tinyshakespeare.read_text("ascii")
    corpus = open_corpus(tinyshakespeare)
    tokenizer = char_tokenizer(corpus)
    assert "".join(tokenizer.characters) == "".join(sorted(set(text)))
    written = tokenize(corpus, tokenizer, tmp_path)
    assert {part: len(tokens) for part, tokens in written.items()} == {
        "train": 1_003_854,  # the figures that nanoGPT's prepare.py prints
        "val": 111_540,
    }
    together = np.concatenate([written["train"].ids, written["val"].ids])
    assert tokenizer.decode(together.tolist()) == text
    assert [tokens.documents for tokens in written.values()] == [1, 1]
    assert tokenizer.bos is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "train.bin", "train.json", "val.bin", "val.json"
    ]  # fmt: skip


def test_the_ends_of_a_few_documents_are_validation_text(tmp_path: Path) -> None:
    texts = [chr(97 + n) * (10 * n + 10) for n in range(9)]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_bytes(b"\xff")
    corpus = open_corpus(tmp_path)
    assert list(corpus.lengths) == [len(text) for text in texts]
    splits = splits_of(corpus)
    assert [a + b for a, b in zip(*splits.values(), strict=True)] == texts
    assert [len(text) for text in splits["val"]] == [n + 1 for n in range(9)]


def many(tmp_path: Path, count: int = 2000) -> list[str]:
    texts = [f"document {n % 1500}, " + "ab" * (n % 7) for n in range(count)]
    lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(texts)]
    (tmp_path / "many.jsonl").write_text("\n\n".join([*lines, ""]))
    return texts


def test_whole_documents_of_many_are_validation_text(tmp_path: Path) -> None:
    texts = many(tmp_path)
    splits = splits_of(open_corpus(tmp_path / "many.jsonl"))
    assert sorted(chain.from_iterable(splits.values())) == sorted(texts)
    assert 0.08 < len(splits["val"]) / len(texts) < 0.12
    assert not set(splits["train"]) & set(splits["val"]), "a copy is not freed"
    assert splits == splits_of(open_corpus(tmp_path))


def test_documents_start_and_end_with_special_ids(tmp_path: Path) -> None:
    many(tmp_path)
    corpus = open_corpus(tmp_path)
    tokenizer = char_tokenizer(corpus)
    assert tokenizer.bos is not None
    written = tokenize(corpus, tokenizer, tmp_path / "out")
    for split, expected in splits_of(corpus).items():
        tokens = written[split]
        pieces = np.split(tokens.ids, tokens.starts[1:])
        assert [tokenizer.decode(ids[1:-1].tolist()) for ids in pieces] == expected
        assert {int(ids[0]) for ids in pieces} == {tokenizer.bos}
        assert {int(ids[-1]) for ids in pieces} == {tokenizer.end}


def test_ids_of_a_large_vocabulary_have_32_bits(tmp_path: Path, llama3_ranks: Path) -> None:
    (tmp_path / "a.txt").write_text("Straße, naïve café, 日本語, 한국어 🙂\n" * 20, "utf-8")
    tokenizer = read_meta_tokenizer(llama3_ranks)
    written = tokenize(open_corpus(tmp_path), tokenizer, tmp_path / "out")
    assert written["train"].ids.dtype == np.uint32
    text = "".join(tokenizer.decode(written[part].ids.tolist()) for part in ("train", "val"))
    assert text.replace("<|begin_of_text|>", "") == (tmp_path / "a.txt").read_text("utf-8")


def test_reading_in_pieces_changes_no_token(
    tmp_path: Path, llama3_ranks: Path, shakespeare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shakespeare.read_text()[:60_000]
    text += "\n \n\n\tx\r\n\r\n  y  \n(z" * 400
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokenizer = read_meta_tokenizer(llama3_ranks)
    tokenizer.bos = None
    whole = tokenizer.encode(text)
    monkeypatch.setattr(corpora, "MAX_PIECE", 1000)
    monkeypatch.setattr(corpora, "READ_CHARACTERS", 777)
    corpus = open_corpus(tmp_path / "a.txt")
    assert len(list(corpus.texts("train", 0.0))) > 30
    written = tokenize(corpus, tokenizer, tmp_path / "out", val_fraction=0.0)
    assert written["train"].ids.tolist() == whole


def test_a_text_without_line_breaks_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "MAX_PIECE", 100)
    monkeypatch.setattr(corpora, "READ_CHARACTERS", 7)
    text = "日本語é" * 500 + "\n" * 700
    (tmp_path / "a.txt").write_text(text, "utf-8")
    pieces = [t.characters for t in open_corpus(tmp_path).texts("train", 0.0)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 200


def test_memory_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("w") as file:
        for n in range(600_000):
            file.write(f"line {n}, all work and no play makes Jack a dull boy\n")
    size = (tmp_path / "a.txt").stat().st_size
    assert size > 30_000_000
    tracemalloc.start()
    corpus = open_corpus(tmp_path)
    for _ in corpus.texts("train", VAL):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size * 0.8


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "no text in it"),
    "mark.txt": (b"\xef\xbb\xbf", "no text in it"),
    "latin.txt": (b"a" * 3_000_000 + "\xe9".encode("latin-1") + b"b", "byte 3000000 is not UTF-8"),
    "cut.txt": ("abc日".encode()[:-1], "byte 3 is not UTF-8"),
    "utf16.txt": ("abc".encode("utf-16"), "byte 0 is not UTF-8"),
    "blank.jsonl": (b"\n\n  \n", "no text in it"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": "b"\n', "line 2: not valid JSON"),
    "list.jsonl": (b'{"text": "a"}\n\n["b"]\n', "line 3: expected an object.*'text'"),
    "field.jsonl": (b'{"body": "a"}\n', "line 1: expected an object.*'text'"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: expected an object.*'text'"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "line 1: .*UTF-16"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', "line 1: not valid JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not valid JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_errors_contain_the_position_of_invalid_text(tmp_path: Path, name: str) -> None:
    content, words = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=words) as error:
        open_corpus(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file or folder"):
        open_corpus(tmp_path / "missing")
    with pytest.raises(CorpusError, match=r"no texts in this folder.*\.jsonl"):
        open_corpus(tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\r\n")
    assert open_corpus(tmp_path).characters == frozenset("ab\r\n")


def test_a_text_too_short_for_a_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(GlassError, match="no ids to write"):
        tokenize(open_corpus(tmp_path), CharTokenizer("a"), tmp_path / "out")
