"""Keys and values of the tokens already seen: pages of 64 tokens, taken as rows grow."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GenerationError
from glassllama.engine.pages import BFLOAT16, INT8, ITEM_BYTES, PAGE

CacheType = Literal["bf16", "int8"]
CACHE_KINDS: dict[CacheType, int] = {"bf16": BFLOAT16, "int8": INT8}
SCALE_BYTES = 4


def bytes_per_token(config: LlamaConfig, kind: int) -> int:
    """Memory of one token's keys and values in all layers; scales come with int8."""
    head = config.head_dim * ITEM_BYTES[kind] + (SCALE_BYTES if kind == INT8 else 0)
    return 2 * config.n_layers * config.n_kv_heads * head


class PagedCache:
    """The engine's cache: `table` (B, pages) int64 holds the address of every row's pages.

    Memory is taken page by page, so that a long context costs nothing until it is used.
    """

    def __init__(self, config: LlamaConfig, batch: int, max_len: int, kind: int) -> None:
        self.max_len = max_len
        self.lengths = [0] * batch
        self.kind = kind  # of its numbers: pages.BFLOAT16, FLOAT32, INT8
        self.page_bytes = PAGE * bytes_per_token(config, kind)
        self._pages: list[list[NDArray[np.generic]]] = [[] for _ in range(batch)]
        self.table = np.zeros((batch, -(-max_len // PAGE)), np.int64)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory taken so far."""
        return sum(page.nbytes for pages in self._pages for page in pages)

    def reserve(self, row: int, length: int) -> None:
        """See to it that the row has pages for `length` tokens; GenerationError if it may not."""
        if length > self.max_len:
            raise GenerationError(
                f"context full: row {row} would have {length} tokens, the cache holds "
                f"{self.max_len}; ask for a longer context or a shorter text"
            )
        pages = self._pages[row]
        while len(pages) * PAGE < length:
            page = np.zeros(self.page_bytes, np.uint8)
            self.table[row, len(pages)] = page.ctypes.data
            pages.append(page)

    def truncate(self, row: int, length: int) -> None:
        """Forget all after the first `length` tokens of a row, and give their pages back."""
        if not 0 <= length <= self.lengths[row]:
            raise GenerationError(
                f"truncate: row {row} has {self.lengths[row]} tokens, cannot keep {length}"
            )
        self.lengths[row] = length
        del self._pages[row][-(-length // PAGE) :]
