"""Table of the pairs that merge, and merging of long words with a heap and a linked list.

The rule is that of `bpe.merge`, which searches all ranks after every merge: quadratic in the length
of the word. Here the candidates are in a heap ordered by (rank, position), and a merge changes only
its two neighbors: n log n. A plain counterpart is in tokenizers/backend.py.

    symbols   h  e  l  l  o            heap: (rank of "he", 0), (rank of "ll", 2), …
    after     1  2  3  4  5            merge at 2: symbols[2] = "ll", after[2] = 4, 3 is removed
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError
from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.native.jit.memory import SLOTS, fetch_soon, slot_of_key, table_of_zeros
from glassllama.tokenizers.vocabulary import Vocabulary

Ints = NDArray[np.int32]
Keys = NDArray[np.int64]

EMPTY = -1  # a removed position; a pair that does not merge
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth, TAOCP 3, 6.4)
FILTER_BITS = 22  # of a hash, for the bitmap filter
MAX_LOAD = 0.35  # nearly every line of slots has a free one
# Fields of a slot. 2^21 ids exceed any vocabulary plus all characters of Unicode.
ID_BITS, MERGE_RANK_BITS = np.uint64(21), np.uint64(22)
LARGEST_ID, MERGE_RANK_MASK = 2**21 - 1, np.uint64(2**22 - 1)


class PairTable(NamedTuple):
    """Which pairs of ids merge: a hash table of a power of two of lines, each of SLOTS slots.

    A slot is left << 43 | right << 22 | merge_rank + 1, or 0. The merge rank numbers the different
    (rank, joined) in ascending order. `bitmap_filter` has a bit for every hash, set if a pair has
    it: it is small enough for the processor's cache and rejects nearly all pairs that do not merge.
    """

    slots: NDArray[np.uint64]  # (lines, SLOTS)
    bitmap_filter: NDArray[np.uint64]  # 2^FILTER_BITS bits: half a megabyte
    ranks: Ints  # rank in the vocabulary, by merge rank
    joined: Ints  # id of the merged token, by merge rank


def table_of(rows: NDArray[np.int64]) -> PairTable:
    """The table of the pairs in `rows`, (M, 4): left, right, rank, joined.

    TokenizerError: an id is too large for a slot.
    """
    rows = rows.reshape(-1, 4)
    if len(rows) and max(rows[:, 0].max(), rows[:, 1].max(), rows[:, 3].max()) >= LARGEST_ID:
        raise TokenizerError(f"vocabulary: an id is {LARGEST_ID} or larger, which is not supported")
    merges, merge_ranks = np.unique(rows[:, 2] << 32 | rows[:, 3], return_inverse=True)
    lines = 1 << max(1, math.ceil(math.log2(len(rows) / MAX_LOAD / SLOTS + 1)))
    table = PairTable(
        table_of_zeros(lines, SLOTS),
        np.zeros(2**FILTER_BITS // 64, np.uint64),
        (merges >> 32).astype(np.int32),
        (merges & 0xFFFFFFFF).astype(np.int32),
    )
    fill(table, rows[:, 0], rows[:, 1], merge_ranks.reshape(-1).astype(np.int64))
    return table


class MergeScratch(NamedTuple):
    """Memory for merging a word of up to n symbols: a linked list, merge ranks and a heap."""

    after: Ints
    before: Ints
    current: Ints  # merge rank of the pair that starts here
    heap: Keys  # (2n,): every merge removes one entry and adds at most two


def new_scratch(n: int) -> MergeScratch:
    lists = np.empty((3, n), np.int32)
    return MergeScratch(lists[0], lists[1], lists[2], np.empty(2 * n, np.int64))


def pair_table(vocabulary: Vocabulary) -> PairTable:
    """The table of all pairs of a vocabulary that merge."""
    return table_of(np.fromiter(vocabulary.pair_rows(), np.dtype((np.int64, 4))))


def merge_ids(symbols: Ints, table: PairTable) -> Ints:
    """Symbols (n,), the ids of a word's bytes or characters → the ids (T,) after all merges."""
    merged = symbols.copy()
    size = merge_linked(merged, len(merged), new_scratch(len(merged)), table)
    return merged[:size]


@raw_inlined
def line_of(slots: NDArray[np.uint64], hashed: Int) -> Int:
    """The line at which the search for a pair starts."""
    return (hashed >> np.uint64(32)) & np.uint64(len(slots) - 1)


@raw_inlined
def filter_bit(hashed: Int) -> tuple[Int, Int]:
    """A pair's bit in `bitmap_filter`: index of the machine word, and the mask."""
    place = hashed >> np.uint64(64 - FILTER_BITS)
    return place >> np.uint64(6), np.uint64(1) << (place & np.uint64(63))


