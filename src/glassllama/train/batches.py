"""Which ids a training step sees: a pure function of (seed, step), whoever asks.

The corpus is cut into windows of `context` tokens, where the grid of cuts begins at random, and the
windows are shuffled: in one epoch (almost) every token is seen once. The next epoch has another
grid and another order. So a run that resumes at step n goes on with the very same batches, and any
number of workers, each taking its rows, sees the same stream as one.

Shapes: B rows, T tokens of a window (the context).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import ConfigError, GlassError
from glassllama.train.tokens import Tokens

IGNORED = -100  # a target that counts for nothing: what PyTorch's cross-entropy leaves out


class Batch(NamedTuple):
    """Inputs and what should follow each: targets[b, t] is the id after ids[b, t]."""

    ids: NDArray[np.int64]  # (B, T)
    targets: NDArray[np.int64]  # (B, T); IGNORED where the next token begins another document
    segments: NDArray[np.int64] | None  # (B, T) numbers the documents of a row; None: only one


class Grid(NamedTuple):
    """One epoch: where its windows begin, in the order in which they are seen."""

    epoch: int
    starts: NDArray[np.int64]


@dataclass
class Batches:
    """The batches of a training run; `batch` counts the rows of all workers together.

    Raises GlassError where the corpus is shorter than one window.
    """

    tokens: Tokens
    context: int
    batch: int
    seed: int
    _grid: Grid | None = field(default=None, init=False, repr=False)  # the last one, remembered

    def __post_init__(self) -> None:
        if self.context < 1 or self.batch < 1:
            raise ConfigError(
                f"context and batch must be positive, got {self.context} and {self.batch}"
            )
        require_window(self.tokens, self.context)

    @property
    def windows(self) -> int:
        """Windows of an epoch: one less than would fit, so that the grid can begin anywhere."""
        return max(1, (len(self.tokens) - 1) // self.context - 1)

    def at(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of step `step` (from 0) that worker `rank` of `world` computes.

        Raises ConfigError where the batch cannot be shared out evenly.
        """
        if self.batch % world or not 0 <= rank < world:
            raise ConfigError(f"a batch of {self.batch} cannot be shared by {rank=} of {world=}")
        share = self.batch // world
        first = step * self.batch + rank * share
        return windows_at(self.tokens, self.windows_from(first, share), self.context)

    def windows_from(self, first: int, count: int) -> NDArray[np.int64]:
        """Where `count` windows of the run begin in the corpus, from the first-th on, (count,)."""
        pieces: list[NDArray[np.int64]] = []
        while count > 0:
            epoch, place = divmod(first, self.windows)
            if self._grid is None or self._grid.epoch != epoch:
                self._grid = self.grid(epoch)
            pieces.append(self._grid.starts[place : place + count])
            first, count = first + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def grid(self, epoch: int) -> Grid:
        chance = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        room = len(self.tokens) - 1 - self.windows * self.context
        offset = chance.integers(room, endpoint=True)
        return Grid(epoch, offset + self.context * chance.permutation(self.windows))


def windows_at(tokens: Tokens, starts: NDArray[np.int64], context: int) -> Batch:
    """The windows that begin there, (B,) -> a batch of (B, context)."""
    places = starts[:, None] + np.arange(context + 1)  # (B, T+1)
    ids = tokens.ids[places].astype(np.int64)
    if tokens.documents == 1:
        return Batch(ids[:, :-1], ids[:, 1:], None)
    documents = np.searchsorted(tokens.starts, places, side="right")  # (B, T+1)
    documents -= documents[:, :1]  # small numbers, from 0 in every row
    same = documents[:, 1:] == documents[:, :-1]
    return Batch(ids[:, :-1], np.where(same, ids[:, 1:], IGNORED), documents[:, :-1])


def bytes_of_batch(tokens: Tokens, rows: int, context: int) -> int:
    """What `windows_at` holds at its peak: places, and what the file has there, of T + 1 tokens.

    Then the ids; of several documents also their numbers, where these are equal, and the targets.
    """
    token = np.dtype(np.int64).itemsize
    arrays = 2 * token + tokens.ids.itemsize
    if tokens.documents > 1:
        arrays += 2 * token + np.dtype(np.bool_).itemsize
    return rows * (context + 1) * arrays


def every_window(tokens: Tokens, context: int, batch: int) -> Iterator[Batch]:
    """The whole corpus in order: every target exactly once. For validation.

    The last window overlaps the one before, and what was a target there is IGNORED here. Raises
    GlassError where the corpus is shorter than one window.
    """
    require_window(tokens, context)
    last = len(tokens) - 1 - context
    starts = np.append(np.arange(0, last, context), last)  # (windows,)
    for first in range(0, len(starts), batch):
        some = starts[first : first + batch]
        rows = windows_at(tokens, some, context)
        if some[-1] == last and len(starts) > 1:
            seen = starts[-2] + context - last
            targets = rows.targets.copy()  # a view of what the inputs are a view of
            targets[-1, :seen] = IGNORED
            rows = rows._replace(targets=targets)
        yield rows


def require_window(tokens: Tokens, context: int) -> None:
    if len(tokens) <= context:
        raise GlassError(
            f"{tokens.path}: {len(tokens)} tokens are too few for a context of {context} (and one "
            "more to predict); take a shorter context or more text"
        )
