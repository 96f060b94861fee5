"""Merging a word of a million bytes: the rule of `bpe.merge`, with a heap and a linked list.

The plain loop looks through all ranks for the lowest after every merge, so its time grows with the
square of the length. Here the candidates wait in a heap ordered by (rank, position), and a merge
touches its two neighbours only: n log n. Compiled with Numba, on ids instead of bytes.

    symbols   h  e  l  l  o            heap: (rank of "he", 0), (rank of "ll", 2), …
    next      1  2  3  4  5            merge at 2: symbols[2] = "ll", next[2] = 4, 3 is dead
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError
from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.native.jit.memory import LINE, fetch_soon, slot_of_key, table_of_zeros

if TYPE_CHECKING:
    from glassllama.tokenizers.bpe import Vocabulary

Ints = NDArray[np.int32]
Keys = NDArray[np.int64]

EMPTY = -1  # a dead position, a pair that does not merge
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing (Knuth, 3, 6.4)
PERHAPS_BITS = 22  # of a hash
FULLEST = 0.35  # of all slots: nearly every line has one that is free
# Of a slot: 2^21 ids are more than any vocabulary and all characters of Unicode beside it.
ID_BITS, ORDER_BITS = np.uint64(21), np.uint64(22)
LARGEST_ID, ORDER = 2**21 - 1, np.uint64(2**22 - 1)


class PairTable(NamedTuple):
    """Which pairs of ids merge: a hash table in lines of LINE slots, their number a power of two.

    A slot is left << 43 | right << 22 | order + 1, or 0. `order` counts the different (rank,
    joined) from the lowest on: it leads to both, and where ranks differ it says which goes first.
    `perhaps` is a bit for every hash, set if some pair has it: small enough to stay near the
    processor, it answers for nearly all pairs that do not merge.
    """

    slots: NDArray[np.uint64]  # (lines, LINE)
    perhaps: NDArray[np.uint64]  # half a megabyte of bits
    ranks: Ints  # of each order
    joined: Ints  # of each order: the id of the two joined


def table_of(rows: NDArray[np.int64]) -> PairTable:
    """The table of pairs given as (left, right, rank, joined), (M, 4).

    TokenizerError: a vocabulary so large that its ids have no place in a slot.
    """
    rows = rows.reshape(-1, 4)
    if len(rows) and max(rows[:, 0].max(), rows[:, 1].max(), rows[:, 3].max()) >= LARGEST_ID:
        raise TokenizerError(f"vocabulary: ids from {LARGEST_ID} on have no place here")
    merges, orders = np.unique(rows[:, 2] << 32 | rows[:, 3], return_inverse=True)
    lines = 1 << max(1, math.ceil(math.log2(len(rows) / FULLEST / LINE + 1)))
    table = PairTable(
        table_of_zeros(lines, LINE),
        np.zeros(2**PERHAPS_BITS // 64, np.uint64),
        (merges >> 32).astype(np.int32),
        (merges & 0xFFFFFFFF).astype(np.int32),
    )
    fill(table, rows[:, 0], rows[:, 1], orders.reshape(-1).astype(np.int64))
    return table


class Room(NamedTuple):
    """What merging works in: a linked list, ranks and a heap for words of up to n symbols."""

    after: Ints
    before: Ints
    current: Ints  # the order of the pair that begins here
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


@raw_inlined
def line_of(slots: NDArray[np.uint64], spread: Int) -> Int:
    """Where the search for a pair begins."""
    return (spread >> np.uint64(32)) & np.uint64(len(slots) - 1)


@raw_inlined
def perhaps_of(spread: Int) -> tuple[Int, Int]:
    """A pair's bit in `perhaps`: in which word, and the word with this bit alone."""
    place = spread >> np.uint64(64 - PERHAPS_BITS)
    return place >> np.uint64(6), np.uint64(1) << (place & np.uint64(63))


