"""Keys and values of the tokens already seen: pages of 64 tokens, taken as rows grow.

A page knows its ids and the page before it, so the pages of all caches of an engine are a tree of
texts. A row that begins as another one did finds that beginning there: whole pages are shared, of
the page where the two part the row gets a copy. What no row uses any more is gone at once: the tree
refers to its pages weakly, so that no code runs when a cache goes, in which a Ctrl-C would be lost.

An exception may come between any two steps of Python's interpreter. So what a row consists of is
its list of pages and its length; each changes in a single step, and the rest follows from them: how
many rows use a page, the table of addresses. Pages behind the length, and ids in the last page
behind it, mean nothing, and are removed before the row grows again.
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
from glassllama.base.turn import Turn, in_turn
from glassllama.engine.kv_pages import FLOAT32, INT8, INT16, ITEM_BYTES, PAGE
from glassllama.engine.layout import zeros

T = TypeVar("T")

CACHE_KINDS: dict[CacheType, int] = {"int16": INT16, "int8": INT8}
WORTH_WAITING = 32  # ids in common with a row of the same batch: it goes first, others find them


def bytes_per_token(config: LlamaConfig, kind: int) -> int:
    """Memory of one token's keys and values in all layers; integers come with scales."""
    return kv_bytes(config, ITEM_BYTES[kind], CACHE_SCALE if kind != FLOAT32 else 0)


def living(references: Iterable[weakref.ref[T]]) -> list[T]:
    return [thing for reference in references if (thing := reference()) is not None]


class Row(list["Page"]):
    """The pages of a row of a cache. Not a plain list, which cannot be referred to weakly."""