@raw_entry
def fill(table: PairTable, lefts: Keys, rights: Keys, merge_ranks: Keys) -> None:
    slots = table.slots
    for k in range(len(merge_ranks)):
        key = np.uint64(lefts[k]) << ID_BITS | np.uint64(rights[k])
        line, at = line_of(slots, key * HASH_FACTOR), 0
        while slots[line, at] != 0 and slots[line, at] >> MERGE_RANK_BITS != key:
            at += 1
            if at == SLOTS:
                line, at = (line + np.uint64(1)) & np.uint64(len(slots) - 1), 0
        slots[line, at] = key << MERGE_RANK_BITS | np.uint64(merge_ranks[k] + 1)
        place, bit = filter_bit(key * HASH_FACTOR)
        table.bitmap_filter[place] |= bit


@raw_inlined
def merge_rank_of(left: Int, right: Int, table: PairTable) -> Int:
    """The merge rank of a pair, or EMPTY."""
    key = np.uint64(left) << ID_BITS | np.uint64(right)
    place, bit = filter_bit(key * HASH_FACTOR)
    line = line_of(table.slots, key * HASH_FACTOR)
    fetch_soon(table.slots, line)  # while the filter is read
    if table.bitmap_filter[place] & bit == 0:
        return EMPTY
    while True:
        found = slot_of_key(table.slots, line, key, MERGE_RANK_BITS) & MERGE_RANK_MASK
        if found != 0 or table.slots[line, SLOTS - 1] == 0:
            return np.int64(found) - 1
        line = (line + np.uint64(1)) & np.uint64(len(table.slots) - 1)


@raw_inlined
def prefetch_pair(left: Int, right: Int, table: PairTable) -> None:
    """Prefetch the line that `prefetched_merge_rank` reads."""
    key = np.uint64(left) << ID_BITS | np.uint64(right)
    fetch_soon(table.slots, line_of(table.slots, key * HASH_FACTOR))


@raw_inlined
def prefetched_merge_rank(left: Int, right: Int, table: PairTable) -> Int:
    """The merge rank of a pair, or EMPTY, after `prefetch_pair`: nearly without branches."""
    key = np.uint64(left) << ID_BITS | np.uint64(right)
    line = line_of(table.slots, key * HASH_FACTOR)
    found = slot_of_key(table.slots, line, key, MERGE_RANK_BITS) & MERGE_RANK_MASK
    has_space = np.uint64(table.slots[line, SLOTS - 1] == 0)
    if found | has_space == 0:  # full line: the pair may be in the next; rare
        return merge_rank_of(left, right, table)
    fetch_soon(table.joined, np.int64(found))  # its neighbor, mostly in the same cache line
    return np.int64(found) - 1


@raw_compiled
def sift_down(heap: Keys, size: Int, at: Int) -> None:
    item = heap[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item


@raw_compiled
def sift_up(heap: Keys, at: Int) -> None:
    item = heap[at]
    while at > 0 and heap[(at - 1) // 2] > item:
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = item


@raw_compiled
def push(heap: Keys, size: Int, merge_rank: Int, at: Int, table: PairTable) -> Int:
    """Add (rank, position) unless merge_rank is EMPTY; returns the new size of the heap."""
    if merge_rank == EMPTY:
        return size
    heap[size] = (np.int64(table.ranks[merge_rank]) << 32) | at
    sift_up(heap, size)
    return size + 1


@raw_compiled
def merge_rank_at(symbols: Ints, n: Int, after: Ints, at: Int, table: PairTable) -> Int:
    """The merge rank of the pair that starts at a position, or EMPTY."""
    if at < 0 or after[at] >= n:
        return EMPTY
    return merge_rank_of(symbols[at], symbols[after[at]], table)


@raw_entry
def merge_linked(symbols: Ints, n: Int, scratch: MergeScratch, table: PairTable) -> Int:
    """Merge the first n symbols in place; returns how many remain, moved to the front.

    Heap entries whose rank is outdated are skipped.
    """
    after, before, current, heap = scratch.after, scratch.before, scratch.current, scratch.heap
    size = np.int64(0)
    for at in range(n):
        before[at], after[at] = at - 1, at + 1
        current[at] = merge_rank_at(symbols, n, after, at, table)
        size = push(heap, size, current[at], at, table)
    while size > 0:
        rank, at = heap[0] >> 32, heap[0] & 0xFFFFFFFF
        size -= 1
        heap[0] = heap[size]
        sift_down(heap, size, np.int64(0))
        if current[at] == EMPTY or table.ranks[current[at]] != rank:
            continue
        removed = after[at]
        symbols[at] = table.joined[current[at]]
        symbols[removed], current[removed] = EMPTY, EMPTY
        after[at] = after[removed]
        if after[at] < n:
            before[after[at]] = at
        for begin in (np.int64(before[at]), at):
            if begin >= 0:
                current[begin] = merge_rank_at(symbols, n, after, begin, table)
                size = push(heap, size, current[begin], begin, table)
    num_alive = 0
    for at in range(n):
        if symbols[at] != EMPTY:
            symbols[num_alive] = symbols[at]
            num_alive += 1
    return num_alive
