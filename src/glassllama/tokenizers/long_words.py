"""Merging a word of a million bytes: the rule of `bpe.merge`, with a heap and a linked list.

The plain loop looks through all ranks for the lowest after every merge, so its time grows with the
square of the length. Here the candidates wait in a heap ordered by (rank, position), and a merge
touches its two neighbours only: n log n. Compiled with Numba, on ids instead of bytes.

    symbols   h  e  l  l  o            heap: (rank of "he", 0), (rank of "ll", 2), …
    next      1  2  3  4  5            merge at 2: symbols[2] = "ll", next[2] = 4, 3 is dead
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.tokenizers.compiled import Int, compiled, entry, inlined

if TYPE_CHECKING:
    from glassllama.tokenizers.bpe import Vocabulary

Ints = NDArray[np.int32]
Keys = NDArray[np.int64]

EMPTY = -1  # a free slot, a dead position, a pair that does not merge
PERHAPS_BITS = 22  # of a hash: half a megabyte
SPREAD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: Fibonacci hashing (Knuth, vol. 3, 6.4)


class PairTable(NamedTuple):
    """Which pairs of ids merge: an open-addressing hash table, its size a power of two.

    slots (slots, 2) int64: left << 32 | right, or EMPTY; rank << 32 | id of the joined. `perhaps`
    is a bit for every hash, set if some pair has it: small enough to stay near the processor, it
    answers for nearly all pairs that do not merge.
    """

    slots: Keys
    perhaps: NDArray[np.uint64]


def table_of(rows: NDArray[np.int64]) -> PairTable:
    """The table of pairs given as (left, right, rank, joined), (M, 4)."""
    slots = 1 << max(4, (2 * len(rows)).bit_length())  # at most half full
    perhaps = np.zeros(2**PERHAPS_BITS // 64, np.uint64)
    table = PairTable(np.full((slots, 2), EMPTY, np.int64), perhaps)
    fill(table, rows)
    return table


class Room(NamedTuple):
    """What merging works in: a linked list, ranks and a heap for words of up to n symbols."""

    after: Ints
    before: Ints
    current: Ints  # the rank of the pair that begins here
    heap: Keys  # (2n,): every merge takes one entry and adds two at most


def room(n: int) -> Room:
    lists = np.empty((3, n), np.int32)
    return Room(lists[0], lists[1], lists[2], np.empty(2 * n, np.int64))


def pair_table(vocabulary: Vocabulary) -> PairTable:
    """All pairs that merge, from a list of merges or from all ways to halve a token."""
    return table_of(np.fromiter(pairs(vocabulary), np.dtype((np.int64, 4))))


def pairs(vocabulary: Vocabulary) -> Iterator[tuple[int, int, int, int]]:
    """(left id, right id, rank, id of the joined) of every pair that merges."""
    ids = vocabulary.ids
    if vocabulary.merges is not None:
        for (left, right), rank in vocabulary.merges.items():
            yield ids[left], ids[right], rank, ids[left + right]
        return
    for token, id in ids.items():
        for cut in range(1, len(token)):
            begin, end = ids.get(token[:cut]), ids.get(token[cut:])
            if begin is not None and end is not None:
                yield begin, end, id, id


def merge_ids(symbols: Ints, table: PairTable) -> Ints:
    """The ids (T,) that the bytes of a word, given as their ids (n,), merge into."""
    merged = symbols.copy()
    size = merge_linked(merged, len(merged), room(len(merged)), table)
    return merged[:size]


@inlined
def slot_of(table: PairTable, left: Int, right: Int) -> Int:
    """Where a pair is in the table, or the free slot where it would be."""
    slots = table.slots
    key = (np.int64(left) << 32) | np.int64(right)
    mask = np.uint64(len(slots) - 1)
    slot = ((np.uint64(key) * np.uint64(SPREAD)) >> np.uint64(32)) & mask
    while slots[slot, 0] != key and slots[slot, 0] != EMPTY:
        slot = (slot + np.uint64(1)) & mask
    return slot


@inlined
def perhaps_of(left: Int, right: Int) -> tuple[Int, Int]:
    """A pair's bit in `perhaps`: in which word, and the word with this bit alone."""
    key = np.uint64((np.int64(left) << 32) | np.int64(right))
    hashed = (key * np.uint64(SPREAD)) >> np.uint64(64 - PERHAPS_BITS)
    return hashed >> np.uint64(6), np.uint64(1) << (hashed & np.uint64(63))


@entry
def fill(table: PairTable, rows: NDArray[np.int64]) -> None:
    for k in range(len(rows)):
        left, right, rank, joined = rows[k, 0], rows[k, 1], rows[k, 2], rows[k, 3]
        slot = slot_of(table, left, right)
        table.slots[slot, 0] = (left << 32) | right
        table.slots[slot, 1] = (rank << 32) | joined
        place, bit = perhaps_of(left, right)
        table.perhaps[place] |= bit


@inlined
def rank_of(left: Int, right: Int, table: PairTable) -> Int:
    """The rank of a pair, or EMPTY."""
    place, bit = perhaps_of(left, right)
    if table.perhaps[place] & bit == 0:
        return EMPTY
    return table.slots[slot_of(table, left, right), 1] >> 32  # of EMPTY this is EMPTY again


@inlined
def joined_of(left: Int, right: Int, table: PairTable) -> Int:
    """What a pair merges into; the pair must be there."""
    return table.slots[slot_of(table, left, right), 1] & 0xFFFFFFFF


@compiled
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


@compiled
def sift_up(heap: Keys, at: Int) -> None:
    item = heap[at]
    while at > 0 and heap[(at - 1) // 2] > item:
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = item


@entry
def push(heap: Keys, size: Int, rank: Int, at: Int) -> Int:
    """Add (rank, position), unless the pair does not merge; the heap's new size."""
    if rank == EMPTY:
        return size
    heap[size] = (np.int64(rank) << 32) | at
    sift_up(heap, size)
    return size + 1


@compiled
def rank_at(symbols: Ints, n: Int, after: Ints, at: Int, table: PairTable) -> Int:
    """The rank of the pair that begins at a position, or EMPTY."""
    if at < 0 or after[at] >= n:
        return EMPTY
    return rank_of(symbols[at], symbols[after[at]], table)


@entry
def merge_linked(symbols: Ints, n: Int, room: Room, table: PairTable) -> Int:
    """Merge the first n symbols in place and move the living to the front; how many they are.

    A heap entry whose rank no longer holds is passed.
    """
    after, before, current, heap = room.after, room.before, room.current, room.heap
    size = 0
    for at in range(n):
        before[at], after[at] = at - 1, at + 1
        current[at] = rank_at(symbols, n, after, at, table)
        size = push(heap, size, current[at], at)
    while size > 0:
        rank, at = heap[0] >> 32, heap[0] & 0xFFFFFFFF
        size -= 1
        heap[0] = heap[size]
        sift_down(heap, size, 0)
        if current[at] != rank:
            continue
        gone = after[at]
        symbols[at] = joined_of(symbols[at], symbols[gone], table)
        symbols[gone], current[gone] = EMPTY, EMPTY
        after[at] = after[gone]
        if after[at] < n:
            before[after[at]] = at
        for begin in (np.int64(before[at]), at):
            if begin >= 0:
                current[begin] = rank_at(symbols, n, after, begin, table)
                size = push(heap, size, current[begin], begin)
    living = 0
    for at in range(n):
        if symbols[at] != EMPTY:
            symbols[living] = symbols[at]
            living += 1
    return living
