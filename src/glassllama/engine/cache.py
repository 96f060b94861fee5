"""Keys and values of the tokens already seen: pages of 64 tokens, taken as rows grow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GenerationError
from glassllama.engine.attention import PAGE


class PagedCache:
    """The engine's cache: `table` (B, pages) int64 holds the address of every row's pages.

    Memory is taken page by page, so that a long context costs nothing until it is used.
    """

    def __init__(self, config: LlamaConfig, batch: int, max_len: int, *, wide: bool) -> None:
        self.max_len = max_len
        self.lengths = [0] * batch
        self.wide = wide  # float32 instead of bfloat16
        numbers = config.n_layers * config.n_kv_heads * config.head_dim * PAGE
        self.page_words = 2 * numbers  # keys, then values
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
            page = np.zeros(self.page_words, np.float32 if self.wide else np.uint16)
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
