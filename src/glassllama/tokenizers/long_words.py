"""Merging a word of a million bytes: the rule of `bpe.merge`, with a heap and a linked list.

The plain loop looks through all ranks for the lowest after every merge, so its time grows with the
square of the length. Here the candidates wait in a heap ordered by (rank, position), and a merge
touches its two neighbours only: n log n. Compiled with Numba, on ids instead of bytes.

    symbols   h  e  l  l  o            heap: (rank of "he", 0), (rank of "ll", 2), …
    next      1  2  3  4  5            merge at 2: symbols[2] = "ll", next[2] = 4, 3 is dead
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from glassllama.tokenizers.bpe import Vocabulary

Ints = NDArray[np.int32]
Keys = NDArray[np.int64]

EMPTY = -1  # a free slot, a dead position, a pair that does not merge
SPREAD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: Fibonacci hashing (Knuth, vol. 3, 6.4)


@dataclass(frozen=True)
class PairTable:
    """Which pairs of ids merge: an open-addressing hash table, its size a power of two.

    keys (slots,) int64: left << 32 | right, or EMPTY; ranks and joined (slots,) int32.
    """

    keys: Keys
    ranks: Ints
    joined: Ints


def pair_table(vocabulary: Vocabulary) -> PairTable:
    """All pairs that merge, from a list of merges or from all ways to halve a token."""
    rows = np.fromiter(pairs(vocabulary), np.dtype((np.int64, 4)))  # (M, 4)
    slots = 1 << max(4, (2 * len(rows)).bit_length())  # at most half full
    table = PairTable(
        np.full(slots, EMPTY, np.int64), np.empty(slots, np.int32), np.empty(slots, np.int32)
    )
    fill(table.keys, table.ranks, table.joined, rows)
    return table


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
    merged: Ints = merge_linked(symbols.copy(), table.keys, table.ranks, table.joined)
    return merged


def compiled(function: Any) -> Any:
    """Machine code at the first call, kept on disk where there is a folder that can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # Numba found no such folder
        return numba.njit(nogil=True)(function)


@compiled
def slot_of(keys: Keys, left: int, right: int) -> int:
    """Where a pair is in the table, or the free slot where it would be."""
    key = (np.int64(left) << 32) | np.int64(right)
    mask = np.uint64(len(keys) - 1)
    slot = ((np.uint64(key) * np.uint64(SPREAD)) >> np.uint64(32)) & mask
    while keys[slot] != key and keys[slot] != EMPTY:
        slot = (slot + np.uint64(1)) & mask
    return int(slot)


@compiled
def fill(keys: Keys, ranks: Ints, joined: Ints, rows: NDArray[np.int64]) -> None:
    for left, right, rank, id in rows:
        slot = slot_of(keys, left, right)
        keys[slot] = (left << 32) | right
        ranks[slot] = rank
        joined[slot] = id


@compiled
def sift_down(heap: Keys, size: int, at: int) -> None:
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
def sift_up(heap: Keys, at: int) -> None:
    item = heap[at]
    while at > 0 and heap[(at - 1) // 2] > item:
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = item


@compiled
def push(heap: Keys, size: int, rank: int, at: int) -> int:
    """Add (rank, position), unless the pair does not merge; the heap's new size."""
    if rank == EMPTY:
        return size
    heap[size] = (np.int64(rank) << 32) | at
    sift_up(heap, size)
    return size + 1


@compiled
def rank_at(symbols: Ints, after: Ints, at: int, keys: Keys, ranks: Ints) -> int:
    """The rank of the pair that begins at a position, or EMPTY."""
    if at < 0 or after[at] >= len(symbols):
        return EMPTY
    slot = slot_of(keys, symbols[at], symbols[after[at]])
    return EMPTY if keys[slot] == EMPTY else int(ranks[slot])


@compiled
def merge_linked(symbols: Ints, keys: Keys, ranks: Ints, joined: Ints) -> Ints:
    """Merge in place, then keep the living. A heap entry whose rank no longer holds is passed."""
    n = len(symbols)
    after = np.empty(n, np.int32)
    before = np.empty(n, np.int32)
    current = np.empty(n, np.int32)  # the rank of the pair that begins here
    heap = np.empty(2 * n, np.int64)  # every merge takes one entry and adds two at most
    size = 0
    for at in range(n):
        before[at], after[at] = at - 1, at + 1
        current[at] = rank_at(symbols, after, at, keys, ranks)
        size = push(heap, size, current[at], at)
    while size > 0:
        rank, at = heap[0] >> 32, heap[0] & 0xFFFFFFFF
        size -= 1
        heap[0] = heap[size]
        sift_down(heap, size, 0)
        if current[at] != rank:
            continue
        gone = after[at]
        symbols[at] = joined[slot_of(keys, symbols[at], symbols[gone])]
        symbols[gone], current[gone] = EMPTY, EMPTY
        after[at] = after[gone]
        if after[at] < n:
            before[after[at]] = at
        for begin in (np.int64(before[at]), at):
            if begin >= 0:
                current[begin] = rank_at(symbols, after, begin, keys, ranks)
                size = push(heap, size, current[begin], begin)
    living: Ints = symbols[symbols != EMPTY]
    return living
