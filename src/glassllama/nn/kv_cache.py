"""KV cache of the PyTorch models: keys and values of past tokens."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.base.errors import GenerationError

FIRST_CAPACITY = 256  # tokens; doubled when it is full


class KVCache:
    """Keys and values of up to `max_len` tokens in each of B rows; rows may differ in length.

    `keys` and `values` are (layers, B, K, capacity, D); the capacity grows. A forward pass appends
    to each row with `extend`, layer by layer, and then updates `lengths` once, with `advance`.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (n_layers, batch, n_kv_heads, min(FIRST_CAPACITY, max_len), head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch
        self.max_len = max_len

    def reserve(self, new: Sequence[int]) -> int:
        """Grow if necessary -> the number of tokens of the longest row after `new` more: S.

        Raises GenerationError if a row would have more than `max_len` tokens.
        """
        needed = max(length + n for length, n in zip(self.lengths, new, strict=True))
        if needed > self.max_len:
            raise GenerationError(
                f"context full: {needed} tokens are needed, the cache holds {self.max_len}; "
                "ask for a longer context or a shorter text"
            )
        capacity = self.keys.shape[3]
        if needed > capacity:
            more = (0, 0, 0, min(max(needed, 2 * capacity), self.max_len) - capacity)
            # One statement, so that Ctrl-C cannot leave keys and values of different sizes:
            # (layers, B, K, capacity + more, D).
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        return needed

    def extend(self, layer: int, k: Tensor, v: Tensor, new: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Append the first `new[b]` of (B, K, T, D) to row b -> all keys, values (B, K, S, D)."""
        seen = self.reserve(new)
        for cached, fresh in ((self.keys[layer], k), (self.values[layer], v)):
            if (
                len(set(new)) == len(set(self.lengths)) == 1
            ):  # all rows have the same lengths: one copy
                cached[:, :, self.lengths[0] : self.lengths[0] + new[0]] = fresh[:, :, : new[0]]
            else:
                for row, (start, n) in enumerate(zip(self.lengths, new, strict=True)):
                    cached[row, :, start : start + n] = fresh[row, :, :n]
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]  # (B, K, S, D)

    def advance(self, new: Sequence[int]) -> None:
        """Add the number of new tokens to the lengths, after all layers have written them."""
        self.lengths = [length + n for length, n in zip(self.lengths, new, strict=True)]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row and remove the others."""
        if not 0 <= length <= self.lengths[row]:
            raise GenerationError(f"row {row} has {self.lengths[row]} tokens, not {length}")
        self.lengths[row] = length

    def copy(self) -> KVCache:
        """An independent cache with the same tokens."""
        other = copy(self)
        other.keys, other.values = self.keys.clone(), self.values.clone()
        other.lengths = [*self.lengths]
        return other
