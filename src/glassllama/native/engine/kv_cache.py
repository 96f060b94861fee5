"""The KV cache: keys and values of past tokens in pages of 64 tokens, allocated as rows grow.

A page knows its ids and its parent, the page before it, so the pages of all caches of an engine are
a tree of texts. A row whose beginning is in the tree shares the whole pages of that beginning; of
the page in which the two texts part, it gets a copy. Pages that no row uses are freed at once: the
tree refers to its pages weakly, so that no Python code runs when a cache is freed, in which a
KeyboardInterrupt would be lost.

An exception may come between any two steps of Python's interpreter. So the state of a row is its
list of pages and its length; each changes in a single step, and everything else follows from them:
which rows use a page, the page table. Pages after the length, and ids in the last page after it,
have no meaning, and are removed before the row grows again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig, kv_bytes
from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import CACHE_SCALE, CacheType
from glassllama.base.locks import NonReentrantLock, synchronized
from glassllama.native.engine.kv_pages import FLOAT32, INT8, INT16, ITEM_BYTES, PAGE
from glassllama.native.engine.layout import zeros

T = TypeVar("T")

CACHE_KINDS: dict[CacheType, int] = {"int16": INT16, "int8": INT8}
MIN_SHARED = 32  # ids in common with another row of the batch: that one is fed first, for both


def bytes_per_token(config: LlamaConfig, kv_type: int) -> int:
    """Memory of one token's keys and values in all layers; integers have scales besides."""
    return kv_bytes(config, ITEM_BYTES[kv_type], CACHE_SCALE if kv_type != FLOAT32 else 0)


def living(references: Iterable[weakref.ref[T]]) -> list[T]:
    return [thing for reference in references if (thing := reference()) is not None]


class Row(list["Page"]):
    """The pages of a row of a cache. A plain list cannot be referred to weakly."""


