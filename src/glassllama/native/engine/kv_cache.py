"""The KV cache: keys and values of past tokens in pages of 64 tokens, allocated as texts grow.

A page knows its ids and its parent, the page before it, so the pages of all caches of an engine are
a tree of texts. A sequence whose beginning is in the tree shares the whole pages of that beginning;
of the page in which the two texts part, it gets a copy. Pages that no sequence uses are freed at
once: the tree refers to its pages weakly, so that no Python code runs when a cache is freed, in
which a KeyboardInterrupt would be lost.

An exception may come between any two steps of Python's interpreter. So the state of a sequence is
its list of pages and its length; each changes in a single step, and everything else follows from
them: which sequences use a page, the page table. Pages after the length, and ids in the last page
after it, have no meaning, and are removed before the sequence grows again.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import CACHE_SCALE, CacheType
from glassllama.base.layer_plan import ModelPlan
from glassllama.base.locks import NonReentrantLock, synchronized
from glassllama.native.engine.layout import ITEM_BYTES, KV_FLOAT32, KV_INT8, KV_INT16, PAGE, zeros

T = TypeVar("T")

CACHE_KINDS: dict[CacheType, int] = {"int16": KV_INT16, "int8": KV_INT8}
MIN_SHARED = 32  # ids in common with another sequence of a batch: that one is fed first, for both


def bytes_per_token(plan: ModelPlan, kv_type: int) -> int:
    """Memory of one token's keys and values in all layers; integers have scales besides."""
    return plan.kv_bytes(ITEM_BYTES[kv_type], CACHE_SCALE if kv_type != KV_FLOAT32 else 0)


def living(references: Iterable[weakref.ref[T]]) -> list[T]:
    return [thing for reference in references if (thing := reference()) is not None]


