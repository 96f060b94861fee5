"""Keys and values of the tokens already seen: pages of 64 tokens, taken as rows grow.

A page knows its ids and the page before it, so the pages of all caches of an engine are a tree of
texts. A row that begins as another one did finds that beginning there: whole pages are shared, of
the page where the two part the row gets a copy. What no row uses any more is gone at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig, kv_bytes
from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import CACHE_SCALE, CacheType
from glassllama.engine.pages import FLOAT32, INT8, INT16, ITEM_BYTES, PAGE

CACHE_KINDS: dict[CacheType, int] = {"int16": INT16, "int8": INT8}
WORTH_WAITING = 32  # ids in common with a row of the same batch: it goes first, others find them


def bytes_per_token(config: LlamaConfig, kind: int) -> int:
    """Memory of one token's keys and values in all layers; integers come with scales."""
    return kv_bytes(config, ITEM_BYTES[kind], CACHE_SCALE if kind != FLOAT32 else 0)


@dataclass(eq=False)
class Page:
    """Up to 64 tokens that follow those of the page before. Whole pages may have many users."""

    memory: NDArray[np.uint8]
    before: Page | None = None
    ids: list[int] = field(default_factory=list)
    users: int = 1  # rows
    after: set[Page] = field(default_factory=set)


class Pages:
    """The pages of all caches of one engine. `root` is the empty beginning of every text."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.root = Page(np.zeros(0, np.uint8))
        self.lock = threading.RLock()  # the collector may release pages anywhere

    def new(self, before: Page) -> Page:
        """An empty page after another. All zeros: weight 0 times what is never written is 0."""
        page = Page(np.zeros(self.page_bytes, np.uint8), before)
        with self.lock:
            before.after.add(page)
        return page

    def copy(self, page: Page, count: int) -> Page:
        """A page of one's own with the first `count` tokens of another."""
        assert page.before is not None
        fresh = self.new(page.before)
        fresh.memory[:] = page.memory
        fresh.ids = page.ids[:count]
        return fresh

    def release(self, pages: Sequence[Page]) -> None:
        """One user less; pages without users leave the tree."""
        with self.lock:
            for page in reversed(pages):
                page.users -= 1
                if page.users == 0 and page.before is not None:
                    page.before.after.discard(page)

    def release_rows(self, rows: list[list[Page]]) -> None:
        for pages in rows:
            self.release(pages)


class PagedCache:
    """The engine's cache: `table` (B, pages) int64 holds the address of every row's pages.

    Memory is taken page by page, so that a long context costs nothing until it is used.
    """

    def __init__(self, pages: Pages, batch: int, max_len: int, kind: int) -> None:
        self.max_len = max_len
        self.lengths = [0] * batch
        self.kind = kind  # of its numbers: pages.INT16, FLOAT32, INT8
        self.recalled = 0  # tokens that were found instead of computed
        self.table = np.zeros((batch, -(-max_len // PAGE)), np.int64)
        self.address: int = self.table.ctypes.data
        self._all = pages
        self._pages: list[list[Page]] = [[] for _ in range(batch)]
        weakref.finalize(self, pages.release_rows, self._pages)

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
        pages, used = self._pages[row], self.lengths[row] % PAGE
        if used and len(pages[self.lengths[row] // PAGE].ids) > used:
            self._own_last(row, used)
        while len(pages) * PAGE < length:
            self._put(row, self._all.new(pages[-1] if pages else self._all.root))

    def remember(self, row: int, id: int) -> None:
        """The row has grown by this token, whose keys and values are in its page now."""
        length = self.lengths[row]
        page = self._pages[row][length // PAGE]
        page.ids.append(id)
        self.lengths[row] = length + 1
        if len(page.ids) == PAGE:
            self._unite(row, length // PAGE)

    def truncate(self, row: int, length: int) -> None:
        """Forget all after the first `length` tokens of a row, and give their pages back."""
        if not 0 <= length <= self.lengths[row]:
            raise GenerationError(
                f"truncate: row {row} has {self.lengths[row]} tokens, cannot keep {length}"
            )
        self.lengths[row] = length
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
        with self._all.lock:
            own = pages[-1:] if used else []  # not full: perhaps there is a page with more
            text = [*own[0].ids[:used], *ids[:-1]] if own else ids[:-1]
            found = find(own[0].before if own else self._last(row), text)
            known = sum(count for _, count in found) - used
            if known <= 0:
                return 0
            del pages[len(pages) - len(own) :]
            for page, count in found:
                whole = count == PAGE
                page.users += whole
                self._put(row, page if whole else self._all.copy(page, count))
            self._all.release(own)
        self.lengths[row] += known
        self.recalled += known
        return known

    def _unite(self, row: int, n: int) -> None:
        """If another row has filled a page alike, to the bit, both go on with that one."""
        pages = self._pages[row]
        page, before = pages[n], pages[n].before
        with self._all.lock:
            alike = [p for p in before.after if p.ids == page.ids] if before is not None else []
            twin = next((p for p in alike if p is not page), None)
            if twin is None:
                return
            twin.users += 1
            pages[n] = twin
            self.table[row, n] = twin.memory.ctypes.data
            for following in pages[n + 1 : n + 2]:  # reserved already
                following.before = twin
                twin.after.add(following)
            self._all.release([page])

    def _put(self, row: int, page: Page) -> None:
        self.table[row, len(self._pages[row])] = page.memory.ctypes.data
        self._pages[row].append(page)

    def _cut(self, row: int) -> None:
        """Give back pages behind the row's length."""
        pages, needed = self._pages[row], -(-self.lengths[row] // PAGE)
        if len(pages) > needed:
            self._all.release(pages[needed:])
            del pages[needed:]

    def _own_last(self, row: int, used: int) -> None:
        """Before the row writes where its last page holds other tokens: they are forgotten, or, if
        other rows use them, the row goes on in a copy."""
        self._cut(row)
        with self._all.lock:
            page = self._pages[row][-1]
            if page.users == 1:
                del page.ids[used:]
                return
            fresh = self._all.copy(page, used)
            self._all.release([self._pages[row].pop()])
            self._put(row, fresh)


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