@dataclass(eq=False)
class Page:
    """Up to 64 tokens that follow those of the parent page. Full pages may belong to many rows."""

    memory: NDArray[np.uint8]
    parent: Page | None = None
    number: int = -1  # in its rows
    ids: list[int] = field(default_factory=list)
    _rows: list[weakref.ref[Row]] = field(default_factory=list)  # that have or had this page
    _children: list[weakref.ref[Page]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.address: int = self.memory.ctypes.data

    @property
    def children(self) -> list[Page]:
        return living(self._children)

    def add_child(self, page: Page) -> None:
        self._children = [weakref.ref(other) for other in (*self.children, page)]

    def rows(self) -> list[Row]:
        """The rows that have this page now."""
        n, rows = self.number, {id(row): row for row in living(self._rows)}
        return [row for row in rows.values() if len(row) > n and row[n] is self]

    def add_row(self, row: Row) -> None:
        self._rows = [weakref.ref(other) for other in (*self.rows(), row)]


class Pages:
    """The pages of all caches of one engine. `root` is the empty beginning of every text."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.root = Page(zeros(np.uint8, 0))
        # Taken while pages or rows change, and during the engine's steps.
        self.lock = NonReentrantLock()

    def new(self, parent: Page) -> Page:
        """An empty page. All zeros: weight 0 times a value that was never written must be 0."""
        page = Page(zeros(np.uint8, self.page_bytes), parent, parent.number + 1)
        parent.add_child(page)
        return page

    def copy(self, page: Page, count: int) -> Page:
        """A new page with the first `count` tokens of another one."""
        assert page.parent is not None
        fresh = self.new(page.parent)
        fresh.memory[:] = page.memory
        fresh.ids = page.ids[:count]
        return fresh


class PagedCache:
    """The engine's cache: `table` (B, pages) int64 holds the addresses of every row's pages.

    Memory is allocated page by page, so that a long context costs nothing until it is used.
    """

    def __init__(self, pages: Pages, batch: int, max_len: int, kind: int) -> None:
        self.max_len = max_len
        self.lengths = [0] * batch
        self.kind = kind  # of its numbers: kv_pages.INT16, FLOAT32, INT8
        self.cached_tokens = 0  # tokens that were found in the tree instead of computed
        self.lock = pages.lock
        self._all = pages
        self._pages = [Row() for _ in range(batch)]
        self.table = zeros(np.int64, batch, 1)  # as wide as the longest row so far, or up to twice
        self._table_is_good = True

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory allocated so far; shared pages count once."""
        distinct = {id(page): page.memory.nbytes for pages in self._pages for page in pages}
        return sum(distinct.values())

    def require_room(self, row: int, more: int) -> None:
        """Raise GenerationError if the row may not grow by that many tokens."""
        length = self.lengths[row] + more
        if length > self.max_len:
            raise GenerationError(
                f"context full: row {row} would have {length} tokens, the cache holds "
                f"{self.max_len}; ask for a longer context or a shorter text"
            )

    def reserve(self, row: int, length: int) -> None:
        """Give the row pages for `length` tokens, and a last page that no other row uses."""
        if not self._table_is_good:
            for every in range(self.batch):
                self._write_table(every)
            self._table_is_good = True
        self._cut(row)
        pages, used = self._pages[row], self.lengths[row] % PAGE
        if used and len(pages[-1].ids) > used:
            self._copy_on_write(row, used)
        while len(pages) * PAGE < length:
            page = self._all.new(pages[-1] if pages else self._all.root)
            self._replace(row, len(pages), [page])

    def commit(self, row: int, ids: Sequence[int]) -> None:
        """Add tokens to the row whose keys and values have been written to its pages."""
        past, pages = self.lengths[row], self._pages[row]
        length = past + len(ids)
        for n in range(past // PAGE, -(-length // PAGE)):
            first = max(past, n * PAGE)
            pages[n].ids[first - n * PAGE :] = ids[first - past : (n + 1) * PAGE - past]
        self.lengths[row] = length
        for n in range(past // PAGE, length // PAGE):
            self._deduplicate(row, n)

    @synchronized
    def truncate(self, row: int, length: int) -> None:
        """Forget all tokens of a row after the first `length`, and free their pages."""
        if not 0 <= length <= self.lengths[row]:
            raise GenerationError(
                f"truncate: row {row} has {self.lengths[row]} tokens, cannot keep {length}"
            )
        self.lengths[row] = length
        self._cut(row)

    def roll_back(self, lengths: list[int]) -> None:
        """Forget what a call that was interrupted has added to the rows."""
        self.lengths[:] = lengths
        for row in range(self.batch):
            self._cut(row)

    def next_to_feed(
        self, rest: list[list[int]], waiting: list[int]
    ) -> tuple[list[int], list[int]]:
        """Which of the waiting rows to feed now -> (these rows, rows that wait for their pages).

        The new ids of a row that are in the tree already are removed from `rest[row]`; the last id
        is always left, because its logits are wanted.
        """
        if all(len(rest[row]) == 1 for row in waiting):
            return waiting, []
        for row in waiting:
            del rest[row][: self._match_prefix(row, rest[row])]
        now: list[int] = []
        later: list[int] = []
        for row in waiting:
            (later if any(self._shares(rest, row, other) for other in now) else now).append(row)
        return now, later

    def _shares(self, rest: list[list[int]], row: int, other: int) -> bool:
        """Whether two rows have the same past and continue with the same MIN_SHARED ids."""
        if min(len(rest[row]), len(rest[other])) <= MIN_SHARED:
            return False
        start, a, b = slice(MIN_SHARED), self._last(row), self._last(other)
        used = self.lengths[row] % PAGE
        in_page = used > 0 and a.parent is b.parent and a.ids[:used] == b.ids[:used]
        same_past = self.lengths[row] == self.lengths[other] and (a is b or in_page)
        return same_past and rest[row][start] == rest[other][start]

    def _last(self, row: int) -> Page:
        return self._pages[row][-1] if self._pages[row] else self._all.root

    def _match_prefix(self, row: int, ids: list[int]) -> int:
        """Use the pages of the tree that begin with `ids`, but for the last -> how many tokens."""
        self._cut(row)
        used, pages = self.lengths[row] % PAGE, self._pages[row]
        own = pages[-1:] if used else []  # not full: another page may continue it
        text = [*own[0].ids[:used], *ids[:-1]] if own else ids[:-1]
        found = find_prefix(own[0].parent if own else self._last(row), text)
        known = sum(count for _, count in found) - used
        if known <= 0:
            return 0
        taken = [page if count == PAGE else self._all.copy(page, count) for page, count in found]
        self._replace(row, len(pages) - len(own), taken)
        self.lengths[row] += known
        self.cached_tokens += known
        return known

    def _deduplicate(self, row: int, n: int) -> None:
        """If another row has filled a page with the same ids, use that one (bit-identical)."""
        pages = self._pages[row]
        page, parent = pages[n], pages[n].parent
        equal = [p for p in parent.children if p.ids == page.ids] if parent is not None else []
        twin = next((p for p in equal if p is not page), None)
        if twin is None:
            return
        for following in pages[n + 1 : n + 2]:  # reserved already
            following.parent = twin
            twin.add_child(following)
        self._replace(row, n, [twin, *pages[n + 1 :]])

    def _replace(self, row: int, first: int, pages: list[Page]) -> None:
        """Replace the row's pages from number `first` on by these."""
        own = self._pages[row]
        for page in pages:
            page.add_row(own)
        self._table_is_good = False
        own[first:] = pages
        self._write_table(row, first)
        self._table_is_good = True

    def _write_table(self, row: int, first: int = 0) -> None:
        """Write the addresses of the row's pages from number `first` on."""
        pages, columns = self._pages[row], self.table.shape[1]
        if len(pages) > columns:
            wider = zeros(np.int64, self.batch, max(len(pages), 2 * columns))
            wider[:, :columns] = self.table
            self.table = wider
        self.table[row, first : len(pages)] = [page.address for page in pages[first:]]

    def _cut(self, row: int) -> None:
        """Free pages after the row's length."""
        needed = -(-self.lengths[row] // PAGE)
        if len(self._pages[row]) > needed:
            self._replace(row, needed, [])

    def _copy_on_write(self, row: int, used: int) -> None:
        """Before the row writes into a last page that holds other tokens after its own.

        They are forgotten, or, if other rows use the page, the row continues in a copy.
        """
        page = self._pages[row][-1]
        if len(page.rows()) == 1:
            del page.ids[used:]
        else:
            self._replace(row, page.number, [self._all.copy(page, used)])


def find_prefix(parent: Page | None, text: list[int]) -> list[tuple[Page, int]]:
    """Pages that hold the beginning of a text which follows `parent` -> (page, how many ids)."""
    found: list[tuple[Page, int]] = []
    while parent is not None:
        ids = text[len(found) * PAGE :][:PAGE]
        counts = {page: shared_prefix(ids, page.ids) for page in [*parent.children]}
        parent, count = max(counts.items(), key=lambda item: item[1], default=(None, 0))
        if parent is None or count == 0:
            break
        found.append((parent, count))
        if count < PAGE:
            break
    return found


def shared_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two texts have in common from the beginning."""
    differ = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