class CachedSequence(list["Page"]):
    """The pages of a sequence, and how many tokens are in them."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        self.slot = slot  # its row of the page table
        self.length = 0
        self.reused = 0  # tokens that were found in the tree instead of computed


@dataclass(eq=False)
class Page:
    """Up to 64 tokens that follow those of the parent page. Full pages may belong to many texts."""

    memory: NDArray[np.uint8]
    parent: Page | None = None
    number: int = -1  # in its sequences
    ids: list[int] = field(default_factory=list)
    _users: list[weakref.ref[CachedSequence]] = field(default_factory=list)  # now or once
    _children: list[weakref.ref[Page]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.address: int = self.memory.ctypes.data

    @property
    def children(self) -> list[Page]:
        return living(self._children)

    def add_child(self, page: Page) -> None:
        self._children = [weakref.ref(other) for other in (*self.children, page)]

    def users(self) -> list[CachedSequence]:
        """The sequences that have this page now."""
        n, users = self.number, {id(user): user for user in living(self._users)}
        return [user for user in users.values() if len(user) > n and user[n] is self]

    def add_user(self, user: CachedSequence) -> None:
        self._users = [weakref.ref(other) for other in (*self.users(), user)]


class Pages:
    """The pages of all caches of one engine. `root` is the empty beginning of every text."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.root = Page(zeros(np.uint8, 0))
        self.lock = NonReentrantLock()  # taken while pages or sequences change, and during steps

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
    """The engine's cache: `table` (slots, pages) int64 holds the addresses of the pages.

    Memory is allocated page by page, so that a long context costs nothing until it is used.
    """

    def __init__(self, pages: Pages, kv_type: int) -> None:
        self.kv_type = kv_type  # of its numbers: layout.KV_INT16, KV_FLOAT32, KV_INT8
        self.lock = pages.lock
        self._all = pages
        self._sequences: dict[int, CachedSequence] = {}
        self._numbers = itertools.count()
        self.table = zeros(np.int64, 1, 1)  # as large as was needed so far, or up to twice
        self._table_is_good = True

    @property
    def nbytes(self) -> int:
        """Memory allocated so far; shared pages count once."""
        pages = {id(page): page for pages in self._sequences.values() for page in pages}
        return sum(page.memory.nbytes for page in pages.values())

    @synchronized
    def add(self) -> int:
        """A new, empty sequence -> its number."""
        return self._add()[0]

    @synchronized
    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens -> its number. Whole pages are shared."""
        source = self.get(sequence)
        self._cut(source)
        number, fork = self._add()
        pages, used = list(source), source.length % PAGE
        if used:
            pages[-1] = self._all.copy(pages[-1], used)
        self._replace(fork, 0, pages)
        fork.length = fork.reused = source.length
        return number

    @synchronized
    def rewind(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence after the first `length`, and free their pages."""
        found = self.get(sequence)
        if not 0 <= length <= found.length:
            raise GenerationError(
                f"rewind: the sequence has {found.length} tokens, it cannot keep {length}"
            )
        self.set_length(found, length)

    @synchronized
    def remove(self, sequence: int) -> None:
        self.get(sequence)
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        return self.get(sequence).length

    def reused(self, sequence: int) -> int:
        return self.get(sequence).reused

    def get(self, sequence: int) -> CachedSequence:
        found = self._sequences.get(sequence)
        if found is None:
            raise GenerationError(f"no sequence {sequence} in this cache: it was removed, or never")
        return found

    def _add(self) -> tuple[int, CachedSequence]:
        taken = {sequence.slot for sequence in self._sequences.values()}
        slot = next(n for n in itertools.count() if n not in taken)
        if slot >= len(self.table):
            self._grow(2 * len(self.table), self.table.shape[1])
        number, sequence = next(self._numbers), CachedSequence(slot)
        self._sequences[number] = sequence
        return number, sequence

    # --- for the executor, which holds the lock --------------------------------------------------

    def set_length(self, sequence: CachedSequence, length: int) -> None:
        """Forget what follows the first `length` tokens."""
        sequence.length, sequence.reused = length, min(sequence.reused, length)
        self._cut(sequence)

    def reserve(self, sequence: CachedSequence, length: int) -> None:
        """Give the sequence pages for `length` tokens, and a last page that no other one uses."""
        if not self._table_is_good:
            for every in self._sequences.values():
                self._write_table(every)
            self._table_is_good = True
        self._cut(sequence)
        used = sequence.length % PAGE
        if used and len(sequence[-1].ids) > used:
            self._copy_on_write(sequence, used)
        while len(sequence) * PAGE < length:
            page = self._all.new(self._last(sequence))
            self._replace(sequence, len(sequence), [page])

    def commit(self, sequence: CachedSequence, ids: Sequence[int]) -> None:
        """Add tokens to the sequence whose keys and values have been written to its pages."""
        past = sequence.length
        length = past + len(ids)
        for n in range(past // PAGE, -(-length // PAGE)):
            first = max(past, n * PAGE)
            sequence[n].ids[first - n * PAGE :] = ids[first - past : (n + 1) * PAGE - past]
        sequence.length = length
        for n in range(past // PAGE, length // PAGE):
            self._deduplicate(sequence, n)

    def match_prefix(self, sequence: CachedSequence, ids: list[int]) -> int:
        """Use the pages of the tree that begin with `ids` -> how many tokens were found there."""
        self._cut(sequence)
        used = sequence.length % PAGE
        own = sequence[-1:] if used else []  # not full: another page may continue it
        text = [*own[0].ids[:used], *ids] if own else ids
        found = find_prefix(own[0].parent if own else self._last(sequence), text)
        known = sum(count for _, count in found) - used
        if known <= 0:
            return 0
        taken = [page if count == PAGE else self._all.copy(page, count) for page, count in found]
        self._replace(sequence, len(sequence) - len(own), taken)
        sequence.length += known
        sequence.reused += known
        return known

    def will_share(
        self, sequence: CachedSequence, ids: list[int], other: CachedSequence, others: list[int]
    ) -> bool:
        """Whether two sequences have the same past and go on with the same MIN_SHARED ids."""
        if min(len(ids), len(others)) <= MIN_SHARED or sequence.length != other.length:
            return False
        a, b, used = self._last(sequence), self._last(other), sequence.length % PAGE
        in_page = used > 0 and a.parent is b.parent and a.ids[:used] == b.ids[:used]
        return (a is b or in_page) and ids[:MIN_SHARED] == others[:MIN_SHARED]

    def _last(self, sequence: CachedSequence) -> Page:
        return sequence[-1] if sequence else self._all.root

    def _deduplicate(self, sequence: CachedSequence, n: int) -> None:
        """If another sequence has filled a page with the same ids, use that one (bit-identical)."""
        page, parent = sequence[n], sequence[n].parent
        equal = [p for p in parent.children if p.ids == page.ids] if parent is not None else []
        twin = next((p for p in equal if p is not page), None)
        if twin is None:
            return
        for following in sequence[n + 1 : n + 2]:  # reserved already
            following.parent = twin
            twin.add_child(following)
        self._replace(sequence, n, [twin, *sequence[n + 1 :]])

    def _replace(self, sequence: CachedSequence, first: int, pages: list[Page]) -> None:
        """Replace the pages of a sequence from number `first` on by these."""
        for page in pages:
            page.add_user(sequence)
        self._table_is_good = False
        sequence[first:] = pages
        self._write_table(sequence, first)
        self._table_is_good = True

    def _write_table(self, sequence: CachedSequence, first: int = 0) -> None:
        """Write the addresses of the pages from number `first` on."""
        slots, columns = self.table.shape
        if len(sequence) > columns:
            self._grow(slots, max(len(sequence), 2 * columns))
        addresses = [page.address for page in sequence[first:]]
        self.table[sequence.slot, first : len(sequence)] = addresses

    def _grow(self, slots: int, columns: int) -> None:
        larger = zeros(np.int64, slots, columns)
        larger[: len(self.table), : self.table.shape[1]] = self.table
        self.table = larger

    def _cut(self, sequence: CachedSequence) -> None:
        """Free pages after the length."""
        needed = -(-sequence.length // PAGE)
        if len(sequence) > needed:
            self._replace(sequence, needed, [])

    def _copy_on_write(self, sequence: CachedSequence, used: int) -> None:
        """Before a sequence writes into a last page that holds other tokens after its own.

        They are forgotten, or, if others use the page, the sequence continues in a copy.
        """
        page = sequence[-1]
        if len(page.users()) == 1:
            del page.ids[used:]
        else:
            self._replace(sequence, page.number, [self._all.copy(page, used)])


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
