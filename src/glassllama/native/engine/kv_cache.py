"""The KV cache: keys and values of past tokens in pages of 64 tokens, allocated as texts grow.

A page knows its ids and its parent, the page before it, so the pages of all caches of an engine are
a tree of texts. A sequence whose beginning is in the tree shares the whole pages of that beginning;
of the page in which the two texts part, it gets a copy. Pages that no sequence uses are freed at
once: the tree refers to its pages weakly, so that no Python code runs when a cache is freed, in
which a KeyboardInterrupt would be lost.

Layers with a sliding window have a memory of their own in each page. It is freed as soon as all
texts of the page have gone on so far that the window does not reach it. A text that is cut back to
such a place is computed again from its beginning, and so is a new text that begins like it.

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
Row = NDArray[np.float32]  # (C,)

CACHE_KINDS: dict[CacheType, int] = {"int16": KV_INT16, "int8": KV_INT8}
MIN_SHARED = 32  # ids in common with another sequence of a batch: that one is fed first, for both


def number_bytes(kv_type: int) -> tuple[int, int]:
    """Bytes of a number, and of the scale of a head's key or value, which integers have."""
    return ITEM_BYTES[kv_type], CACHE_SCALE if kv_type != KV_FLOAT32 else 0


def living(references: Iterable[weakref.ref[T]]) -> list[T]:
    return [thing for reference in references if (thing := reference()) is not None]


