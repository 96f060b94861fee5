"""A corpus: one text, a folder of texts, or JSON lines; read piece by piece, whatever its size.

A file of plain text is a document, and so is the field `text` of every line of a .jsonl file. One
pass, `open_corpus`, reads everything once: what is no UTF-8 or no JSON is found before anything
else begins, and it is known how long each document is and which characters there are.

What is held out: of few documents the end of each, by position, as nanoGPT does with its one text;
of many, whole documents, chosen by their content, so that a copy of one is on the same side.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from glassllama.base.errors import ConfigError, GlassError
from glassllama.base.interfaces import Progress, Tokenizer
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.train.tokens import NoIdsError, Piece, Tokens, tokenizer_facts, write_tokens

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")

TEXT_ENDINGS = (".txt", ".text", ".md")  # of a folder's files; a file that is named may end anyhow
JSON_LINES = ".jsonl"
FIELD = "text"
READ_BYTES = 1 << 20
LONG_TEXT = 1 << 22  # characters of a document in hand at once
FEW_DOCUMENTS = 100  # up to here each is cut; of more, whole documents are held out


class CorpusError(GlassError):
    """Something is wrong with a text: which file, which line or byte, what to do."""


class NothingLeftError(CorpusError):
    """A part of a corpus that should have a share of it has none."""

    def __init__(self, corpus: Corpus, part: Part) -> None:
        count, self.part = sum(corpus.lengths), part
        super().__init__(
            f"{corpus.path}: {count:,} characters are too few: none is left for {part!r}; give more"
        )


class Text(NamedTuple):
    """Some characters of a document in a row."""

    document: int
    start: int  # characters of the document before these
    characters: str


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of a corpus is held out: for validation, and for a last test."""

    val: float = 0.1
    test: float = 0.0

    def __post_init__(self) -> None:
        if min(self.val, self.test) < 0 or self.val + self.test >= 1:
            raise ConfigError(
                f"shares must be at least 0 and less than 1 together, got {self.val} for "
                f"validation and {self.test} for a test"
            )

    def of(self, part: Part) -> tuple[float, float]:
        """From where to where a part reaches if the whole is from 0 to 1."""
        train, val = 1 - self.val - self.test, 1 - self.test
        return {"train": (0.0, train), "val": (train, val), "test": (val, 1.0)}[part]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts that have been looked through; made by `open_corpus`."""

    path: Path
    files: tuple[Path, ...]
    lengths: array[int]  # characters of every document
    characters: frozenset[str]
    sha256: str  # of all documents: equal for equal texts, whatever the files are called

    @property
    def documents(self) -> int:
        return len(self.lengths)

    def texts(self, part: Part, shares: Shares) -> Iterator[Text]:
        """What belongs to a part, in order."""
        low, high = shares.of(part)
        whole_documents = self.documents > FEW_DOCUMENTS
        taken = -1
        for text in read_texts(self.files):
            if whole_documents:
                if text.start == 0 and low <= place_of(text.characters) < high:
                    taken = text.document
                if text.document == taken:
                    yield text
                continue
            length = self.lengths[text.document]
            first, last = int(length * low), int(length * high)
            mine = text.characters[max(first - text.start, 0) : max(last - text.start, 0)]
            if mine:
                yield Text(text.document, max(first, text.start), mine)


def open_corpus(path: Path, *, progress: Progress | None = None) -> Corpus:
    """Read everything once. Progress is told in bytes.

    Raises CorpusError: nothing there, no text in it, no UTF-8, or a bad line of JSON.
    """
    files = text_files(path)
    lengths, characters = array("q"), set[str]()
    total, done, told = sum(file.stat().st_size for file in files), 0, -1
    digest = hashlib.sha256()
    for text in read_texts(files):
        if text.document == len(lengths):
            lengths.append(0)
        lengths[-1] += len(text.characters)
        characters.update(text.characters)
        raw = text.characters.encode("utf-8")
        digest.update(f"{text.document} {text.start} {len(raw)}\n".encode() + raw)
        done += len(raw)
        if progress is not None and done > told:
            progress(min(done, total), total)
            told = done
    if not lengths:
        of = "" if files == (path,) else f" (files: {len(files)})"
        raise CorpusError(f"{path}: no text in it{of}; expected at least one character")
    return Corpus(
        path=path,
        files=files,
        lengths=lengths,
        characters=frozenset(characters),
        sha256=digest.hexdigest(),
    )


def text_files(path: Path) -> tuple[Path, ...]:
    """A file itself; of a folder all texts and .jsonl files below it, by name."""
    if path.is_file():
        return (path,)
    if not path.is_dir():
        what = "neither a regular file nor a" if path.exists() else "no such file or"
        raise CorpusError(f"{path}: {what} folder")
    endings = (*TEXT_ENDINGS, JSON_LINES)
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
    found = [file for file in found if file.is_file() and not file.name.startswith(".")]
    if not found:
        raise CorpusError(f"{path}: no texts in this folder; expected {' '.join(endings)} files")
    return tuple(found)


def place_of(text: str) -> float:
    """Where on the line from 0 to 1 a document's beginning falls: a hash, equal for equal texts."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2.0**48


