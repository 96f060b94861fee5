"""A corpus as ids on disk: written once, piece by piece, then read through a memory map.

Two files that belong together: `tokens.bin`, the ids one after another, little endian, 16 bits each
where the vocabulary allows it and 32 where it does not; and `tokens.json`, which says what they
are: whose ids, how many, where documents start, and the sha256 of tokens.bin.
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
MOST_IDS = 2**62  # of a file
SMALL_VOCABULARY = 1 << 16  # up to here an id fits 16 bits
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Ids = NDArray[np.uint16] | NDArray[np.uint32]


class NoIdsError(GlassError):
    """There are no ids to write."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """Whose ids these are. The hash is over every token's bytes and the control tokens."""

    name: str
    vocab_size: int
    sha256: str


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """Equal facts mean equal vocabularies: the same id is the same text."""
    digest = hashlib.sha256()
    for id in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(id)
        digest.update(len(piece).to_bytes(4, "little") + piece)
    digest.update(json.dumps(dict(tokenizer.specials), sort_keys=True).encode())
    return TokenizerFacts(
        name=type(tokenizer).__name__, vocab_size=tokenizer.vocab_size, sha256=digest.hexdigest()
    )


class Piece(NamedTuple):
    """Some ids in a row; a document may come in many pieces."""

    ids: NDArray[Any]
    begins: bool  # whether the first of them begins a document


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The ids of a corpus, mapped from the file: nothing is in memory until it is looked at."""

    path: Path
    ids: Ids  # (N,)
    starts: NDArray[np.int64]  # (documents,) where each begins; the first is 0
    tokenizer: TokenizerFacts
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.starts)


def write_tokens(path: Path, pieces: Iterable[Piece], tokenizer: TokenizerFacts) -> Tokens:
    """Write `path` (….bin) and its sidecar, holding one piece at a time in memory.

    Both appear when all is written; what was there before stays until then. Raises GlassError: an
    id outside the vocabulary, no ids at all (NoIdsError), or a folder that cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                about = write_ids(file, pieces, tokenizer)
            if not about["count"]:
                raise NoIdsError(f"{path}: the corpus is empty, there are no ids to write")
            write_pair(partial, path, about)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise GlassError(f"{path}: cannot be written ({error.strerror or error})") from None
    return open_tokens(path, verify=False)


def write_ids(file: BinaryIO, pieces: Iterable[Piece], tokenizer: TokenizerFacts) -> dict[str, Any]:
    """All ids to the file and to the disk -> what the sidecar will say of them."""
    name = "uint16" if tokenizer.vocab_size <= SMALL_VOCABULARY else "uint32"
    digest, count, starts = hashlib.sha256(), 0, [0]
    for ids, begins in pieces:
        require_inside(ids, tokenizer.vocab_size)
        if begins and count > starts[-1]:  # what has no ids is no document
            starts.append(count)
        raw = ids.astype(DTYPES[name]).tobytes()
        file.write(raw)
        digest.update(raw)
        count += len(ids)
    if count == starts[-1] > 0:  # nothing came after the last beginning
        starts.pop()
    file.flush()
    os.fsync(file.fileno())
    return {
        "format": FORMAT,
        "tokenizer": asdict(tokenizer),
        "dtype": name,
        "count": count,
        "sha256": digest.hexdigest(),
        "starts": starts,
    }


def write_pair(partial: Path, path: Path, about: dict[str, Any]) -> None:
    """Put tokens and sidecar in place, the sidecar last: without one, tokens count as absent."""
    sidecar = path.with_suffix(".json")
    described = sidecar.with_name(f".{sidecar.name}.{os.getpid()}")
    try:
        described.write_text(json.dumps(about), encoding="utf-8")
        sidecar.unlink(missing_ok=True)
        os.replace(partial, path)
        os.replace(described, sidecar)
    finally:
        described.unlink(missing_ok=True)


def require_inside(ids: NDArray[Any], vocab_size: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        bad = next(int(id) for id in ids if not 0 <= id < vocab_size)
        raise GlassError(f"id {bad} is outside the vocabulary of {vocab_size}")


def open_tokens(path: Path, *, verify: bool = True) -> Tokens:
    """Map the ids and check that both files belong together; `verify` reads them all once.

    Raises FormatError: what is missing, damaged or of another kind.
    """
    about = read_sidecar(path.with_suffix(".json"))
    dtype, count = about.dtype, about.count
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        came = "is missing" if size is None else f"has {size} bytes"
        raise FormatError(
            f"{path}: {came}, its sidecar says {count} ids of {dtype.itemsize}; tokenize again"
        )
    if verify and (found := file_hash(path)) != about.sha256:
        raise FormatError(
            f"{path}: sha256 is {found}, its sidecar says {quoted(about.sha256)}; tokenize again"
        )
    return Tokens(
        path=path,
        ids=np.memmap(path, dtype, mode="r"),
        starts=about.starts,
        tokenizer=about.tokenizer,
        sha256=about.sha256,
    )


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What tokens.json says, every field as `write_ids` writes it."""

    dtype: np.dtype[Any]
    count: int
    sha256: str
    starts: NDArray[np.int64]  # (documents,), growing from 0, less than `count`
    tokenizer: TokenizerFacts


def read_sidecar(sidecar: Path) -> Sidecar:
    """Raises FormatError: missing, no JSON, or a field that cannot be."""
    try:
        about = json.loads(sidecar.read_bytes())
    except OSError as error:
        raise FormatError(f"{sidecar}: {error.strerror or error}; tokenize again") from None
    except (ValueError, RecursionError) as error:
        reason = str(error)[:QUOTED_CHARACTERS]
        raise FormatError(f"{sidecar}: not valid JSON ({reason}); tokenize again") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise FormatError(f"{sidecar}: expected a sidecar of format {FORMAT!r}; tokenize again")
    try:
        return checked_sidecar(Fields(str(sidecar), about, FormatError))
    except FormatError as error:
        raise FormatError(f"{error}; tokenize again") from None


def checked_sidecar(get: Fields) -> Sidecar:
    facts = get.object("tokenizer")
    dtype, count = get.text("dtype"), get.whole("count", most=MOST_IDS)
    if dtype not in DTYPES:
        get.refuse("dtype", " or ".join(DTYPES))
    starts = get.items("starts")
    if not (starts and starts[0] == 0 and all(map(is_whole, starts))):
        get.refuse("starts", "whole numbers from 0 on")
    if starts[-1] >= count or not all(a < b for a, b in pairwise(starts)):
        get.refuse("starts", f"numbers that grow and are less than the count of ids, {count}")
    return Sidecar(
        dtype=DTYPES[dtype],
        count=count,
        sha256=get.text("sha256"),
        starts=np.array(starts, np.int64),
        tokenizer=TokenizerFacts(
            name=facts.text("name"),
            vocab_size=facts.whole("vocab_size"),
            sha256=facts.text("sha256"),
        ),
    )


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
