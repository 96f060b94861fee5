"""Token ids of a corpus on disk, memory-mapped for training, and the batches of a run.

Two files: `train.bin`, the ids one after another, little endian, 16 bits each if the vocabulary
allows it, else 32; and `train.json`, which describes them: their number, where documents start, and
their sha256.

Batches are a pure function of seed and step. The corpus is cut into windows of `context` tokens,
with a random offset of the first cut, and the windows are shuffled: in an epoch (almost) every
token is seen once. The next epoch has another offset and another order. So a run that resumes at
step n gets the same batches as one that was not interrupted, and any number of ranks, each taking
its rows, see the same stream as one process.

Shapes: B rows, T tokens of a window (the context).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import QUOTED_CHARACTERS, ConfigError, FormatError, GlassError
from glassllama.base.fields import Fields, is_integer

FORMAT = "glassllama tokens 1"
MAX_IDS = 2**62  # of a file
SMALL_VOCABULARY = 1 << 16  # up to here an id fits 16 bits
IGNORED = -100  # a target that does not count: the `ignore_index` of PyTorch's cross-entropy
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Ids = NDArray[np.uint16] | NDArray[np.uint32]


class NoIdsError(GlassError):
    """There are no ids to write."""


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
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.starts)


def write_tokens(path: Path, pieces: Iterable[Piece], vocab_size: int) -> Tokens:
    """Write `path` (….bin) and its .json, with one piece at a time in memory.

    Both files appear when everything is written; what was there before stays until then. Raises
    GlassError: an id outside the vocabulary, no ids at all (NoIdsError), or a folder that cannot
    be written.
    """
    description = path.with_suffix(".json")
    new, new_description = (f.with_name(f".{f.name}.{os.getpid()}") for f in (path, description))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new.open("wb") as file:
                about = write_ids(file, pieces, vocab_size)
            if not about["count"]:
                raise NoIdsError(f"{path}: the corpus is empty: no ids to write")
            new_description.write_text(json.dumps(about), encoding="utf-8")
            description.unlink(missing_ok=True)  # ids without a description count as absent
            os.replace(new, path)
            os.replace(new_description, description)
        finally:
            new.unlink(missing_ok=True)
            new_description.unlink(missing_ok=True)
    except OSError as error:
        raise GlassError(f"{path}: cannot be written ({error.strerror or error})") from None
    return open_tokens(path)


def write_ids(file: BinaryIO, pieces: Iterable[Piece], vocab_size: int) -> dict[str, Any]:
    """Write all ids -> the content of the .json file."""
    name = "uint16" if vocab_size <= SMALL_VOCABULARY else "uint32"
    digest, count, starts = hashlib.sha256(), 0, [0]
    for ids, begins in pieces:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            bad = next(int(id) for id in ids if not 0 <= id < vocab_size)
            raise GlassError(f"id {bad} is outside the vocabulary of {vocab_size}")
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
    about = {"format": FORMAT, "dtype": name, "count": count, "starts": starts}
    return about | {"sha256": digest.hexdigest()}


def open_tokens(path: Path) -> Tokens:
    """Map the ids after checking that both files belong together.

    Raises FormatError: a file is missing, damaged or of another format.
    """
    try:
        return checked_tokens(path)
    except FormatError as error:
        raise FormatError(f"{error}; tokenize again") from None


def checked_tokens(path: Path) -> Tokens:
    get = read_description(path.with_suffix(".json"))
    name, count, sha256 = (
        get.text("dtype"),
        get.integer("count", maximum=MAX_IDS),
        get.text("sha256"),
    )
    if name not in DTYPES:
        get.refuse("dtype", " or ".join(DTYPES))
    starts, dtype = get.items("starts"), DTYPES[name]
    if not (starts and starts[0] == 0 and all(map(is_integer, starts))):
        get.refuse("starts", "whole numbers that begin with 0")
    if starts[-1] >= count or not all(a < b for a, b in pairwise(starts)):
        get.refuse("starts", f"increasing numbers below the number of ids, {count}")
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        came = "is missing" if size is None else f"has {size} bytes"
        raise FormatError(f"{path}: {came}, expected {count} ids of {dtype.itemsize} bytes")
    ids = np.memmap(path, dtype, mode="r")
    return Tokens(path=path, ids=ids, starts=np.array(starts, np.int64), sha256=sha256)


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


# --- batches --------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Inputs and targets: targets[b, t] is the id after ids[b, t]."""

    ids: NDArray[np.int64]  # (B, T)
    targets: NDArray[np.int64]  # (B, T); IGNORED where the next token begins another document
    segments: NDArray[np.int64] | None  # (B, T) number of the document; None: only one