@raw_entry
def fill(table: PairTable, lefts: Keys, rights: Keys, orders: Keys) -> None:
    slots = table.slots
    for k in range(len(orders)):
        key = np.uint64(lefts[k]) << ID_BITS | np.uint64(rights[k])
        line, at = line_of(slots, key * SPREAD), 0
        while slots[line, at] != 0 and slots[line, at] >> ORDER_BITS != key:
            at += 1
            if at == LINE:
                line, at = (line + np.uint64(1)) & np.uint64(len(slots) - 1), 0
        slots[line, at] = key << ORDER_BITS | np.uint64(orders[k] + 1)
        place, bit = perhaps_of(key * SPREAD)
        table.perhaps[place] |= bit


@raw_inlined
def order_of(left: Int, right: Int, table: PairTable) -> Int:
    """The order of a pair, or EMPTY."""
    key = np.uint64(left) << ID_BITS | np.uint64(right)
    place, bit = perhaps_of(key * SPREAD)
    line = line_of(table.slots, key * SPREAD)
    fetch_soon(table.slots, line)  # while the answer of `perhaps` is on its way
    if table.perhaps[place] & bit == 0:
        return EMPTY
    while True:
        found = slot_of_key(table.slots, line, key, ORDER_BITS) & ORDER
        if found != 0 or table.slots[line, LINE - 1] == 0:
            return np.int64(found) - 1
        line = (line + np.uint64(1)) & np.uint64(len(table.slots) - 1)


@raw_inlined
def fetch_pair(left: Int, right: Int, table: PairTable) -> None:
    """Ask for what `order_nearby` will look at."""
    key = np.uint64(left) << ID_BITS | np.uint64(right)
    fetch_soon(table.slots, line_of(table.slots, key * SPREAD))


@raw_inlined
def order_nearby(left: Int, right: Int, table: PairTable) -> Int:
    """The order of a pair, or EMPTY, where `fetch_pair` has brought it near: hardly a branch."""
    key = np.uint64(left) << ID_BITS | np.uint64(right)
    line = line_of(table.slots, key * SPREAD)
    found = slot_of_key(table.slots, line, key, ORDER_BITS) & ORDER
    has_room = np.uint64(table.slots[line, LINE - 1] == 0)
    if found | has_room == 0:  # else it may be in the next one; one branch, seldom taken
        return order_of(left, right, table)
    fetch_soon(table.joined, np.int64(found))  # one beside it, mostly in the same line
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
def push(heap: Keys, size: Int, order: Int, at: Int, table: PairTable) -> Int:
    """Add (rank, position), unless the pair does not merge; the heap's new size."""
    if order == EMPTY:
        return size
    heap[size] = (np.int64(table.ranks[order]) << 32) | at
    sift_up(heap, size)
    return size + 1


@raw_compiled
def order_at(symbols: Ints, n: Int, after: Ints, at: Int, table: PairTable) -> Int:
    """The order of the pair that begins at a position, or EMPTY."""
    if at < 0 or after[at] >= n:
        return EMPTY
    return order_of(symbols[at], symbols[after[at]], table)


@raw_entry
def merge_linked(symbols: Ints, n: Int, room: Room, table: PairTable) -> Int:
    """Merge the first n symbols in place and move the living to the front; how many they are.

    A heap entry whose rank no longer holds is passed.
    """
    after, before, current, heap = room.after, room.before, room.current, room.heap
    size = np.int64(0)
    for at in range(n):
        before[at], after[at] = at - 1, at + 1
        current[at] = order_at(symbols, n, after, at, table)
        size = push(heap, size, current[at], at, table)
    while size > 0:
        rank, at = heap[0] >> 32, heap[0] & 0xFFFFFFFF
        size -= 1
        heap[0] = heap[size]
        sift_down(heap, size, np.int64(0))
        if current[at] == EMPTY or table.ranks[current[at]] != rank:
            continue
        gone = after[at]
        symbols[at] = table.joined[current[at]]
        symbols[gone], current[gone] = EMPTY, EMPTY
        after[at] = after[gone]
        if after[at] < n:
            before[after[at]] = at
        for begin in (np.int64(before[at]), at):
            if begin >= 0:
                current[begin] = order_at(symbols, n, after, begin, table)
                size = push(heap, size, current[begin], begin, table)
    living = 0
    for at in range(n):
        if symbols[at] != EMPTY:
            symbols[living] = symbols[at]
            living += 1
    return living
