"""The batches of a run: a pure function of seed and step.

The corpus is cut into windows of `context` tokens, with a random offset of the first cut, and the
windows are shuffled: in an epoch (almost) every token is seen once. The next epoch has another
offset and another order. So a run that resumes at step n gets the same batches as one that was not
interrupted, and any number of ranks, each taking its rows, see the same stream as one process.

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

IGNORED = -100  # a target that does not count: the `ignore_index` of PyTorch's cross-entropy


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
        if self.context < 1 or self.batch < 1:
            raise ConfigError(
                f"context and batch must be positive, got {self.context} and {self.batch}"
            )
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
            epoch, place = divmod(first, self.windows)
            if self._epoch is None or self._epoch[0] != epoch:
                self._epoch = (epoch, self.shuffled(epoch))
            pieces.append(self._epoch[1][place : place + count])
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
