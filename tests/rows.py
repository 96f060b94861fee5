"""Helper for tests: several sequences of one executor that are computed together, as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from glassllama.base.interfaces import Executor, NewTokens


class Rows:
    """A cache with `count` sequences."""

    def __init__(self, executor: Executor, count: int = 1) -> None:
        self.executor, self.cache = executor, executor.new_cache()
        self.sequences = [self.cache.add() for _ in range(count)]

    @property
    def lengths(self) -> list[int]:
        return [self.cache.length(sequence) for sequence in self.sequences]

    @property
    def reused(self) -> int:
        return sum(map(self.cache.reused, self.sequences))

    @property
    def nbytes(self) -> int:
        cache: Any = self.cache
        return int(cache.nbytes)

    def truncate(self, row: int, length: int) -> None:
        self.cache.rewind(self.sequences[row], length)

    def next_logits(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Append new ids to each row (possibly none) -> (B, V) logits after its last; 0 for
        none."""
        assert len(ids) == len(self.sequences)
        fed = [row for row, new in enumerate(ids) if len(new)]
        out = np.zeros((len(ids), self.executor.config.vocab_size), np.float32)
        if fed:
            batch = [NewTokens(self.sequences[row], ids[row]) for row in fed]
            out[fed] = self.executor.forward(batch, self.cache)
        return out

    def all_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Append ids to the only row -> (T, V) logits after each of its new ids."""
        (sequence,) = self.sequences
        return self.executor.forward([NewTokens(sequence, ids, "all")], self.cache)
