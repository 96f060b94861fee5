"""The keys and values of tokens already seen, so that they are not computed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glassllama.base.errors import GenerationError


class KVCache:
    """Room for `max_len` tokens in each of B rows; rows may be of different length.

    `keys` and `values` are (layers, B, K, max_len, D). A forward pass writes behind each row's
    `lengths[row]` tokens with `extend`, layer by layer, and moves on once, with `advance`.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * shape[1]

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def reserve(self, new: Sequence[int]) -> int:
        """How many tokens the fullest row will have after `new` more -> S.

        Raises GenerationError if a row has no room.
        """
        after = [length + n for length, n in zip(self.lengths, new, strict=True)]
        if max(after) > self.max_len:
            raise GenerationError(f"the cache holds {self.max_len} tokens, {max(after)} are needed")
        return max(after)

    def extend(self, layer: int, k: Tensor, v: Tensor, new: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Write row b's first `new[b]` of (B, K, T, D) and return all (B, K, S, D), old and new."""
        for kept, fresh in ((self.keys[layer], k), (self.values[layer], v)):
            if len(set(new)) == len(set(self.lengths)) == 1:  # all rows alike: one copy
                kept[:, :, self.lengths[0] : self.lengths[0] + new[0]] = fresh[:, :, : new[0]]
            else:
                for row, (start, n) in enumerate(zip(self.lengths, new, strict=True)):
                    kept[row, :, start : start + n] = fresh[row, :, :n]
        seen = self.reserve(new)
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]  # (B, K, S, D)

    def advance(self, new: Sequence[int]) -> None:
        """Count the tokens that every layer has now written."""
        self.lengths = [length + n for length, n in zip(self.lengths, new, strict=True)]

    def truncate(self, row: int, length: int) -> None:
        """Forget what row `row` has seen after `length` tokens."""
        if not 0 <= length <= self.lengths[row]:
            raise GenerationError(f"row {row} has {self.lengths[row]} tokens, not {length}")
        self.lengths[row] = length