class CachedSequence(list["Page"]):
    """The pages of a sequence, and how many tokens are in them."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        self.slot = slot  # its row of the page table
        self.length = 0
        self.reused = 0  # tokens that were found in the tree instead of computed
        self.continued_from: list[int] = []  # lengths, besides its own, that keep their windows
        self.prefix = 0  # tokens at its beginning that all see each other
        self.sources: dict[int, int | Row] = {}  # negative ids -> what is embedded: an id or a row

    def ids(self) -> list[int]:
        return [id for page in self for id in page.ids][: self.length]


class Memory:
    """All zeros: weight 0 times a value that was never written must be 0."""

    def __init__(self, nbytes: int) -> None:
        self.bytes: NDArray[np.uint8] = zeros(np.uint8, nbytes)
        self.address: int = self.bytes.ctypes.data

    def copy(self) -> Memory:
        copy = Memory(self.bytes.nbytes)
        copy.bytes[:] = self.bytes
        return copy


@dataclass(eq=False)
class Page:
    """Up to 64 tokens that follow those of the parent page. Full pages may belong to many texts."""

    memory: Memory  # of layers without a window
    parent: Page | None = None
    number: int = -1  # in its sequences
    ids: list[int] = field(default_factory=list)
    _users: list[weakref.ref[CachedSequence]] = field(default_factory=list)  # now or once
    _children: list[weakref.ref[Page]] = field(default_factory=list)
    local: Memory | None = None  # of layers with a window; None: not needed yet, or not any more

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

    def __init__(self, plan: ModelPlan, kv_type: int) -> None:
        windows, numbers = plan.windows(), number_bytes(kv_type)
        of_layers = [PAGE * block.attention.kv_bytes(*numbers) for block in plan.blocks]
        self.window = max(windows)  # 0 if no layer has one
        self.local_bytes = sum(n for n, w in zip(of_layers, windows, strict=True) if w > 0)
        self.page_bytes = sum(of_layers) - self.local_bytes
        self.root = Page(Memory(0))
        self.lock = NonReentrantLock()  # taken while pages or sequences change, and during steps

    def new(self, parent: Page) -> Page:
        """An empty page; `PagedCache.open_window` adds the memory of layers with a window."""
        page = Page(Memory(self.page_bytes), parent, parent.number + 1)
        parent.add_child(page)
        return page

    def copy(self, page: Page, count: int) -> Page:
        """A new page with the first `count` tokens of another one."""
        assert page.parent is not None
        fresh = Page(page.memory.copy(), page.parent, page.number, page.ids[:count])
        fresh.local = page.local and page.local.copy()
        page.parent.add_child(fresh)
        return fresh

    def in_window(self, length: int, prefix: int = 0) -> slice:
        """The pages of a text of this length that the window of its next token reaches.

        If that token is in a prefix, it sees all before it.
        """
        first = max(0, length + 1 - self.window) if length >= prefix else 0
        return slice(first // PAGE, -(-length // PAGE))

    def is_needed(self, page: Page) -> bool:
        """Whether the window of any text with this page reaches it.

        Texts may be cut back by up to a page's tokens, as guesses of tokens are, and lose nothing.
        """
        return any(
            self.in_window(length).start - 1 <= page.number < self.in_window(length).stop
            for user in page.users()
            for length in (user.length, *user.continued_from)
        )


class PagedCache:
    """The engine's cache: `table` (slots, 2, pages) int64 holds the addresses of the pages.

    For each sequence first those of the layers without a window, then those of the others, which
    are written before each step for the pages that it uses.
    Memory is allocated page by page, so that a long context costs nothing until it is used.
    """

    def __init__(self, pages: Pages, kv_type: int) -> None:
        self.kv_type = kv_type  # of its numbers: layout.KV_INT16, KV_FLOAT32, KV_INT8
        self.lock = pages.lock
        self._all = pages
        self._sequences: dict[int, CachedSequence] = {}
        self._numbers = itertools.count()
        self.table = zeros(np.int64, 1, 2, 1)  # as large as was needed so far, or up to twice
        self._table_is_good = True

    @property
    def nbytes(self) -> int:
        """Memory allocated so far; shared pages count once."""
        pages = {id(page): page for pages in self._sequences.values() for page in pages}
        every = [memory for page in pages.values() for memory in (page.memory, page.local)]
        return sum(memory.bytes.nbytes for memory in every if memory is not None)

    @synchronized
    def add(self) -> int:
        """A new, empty sequence -> its number."""
        return self.new_sequence()[0]

    @synchronized
    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens -> its number. Whole pages are shared."""
        source = self.get(sequence)
        self._cut(source)
        number, fork = self.new_sequence()
        pages, used = list(source), source.length % PAGE
        if used:
            pages[-1] = self._all.copy(pages[-1], used)
        self._replace(fork, 0, pages)
        fork.prefix, fork.sources = source.prefix, dict(source.sources)
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
        if 0 < length < found.prefix:
            raise GenerationError(
                f"rewind: the first {found.prefix} tokens see each other, it cannot keep {length}"
            )
        self.set_length(found, length)

    @synchronized
    def remove(self, sequence: int) -> None:
        self.get(sequence)
        self.drop(sequence)

    def length(self, sequence: int) -> int:
        return self.get(sequence).length

    def reused(self, sequence: int) -> int:
        return self.get(sequence).reused

    def get(self, sequence: int) -> CachedSequence:
        found = self._sequences.get(sequence)
        if found is None:
            raise GenerationError(f"no sequence {sequence} in this cache: it was removed, or never")
        return found

    # --- for the executor, which holds the lock --------------------------------------------------

    def new_sequence(self) -> tuple[int, CachedSequence]:
        taken = {sequence.slot for sequence in self._sequences.values()}
        slot = next(n for n in itertools.count() if n not in taken)
        if slot >= len(self.table):
            self._grow(2 * len(self.table), self.table.shape[2])
        number, sequence = next(self._numbers), CachedSequence(slot)
        self._sequences[number] = sequence
        return number, sequence

    def drop(self, number: int) -> None:
        del self._sequences[number]

    def set_length(self, sequence: CachedSequence, length: int) -> None:
        """Forget what follows the first `length` tokens."""
        sequence.length, sequence.reused = length, min(sequence.reused, length)
        if length == 0:
            sequence.prefix = 0
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
        before = sequence[: len(sequence) - len(own)]
        while found and not self._can_continue(
            [*before, *(page for page, _ in found)],
            len(before) * PAGE + sum(count for _, count in found),
            sequence.prefix,
        ):
            found.pop()
        known = sum(count for _, count in found) - used
        if known <= 0:
            return 0
        taken = [page if count == PAGE else self._all.copy(page, count) for page, count in found]
        self._replace(sequence, len(sequence) - len(own), taken)
        sequence.length += known
        sequence.reused += known
        return known

    def can_continue(self, sequence: CachedSequence) -> bool:
        """Whether the memory of its window is there; if not, it has to be computed again."""
        return self._can_continue(sequence, sequence.length, sequence.prefix)

    def _can_continue(self, pages: list[Page], length: int, prefix: int) -> bool:
        reached = pages[self._all.in_window(length, prefix)] if self._all.window else []
        return all(page.local is not None for page in reached)

    def open_window(self, sequence: CachedSequence, first: int, length: int) -> None:
        """Before tokens `first` … length-1 of layers with a window: memory, and its addresses."""
        start, stop = self._all.in_window(first, sequence.prefix).start, -(-length // PAGE)
        for n, page in enumerate(sequence[start:stop], start):
            page.local = page.local or Memory(self._all.local_bytes)
            self.table[sequence.slot, 1, n] = page.local.address

    def free_unseen(self, sequence: CachedSequence, first: int, length: int) -> None:
        """After tokens `first` … length-1: free memory that later tokens do not need."""
        if self._all.window and first // PAGE < length // PAGE:
            for page in sequence[: max(0, self._all.in_window(length).start - 1)]:
                if page.local is not None and not self._all.is_needed(page):
                    page.local = None

    def take_pages(self, sequence: CachedSequence, other: CachedSequence) -> None:
        """Use the pages of another sequence, which has the same tokens."""
        self._replace(sequence, 0, [*other])

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
        twin.local = twin.local or page.local
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
        slots, _, columns = self.table.shape
        if len(sequence) > columns:
            self._grow(slots, max(len(sequence), 2 * columns))
        addresses = [page.memory.address for page in sequence[first:]]
        self.table[sequence.slot, 0, first : len(sequence)] = addresses

    def _grow(self, slots: int, columns: int) -> None:
        larger = zeros(np.int64, slots, 2, columns)
        larger[: len(self.table), :, : self.table.shape[2]] = self.table
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
        if not any(counts.values()):
            break
        parent = max(counts, key=lambda page: (counts[page], page.local is not None))
        count = counts[parent]
        found.append((parent, count))
        if count < PAGE:
            break
    return found


def shared_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two texts have in common from the beginning."""
    differ = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