@dataclass
class Batches:
    """The batches of a training run; `batch` counts the rows of all ranks together.

    Raises GlassError if the corpus is shorter than one window.
    """

    tokens: Tokens
    context: int
    batch: int
    seed: int
    _epoch: tuple[int, NDArray[np.int64]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require_window(self.tokens, self.context)

    @property
    def windows(self) -> int:
        """Windows of an epoch: one less than would fit, so that the offset can be anything."""
        return max(1, (len(self.tokens) - 1) // self.context - 1)

    def at(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of step `step` (from 0) for rank `rank` of `world`.

        Raises ConfigError if the batch cannot be shared evenly.
        """
        if self.batch % world or not 0 <= rank < world:
            raise ConfigError(f"a batch of {self.batch} cannot be shared by {rank=} of {world=}")
        share = self.batch // world
        first = step * self.batch + rank * share
        return windows_at(self.tokens, self.window_starts(first, share), self.context)

    def window_starts(self, first: int, count: int) -> NDArray[np.int64]:
        """Positions in the corpus of `count` windows of the run, from window `first`, (count,)."""
        pieces: list[NDArray[np.int64]] = []
        while count > 0:
            epoch, window = divmod(first, self.windows)
            if self._epoch is None or self._epoch[0] != epoch:
                self._epoch = (epoch, self.shuffled(epoch))
            pieces.append(self._epoch[1][window : window + count])
            first, count = first + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def shuffled(self, epoch: int) -> NDArray[np.int64]:
        """Where the windows of an epoch begin, in the order in which they are seen, (windows,)."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        unused = len(self.tokens) - 1 - self.windows * self.context
        offset = random.integers(unused, endpoint=True)
        return np.asarray(offset + self.context * random.permutation(self.windows))


def windows_at(tokens: Tokens, starts: NDArray[np.int64], context: int) -> Batch:
    """The windows that begin at `starts`, (B,) -> a batch of (B, context)."""
    positions = starts[:, None] + np.arange(context + 1)  # (B, T+1)
    ids = tokens.ids[positions].astype(np.int64)
    if tokens.documents == 1:
        return Batch(ids[:, :-1], ids[:, 1:], None)
    documents = np.searchsorted(tokens.starts, positions, side="right")  # (B, T+1)
    documents -= documents[:, :1]  # from 0 in every row
    same = documents[:, 1:] == documents[:, :-1]
    return Batch(ids[:, :-1], np.where(same, ids[:, 1:], IGNORED), documents[:, :-1])


def bytes_of_batch(tokens: Tokens, rows: int, context: int) -> int:
    """Peak memory of `windows_at`: positions, raw ids and ids of T + 1 tokens a row.

    With several documents also their numbers, the comparison, and the targets.
    """
    token = np.dtype(np.int64).itemsize
    arrays = 2 * token + tokens.ids.itemsize
    if tokens.documents > 1:
        arrays += 2 * token + np.dtype(np.bool_).itemsize
    return rows * (context + 1) * arrays


def every_window(tokens: Tokens, context: int, batch: int) -> Iterator[Batch]:
    """The whole corpus in order, for validation: every target exactly once.

    The last window overlaps the one before; targets that were in that one are IGNORED. Raises
    GlassError if the corpus is shorter than one window.
    """
    require_window(tokens, context)
    last = len(tokens) - 1 - context
    starts = np.append(np.arange(0, last, context), last)  # (windows,)
    for first in range(0, len(starts), batch):
        chosen = starts[first : first + batch]
        rows = windows_at(tokens, chosen, context)
        if chosen[-1] == last and len(starts) > 1:
            seen = starts[-2] + context - last
            targets = rows.targets.copy()  # it shares memory with the ids
            targets[-1, :seen] = IGNORED
            rows = rows._replace(targets=targets)
        yield rows


def require_window(tokens: Tokens, context: int) -> None:
    if len(tokens) <= context:
        raise GlassError(
            f"{tokens.path}: {len(tokens)} tokens are too few for a context of {context} (and one "
            "more to predict); take a shorter context or more text"
        )
