"""Token ids of a corpus on disk, memory-mapped for training.

Two files: `train.bin`, the ids one after another, little endian, 16 bits each if the vocabulary
allows it, else 32; and `train.json`, which describes them: the tokenizer, their number, where
documents start, and the sha256 of the ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import QUOTED_CHARACTERS, FormatError, GlassError, quoted
from glassllama.base.fields import Fields, is_whole
from glassllama.base.interfaces import Tokenizer

FORMAT = "glassllama tokens 1"
MAX_IDS = 2**62  # of a file
SMALL_VOCABULARY = 1 << 16  # up to here an id fits 16 bits
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Ids = NDArray[np.uint16] | NDArray[np.uint32]


class NoIdsError(GlassError):
    """There are no ids to write."""


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """Identifies a vocabulary; the hash covers the bytes of every token and the special tokens."""

    name: str
    vocab_size: int
    sha256: str


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    """Equal for equal vocabularies only: the same id stands for the same text."""
    digest = hashlib.sha256()
    for id in range(tokenizer.vocab_size):
        token = tokenizer.token_bytes(id)
        digest.update(len(token).to_bytes(4, "little") + token)
    digest.update(json.dumps(dict(tokenizer.specials), sort_keys=True).encode())
    name, sha256 = type(tokenizer).__name__, digest.hexdigest()
    return TokenizerInfo(name=name, vocab_size=tokenizer.vocab_size, sha256=sha256)


class Piece(NamedTuple):
    """Consecutive ids; a document may come in many pieces."""

    ids: NDArray[Any]
    begins: bool  # whether the first of them begins a document


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The ids of a corpus, memory-mapped."""

    path: Path
    ids: Ids  # (N,)
    starts: NDArray[np.int64]  # (documents,) where each begins; the first is 0
    tokenizer: TokenizerInfo
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.starts)


def write_tokens(path: Path, pieces: Iterable[Piece], tokenizer: TokenizerInfo) -> Tokens:
    """Write `path` (….bin) and its .json, with one piece at a time in memory.

    Both files appear when everything is written; what was there before stays until then. Raises
    GlassError: an id outside the vocabulary, no ids at all (NoIdsError), or a folder that cannot
    be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    description = path.with_suffix(".json")
    partial_json = description.with_name(f".{description.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                about = write_ids(file, pieces, tokenizer)
            if not about["count"]:
                raise NoIdsError(f"{path}: the corpus is empty: no ids to write")
            partial_json.write_text(json.dumps(about), encoding="utf-8")
            description.unlink(missing_ok=True)  # ids without a description count as absent
            os.replace(partial, path)
            os.replace(partial_json, description)
        finally:
            partial.unlink(missing_ok=True)
            partial_json.unlink(missing_ok=True)
    except OSError as error:
        raise GlassError(f"{path}: cannot be written ({error.strerror or error})") from None
    return open_tokens(path, verify=False)


def write_ids(file: BinaryIO, pieces: Iterable[Piece], tokenizer: TokenizerInfo) -> dict[str, Any]:
    """Write all ids -> the content of the .json file."""
    name = "uint16" if tokenizer.vocab_size <= SMALL_VOCABULARY else "uint32"
    digest, count, starts = hashlib.sha256(), 0, [0]
    for ids, begins in pieces:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            bad = next(int(id) for id in ids if not 0 <= id < tokenizer.vocab_size)
            raise GlassError(f"id {bad} is outside the vocabulary of {tokenizer.vocab_size}")
        if begins and count > starts[-1]:  # a document without ids does not count
            starts.append(count)
        raw = ids.astype(DTYPES[name]).tobytes()
        file.write(raw)
        digest.update(raw)
        count += len(ids)
    if count == starts[-1] > 0:  # the last document has no ids
        starts.pop()
    file.flush()
    os.fsync(file.fileno())
    about = {"format": FORMAT, "tokenizer": asdict(tokenizer), "dtype": name, "count": count}
    return about | {"sha256": digest.hexdigest(), "starts": starts}


def open_tokens(path: Path, *, verify: bool = True) -> Tokens:
    """Map the ids after checking that both files belong together; `verify` also hashes the ids.

    Raises FormatError: a file is missing, damaged or of another format.
    """
    try:
        return checked_tokens(path, verify)
    except FormatError as error:
        raise FormatError(f"{error}; tokenize again") from None


def checked_tokens(path: Path, verify: bool) -> Tokens:
    get = read_description(path.with_suffix(".json"))
    info = get.object("tokenizer")
    tokenizer = TokenizerInfo(
        name=info.text("name"), vocab_size=info.whole("vocab_size"), sha256=info.text("sha256")
    )
    name, count, sha256 = get.text("dtype"), get.whole("count", most=MAX_IDS), get.text("sha256")
    if name not in DTYPES:
        get.refuse("dtype", " or ".join(DTYPES))
    starts, dtype = get.items("starts"), DTYPES[name]
    if not (starts and starts[0] == 0 and all(map(is_whole, starts))):
        get.refuse("starts", "whole numbers that begin with 0")
    if starts[-1] >= count or not all(a < b for a, b in pairwise(starts)):
        get.refuse("starts", f"increasing numbers below the number of ids, {count}")
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        came = "is missing" if size is None else f"has {size} bytes"
        raise FormatError(f"{path}: {came}, expected {count} ids of {dtype.itemsize} bytes")
    if verify and (found := file_hash(path)) != sha256:
        raise FormatError(f"{path}: sha256 is {found}, expected {quoted(sha256)}")
    ids = np.memmap(path, dtype, mode="r")
    return Tokens(
        path=path, ids=ids, starts=np.array(starts, np.int64), tokenizer=tokenizer, sha256=sha256
    )


def read_description(path: Path) -> Fields:
    """The fields of the .json file. Raises FormatError: missing, not JSON, another format."""
    try:
        about = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error)[:QUOTED_CHARACTERS]
        raise FormatError(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise FormatError(f"{path}: expected a file of format {FORMAT!r}")
    return Fields(str(path), about, FormatError)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
