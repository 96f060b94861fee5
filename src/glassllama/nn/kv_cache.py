"""The keys and values of tokens already seen, so that they are not computed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.base.errors import GenerationError

FIRST_ROOM = 256  # tokens; doubled whenever it does not suffice


class KVCache:
    """Room for up to `max_len` tokens in each of B rows; rows may be of different length.

    `keys` and `values` are (layers, B, K, room, D), and grow with what is said. A forward pass
    writes behind each row's `lengths[row]` tokens with `extend`, layer by layer, and moves on once,
    with `advance`.
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
        shape = (n_layers, batch, n_kv_heads, min(FIRST_ROOM, max_len), head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch
        self.max_len = max_len

    def reserve(self, new: Sequence[int]) -> int:
        """Make room -> how many tokens the fullest row will have after `new` more: S.

        Raises GenerationError if a row would hold more than `max_len`.
        """
        needed = max(length + n for length, n in zip(self.lengths, new, strict=True))
        if needed > self.max_len:
            raise GenerationError(
                f"context full: {needed} tokens are needed, the cache holds {self.max_len}; "
                "ask for a longer context or a shorter text"
            )
        room = self.keys.shape[3]
        if needed > room:
            more = (0, 0, 0, min(max(needed, 2 * room), self.max_len) - room)
            # Both at once, whatever exception comes (Ctrl-C): (layers, B, K, room + more, D).
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        return needed

    def extend(self, layer: int, k: Tensor, v: Tensor, new: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Write row b's first `new[b]` of (B, K, T, D) and return all (B, K, S, D), old and new."""
        seen = self.reserve(new)
        for kept, fresh in ((self.keys[layer], k), (self.values[layer], v)):
            if len(set(new)) == len(set(self.lengths)) == 1:  # all rows alike: one copy
                kept[:, :, self.lengths[0] : self.lengths[0] + new[0]] = fresh[:, :, : new[0]]
            else:
                for row, (start, n) in enumerate(zip(self.lengths, new, strict=True)):
                    kept[row, :, start : start + n] = fresh[row, :, :n]
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]  # (B, K, S, D)

    def advance(self, new: Sequence[int]) -> None:
        """Count the tokens that every layer has now written."""
        self.lengths = [length + n for length, n in zip(self.lengths, new, strict=True)]

    def truncate(self, row: int, length: int) -> None:
        """Forget what row `row` has seen after `length` tokens."""
        if not 0 <= length <= self.lengths[row]:
            raise GenerationError(f"row {row} has {self.lengths[row]} tokens, not {length}")
        self.lengths[row] = length