@dataclass(eq=False)
class Page:
    """Up to 64 tokens that follow those of the page before. Whole pages may have many users."""

    memory: NDArray[np.uint8]
    before: Page | None = None
    number: int = -1  # in its rows
    ids: list[int] = field(default_factory=list)
    _users: list[weakref.ref[Row]] = field(default_factory=list)  # now or at some time
    _after: list[weakref.ref[Page]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.address: int = self.memory.ctypes.data

    @property
    def after(self) -> list[Page]:
        return living(self._after)

    def put_after(self, page: Page) -> None:
        self._after = [weakref.ref(other) for other in (*self.after, page)]

    def users(self) -> list[Row]:
        """Rows that have this page now."""
        n, rows = self.number, {id(row): row for row in living(self._users)}
        return [row for row in rows.values() if len(row) > n and row[n] is self]

    def used_by(self, row: Row) -> None:
        self._users = [weakref.ref(other) for other in (*self.users(), row)]


class Pages:
    """The pages of all caches of one engine. `root` is the empty beginning of every text."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.root = Page(zeros(np.uint8, 0))
        self.turn = Turn()  # of all that changes pages or rows, and of the engine's steps

    def new(self, before: Page) -> Page:
        """An empty page after another. All zeros: weight 0 times what is never written is 0."""
        page = Page(zeros(np.uint8, self.page_bytes), before, before.number + 1)
        before.put_after(page)
        return page

    def copy(self, page: Page, count: int) -> Page:
        """A page of one's own with the first `count` tokens of another."""
        assert page.before is not None
        fresh = self.new(page.before)
        fresh.memory[:] = page.memory
        fresh.ids = page.ids[:count]
        return fresh


class PagedCache:
    """The engine's cache: `table` (B, pages) int64 holds the address of every row's pages.

    Memory is taken page by page, so that a long context costs nothing until it is used.
    """

    def __init__(self, pages: Pages, batch: int, max_len: int, kind: int) -> None:
        self.max_len = max_len
        self.lengths = [0] * batch
        self.kind = kind  # of its numbers: pages.INT16, FLOAT32, INT8
        self.recalled = 0  # tokens that were found instead of computed
        self.turn = pages.turn
        self._all = pages
        self._pages = [Row() for _ in range(batch)]
        self.table = zeros(np.int64, batch, 1)  # as wide as the longest row so far, or up to twice
        self._table_is_good = True

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory taken so far; what rows share counts once."""
        distinct = {id(page): page.memory.nbytes for pages in self._pages for page in pages}
        return sum(distinct.values())

    def require_room(self, row: int, more: int) -> None:
        """Raise GenerationError if the row may not grow by so many tokens."""
        length = self.lengths[row] + more
        if length > self.max_len:
            raise GenerationError(
                f"context full: row {row} would have {length} tokens, the cache holds "
                f"{self.max_len}; ask for a longer context or a shorter text"
            )

    def reserve(self, row: int, length: int) -> None:
        """See to it that the row has pages for `length` tokens, and that its last is its own."""
        if not self._table_is_good:
            for every in range(self.batch):
                self._write_table(every)
            self._table_is_good = True
        self._cut(row)
        pages, used = self._pages[row], self.lengths[row] % PAGE
        if used and len(pages[-1].ids) > used:
            self._own_last(row, used)
        while len(pages) * PAGE < length:
            page = self._all.new(pages[-1] if pages else self._all.root)
            self._replace(row, len(pages), [page])

    def remember(self, row: int, ids: Sequence[int]) -> None:
        """The row has grown by these tokens, whose keys and values are in its pages now."""
        past, pages = self.lengths[row], self._pages[row]
        length = past + len(ids)
        for n in range(past // PAGE, -(-length // PAGE)):
            first = max(past, n * PAGE)
            pages[n].ids[first - n * PAGE :] = ids[first - past : (n + 1) * PAGE - past]
        self.lengths[row] = length
        for n in range(past // PAGE, length // PAGE):
            self._unite(row, n)

    @in_turn
    def truncate(self, row: int, length: int) -> None:
        """Forget all after the first `length` tokens of a row, and give their pages back."""
        if not 0 <= length <= self.lengths[row]:
            raise GenerationError(
                f"truncate: row {row} has {self.lengths[row]} tokens, cannot keep {length}"
            )
        self.lengths[row] = length
        self._cut(row)

    def go_back(self, lengths: list[int]) -> None:
        """Forget what a call that did not come to its end has added to the rows."""
        self.lengths[:] = lengths
        for row in range(self.batch):
            self._cut(row)

    def next_to_feed(
        self, rest: list[list[int]], waiting: list[int]
    ) -> tuple[list[int], list[int]]:
        """Which of the waiting rows to feed now -> (they, those who wait for their pages).

        What the tree already has of a row's new ids is taken over and leaves `rest[row]`, all but
        the last: someone wants its logits.
        """
        if all(len(rest[row]) == 1 for row in waiting):
            return waiting, []
        for row in waiting:
            del rest[row][: self._recall(row, rest[row])]
        now: list[int] = []
        later: list[int] = []
        for row in waiting:
            (later if any(self._alike(rest, row, other) for other in now) else now).append(row)
        return now, later

    def _alike(self, rest: list[list[int]], row: int, other: int) -> bool:
        """Whether two rows have seen the same and go on with the same ids, for a while."""
        if min(len(rest[row]), len(rest[other])) <= WORTH_WAITING:
            return False
        start, mine, theirs = slice(WORTH_WAITING), self._last(row), self._last(other)
        used = self.lengths[row] % PAGE
        in_page = used > 0 and mine.before is theirs.before and mine.ids[:used] == theirs.ids[:used]
        same_past = self.lengths[row] == self.lengths[other] and (mine is theirs or in_page)
        return same_past and rest[row][start] == rest[other][start]

    def _last(self, row: int) -> Page:
        return self._pages[row][-1] if self._pages[row] else self._all.root

    def _recall(self, row: int, ids: list[int]) -> int:
        """Take over what the tree has of `ids`, but for the last -> how many tokens."""
        self._cut(row)
        used, pages = self.lengths[row] % PAGE, self._pages[row]
        own = pages[-1:] if used else []  # not full: perhaps there is a page with more
        text = [*own[0].ids[:used], *ids[:-1]] if own else ids[:-1]
        found = find(own[0].before if own else self._last(row), text)
        known = sum(count for _, count in found) - used
        if known <= 0:
            return 0
        taken = [page if count == PAGE else self._all.copy(page, count) for page, count in found]
        self._replace(row, len(pages) - len(own), taken)
        self.lengths[row] += known
        self.recalled += known
        return known

    def _unite(self, row: int, n: int) -> None:
        """If another row has filled a page alike, to the bit, both go on with that one."""
        pages = self._pages[row]
        page, before = pages[n], pages[n].before
        alike = [p for p in before.after if p.ids == page.ids] if before is not None else []
        twin = next((p for p in alike if p is not page), None)
        if twin is None:
            return
        for following in pages[n + 1 : n + 2]:  # reserved already
            following.before = twin
            twin.put_after(following)
        self._replace(row, n, [twin, *pages[n + 1 :]])

    def _replace(self, row: int, first: int, pages: list[Page]) -> None:
        """The row's pages from number `first` on become these, and no others."""
        own = self._pages[row]
        for page in pages:
            page.used_by(own)
        self._table_is_good = False
        own[first:] = pages
        self._write_table(row, first)
        self._table_is_good = True

    def _write_table(self, row: int, first: int = 0) -> None:
        """Addresses of the row's pages from number `first` on."""
        pages, columns = self._pages[row], self.table.shape[1]
        if len(pages) > columns:
            wider = zeros(np.int64, self.batch, max(len(pages), 2 * columns))
            wider[:, :columns] = self.table
            self.table = wider
        self.table[row, first : len(pages)] = [page.address for page in pages[first:]]

    def _cut(self, row: int) -> None:
        """Give back pages behind the row's length."""
        needed = -(-self.lengths[row] // PAGE)
        if len(self._pages[row]) > needed:
            self._replace(row, needed, [])

    def _own_last(self, row: int, used: int) -> None:
        """Before the row writes where its last page holds other tokens: they are forgotten, or, if
        other rows use them, the row goes on in a copy."""
        page = self._pages[row][-1]
        if len(page.users()) == 1:
            del page.ids[used:]
        else:
            self._replace(row, page.number, [self._all.copy(page, used)])


def find(before: Page | None, text: list[int]) -> list[tuple[Page, int]]:
    """Pages that hold the beginning of a text which follows `before` -> (page, how many ids)."""
    found: list[tuple[Page, int]] = []
    while before is not None:
        ids = text[len(found) * PAGE :][:PAGE]
        counts = {page: agreement(ids, page.ids) for page in [*before.after]}
        before, count = max(counts.items(), key=lambda item: item[1], default=(None, 0))
        if before is None or count == 0:
            break
        found.append((before, count))
        if count < PAGE:
            break
    return found


def agreement(ids: list[int], others: list[int]) -> int:
    """How many ids two texts have in common, from their first on."""
    differ = (
        n for n, (mine, theirs) in enumerate(zip(ids, others, strict=False)) if mine != theirs
    )
    return next(differ, min(len(ids), len(others)))