# --- files to texts -------------------------------------------------------------------------


def read_texts(files: Iterable[Path]) -> Iterator[Text]:
    """All documents in order, long ones in several texts; documents without text do not count."""
    document = 0
    for file in files:
        lines = file.suffix.lower() == JSON_LINES
        try:
            for characters in json_texts(file) if lines else [decoded(file)]:
                start = 0
                for piece in cut(characters):
                    yield Text(document, start, piece)
                    start += len(piece)
                document += start > 0
        except OSError as error:
            raise CorpusError(f"{file}: cannot be read ({error.strerror or error})") from None


def cut(pieces: Iterable[str]) -> Iterator[str]:
    """The same characters in pieces of about LONG_TEXT, cut where no token would reach across.

    That is after a line's end, before anything but a blank: no split pattern joins these two. A
    text without such a place is cut all the same, lest it fill the memory.
    """
    held = ""
    for piece in pieces:
        held += piece
        while len(held) > 2 * LONG_TEXT:
            at = border_before(held, LONG_TEXT)
            yield held[:at]
            held = held[at:]
    if held:
        yield held


def border_before(text: str, at: int) -> int:
    """The last such place in the first `at` characters, or `at`."""
    while (found := text.rfind("\n", 0, at)) > 0:
        if not text[found + 1].isspace():
            return found + 1
        at = found
    return LONG_TEXT


def decoded(file: Path) -> Iterator[str]:
    """A file's characters as they come, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    with file.open("rb") as stream:
        while True:
            raw = stream.read(READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{file}: byte {done - pending + error.start} is no UTF-8; convert the file to "
                    "UTF-8, or leave it out"
                ) from None
            if not raw:
                return
            done += len(raw)


def json_texts(file: Path) -> Iterator[list[str]]:
    """The field `text` of every line, each as a list of one; empty lines are passed over."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield [json_text(line, f"{file}, line {number}")]


def json_text(line: bytes, where: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise CorpusError(f"{where}: no JSON ({reason})") from None
    text = values.get(FIELD) if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise CorpusError(f"{where}: expected an object with a text in its field {FIELD!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CorpusError(f"{where}: the text holds half of a UTF-16 pair, no character") from None
    return text


# --- texts to tokens ------------------------------------------------------------------------


def char_tokenizer(corpus: Corpus) -> CharTokenizer:
    """The characters of the corpus as a vocabulary.

    Of a single text a model learns no beginnings, so there is no begin token to put before prompts.
    """
    tokenizer = CharTokenizer(corpus.characters)
    if corpus.documents == 1:
        tokenizer.bos = None
    return tokenizer


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shares: Shares | None = None,
    progress: Progress | None = None,
) -> dict[Part, Tokens]:
    """Write the parts of a corpus as `train.bin`, `val.bin` (and `test.bin`) into `folder`.

    A document begins with the tokenizer's begin token, if it has one; where there are several, it
    ends with an end token, if there is one. Parts without a share are left out. Progress is told in
    characters. Raises NothingLeftError: a part without text; GlassError: an id that is none of the
    vocabulary.
    """
    shares = shares or Shares()
    facts = tokenizer_facts(tokenizer)
    told = Told(progress, sum(corpus.lengths))
    written: dict[Part, Tokens] = {}
    for part in PARTS:
        low, high = shares.of(part)
        if low < high:
            pieces = encoded(corpus, corpus.texts(part, shares), tokenizer, told)
            try:
                written[part] = write_tokens(folder / f"{part}.bin", pieces, facts)
            except NoIdsError:
                raise NothingLeftError(corpus, part) from None
    return written


@dataclass
class Told:
    """Counts characters for a progress bar, over several parts."""

    progress: Progress | None
    total: int
    done: int = 0

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def encoded(
    corpus: Corpus, texts: Iterable[Text], tokenizer: Tokenizer, told: Told
) -> Iterator[Piece]:
    """The ids of each text, with what marks the ends of documents."""
    end = min(tokenizer.stop_ids, default=None) if corpus.documents > 1 else None
    current = -1
    for document, start, characters in texts:
        begins, current = document != current, document
        if start == 0 and tokenizer.bos is not None:
            yield Piece(np.array([tokenizer.bos]), begins)
            begins = False
        yield Piece(tokenizer.encode_array(characters), begins)
        if end is not None and start + len(characters) == corpus.lengths[document]:
            yield Piece(np.array([end]), begins=False)
        told.add(len(characters))
