"""Table of the pairs that merge; merging of long words with a heap, and of short words in turns.

The rule is that of `bpe.merge`, which searches all ranks after every merge: quadratic in the length
of the word. Here the candidates are in a heap ordered by (rank, position), and a merge changes only
its two neighbors: n log n. A plain counterpart is in tokenizers/backend.py.

    symbols   h  e  l  l  o            heap: (rank of "he", 0), (rank of "ll", 2), …
    after     1  2  3  4  5            merge at 2: symbols[2] = "ll", after[2] = 4, 3 is removed

Of short words BATCH_SIZE merge in turns: table lookups of one overlap the merging of others.

    word 1   prefetch ────── update keys, merge, prefetch ────── update keys, …
    word 2        prefetch ────── update keys, merge, prefetch ──────
    word 3             prefetch ────── update keys, merge, prefetch ──────

A symbol stays at the position of its first byte, and a bit mask says which positions are alive. A
SENTINEL that merges with nothing stands before the first and after the last symbol, so that the
ends need no branch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError
from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.native.jit.memory import (
    KEYS,
    SLOTS,
    fetch_soon,
    leading_zeros,
    lowest_key,
    slot_of_key,
    table_of_zeros,
    trailing_zeros,
)
from glassllama.tokenizers.vocabulary import Vocabulary

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

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
    heap: Longs  # (2n,): every merge removes one entry and adds at most two


def new_scratch(n: int) -> MergeScratch:
    lists = np.empty((3, n), np.int32)
    return MergeScratch(lists[0], lists[1], lists[2], np.empty(2 * n, np.int64))


def of_vocabulary(vocabulary: Vocabulary) -> PairTable:
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
    index = hashed >> np.uint64(64 - FILTER_BITS)
    return index >> np.uint64(6), np.uint64(1) << (index & np.uint64(63))


@raw_entry
def fill(table: PairTable, lefts: Longs, rights: Longs, merge_ranks: Longs) -> None:
    slots = table.slots
    for k in range(len(merge_ranks)):
        key = np.uint64(lefts[k]) << ID_BITS | np.uint64(rights[k])
        line, at = line_of(slots, key * HASH_FACTOR), 0
        while slots[line, at] != 0 and slots[line, at] >> MERGE_RANK_BITS != key:
            at += 1
            if at == SLOTS:
                line, at = (line + np.uint64(1)) & np.uint64(len(slots) - 1), 0
        slots[line, at] = key << MERGE_RANK_BITS | np.uint64(merge_ranks[k] + 1)
        index, bit = filter_bit(key * HASH_FACTOR)
        table.bitmap_filter[index] |= bit


@raw_inlined
def merge_rank_of(left: Int, right: Int, table: PairTable) -> Int:
    """The merge rank of a pair, or EMPTY."""
    key = np.uint64(left) << ID_BITS | np.uint64(right)
    index, bit = filter_bit(key * HASH_FACTOR)
    line = line_of(table.slots, key * HASH_FACTOR)
    fetch_soon(table.slots, line)  # while the filter is read
    if table.bitmap_filter[index] & bit == 0:
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
def sift_down(heap: Longs, size: Int, at: Int) -> None:
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
def sift_up(heap: Longs, at: Int) -> None:
    item = heap[at]
    while at > 0 and heap[(at - 1) // 2] > item:
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = item


@raw_compiled
def push(heap: Longs, size: Int, merge_rank: Int, at: Int, table: PairTable) -> Int:
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
    """Merge the first n symbols in index; returns how many remain, moved to the front.

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


# Short words

BATCH_SIZE = 16  # words that are merged in turns
POSITIONS = 64  # bits of a machine word
SHORT_WORD = POSITIONS - 2  # bytes of the longest word: a SENTINEL at both ends
POSITION_BITS, POSITION_MASK = 6, 63  # of a key: the position, below the merge rank
NO_KEY = 2**32 - POSITIONS  # this and higher keys: the pair does not merge
SENTINEL = LARGEST_ID  # an id that no pair has
NO_WORD = -1
ONE, TWO, ALL = np.uint64(1), np.uint64(2), np.uint64(2**64 - 1)


class MergeBatch(NamedTuple):
    """The words being merged, one per row. Byte k of a word is at position k + 1.

    The key of a pair is its merge rank and its position: the lowest key is the pair to merge, the
    leftmost of equal ones.
    """

    symbols: Ints  # (BATCH_SIZE, POSITIONS), ids
    keys: Ints  # (BATCH_SIZE, POSITIONS), unsigned; NO_KEY or more: no merge
    alive: NDArray[np.uint64]  # (BATCH_SIZE,), a bit for each position with a symbol
    merged_at: Longs  # (BATCH_SIZE,), the position whose pairs were prefetched
    words: Longs  # (BATCH_SIZE,), index of the word, or NO_WORD


def new_batch() -> MergeBatch:
    return MergeBatch(
        np.empty((BATCH_SIZE, POSITIONS), np.int32),
        np.empty((BATCH_SIZE, POSITIONS), np.int32),
        np.empty(BATCH_SIZE, np.uint64),
        np.empty(BATCH_SIZE, np.int64),
        np.full(BATCH_SIZE, NO_WORD, np.int64),
    )


@raw_inlined
def start_word(
    batch: MergeBatch, row: Int, text: Bytes, at: Int, end: Int, byte_ids: Ints, ranks: Ints
) -> bool:
    """Set the symbols of a word and the keys of its pairs; False if a byte has no id.

    `ranks`: the merge ranks of two bytes, (256, 256).
    """
    symbols, keys, size, all_known = batch.symbols, batch.keys, end - at, True
    symbols[row, 0], symbols[row, size + 1], keys[row, 0] = SENTINEL, SENTINEL, EMPTY
    for k in range(size):
        id = byte_ids[text[at + k]]
        all_known &= id != EMPTY
        symbols[row, k + 1] = id
        set_key(keys, row, k + 1, np.int64(ranks[text[at + k], text[at + k + 1]]))
    for k in range(size, (size + KEYS) // KEYS * KEYS):  # the last symbol starts no pair
        keys[row, k] = EMPTY
    batch.alive[row] = ALL >> np.uint64(SHORT_WORD - size)
    return all_known


@raw_inlined
def set_key(keys: Ints, row: Int, position: Int, merge_rank: Int) -> None:
    keys[row, position] = np.int32(merge_rank << POSITION_BITS | position)


@raw_inlined
def alive_after(alive: Int, position: Int) -> Int:
    """The mask of the positions after `position` that are alive."""
    return alive & ~((TWO << np.uint64(position)) - ONE)


@raw_inlined
def last_alive_before(alive: Int, position: Int) -> Int:
    """The last position before `position` that is alive."""
    return POSITION_MASK - leading_zeros(alive & ((ONE << np.uint64(position)) - ONE))


@raw_inlined
def update_keys(batch: MergeBatch, row: Int, pairs: PairTable) -> None:
    """Set the keys of the two pairs that were prefetched."""
    alive, here, symbols = batch.alive[row], batch.merged_at[row], batch.symbols
    previous, next_one = last_alive_before(alive, here), trailing_zeros(alive_after(alive, here))
    joined = symbols[row, here]
    set_key(batch.keys, row, here, prefetched_merge_rank(joined, symbols[row, next_one], pairs))
    set_key(batch.keys, row, previous, prefetched_merge_rank(symbols[row, previous], joined, pairs))


@raw_inlined
def merge_lowest(batch: MergeBatch, row: Int, size: Int, pairs: PairTable) -> bool:
    """Merge the pair with the lowest key and prefetch the new pairs; False if none merges."""
    alive, symbols = batch.alive[row], batch.symbols
    key = lowest_key(batch.keys, row, 0)
    for first in range(KEYS, size, KEYS):
        key = min(key, lowest_key(batch.keys, row, first))
    if key >= NO_KEY:
        return False
    here = key & POSITION_MASK
    rest = alive_after(alive, here)
    removed, rest = trailing_zeros(rest), rest & (rest - ONE)
    joined = pairs.joined[key >> POSITION_BITS]
    symbols[row, here], batch.keys[row, removed] = joined, EMPTY
    batch.alive[row] = alive ^ (ONE << np.uint64(removed))
    batch.merged_at[row] = here
    prefetch_pair(joined, symbols[row, trailing_zeros(rest)], pairs)
    prefetch_pair(symbols[row, last_alive_before(alive, here)], joined, pairs)
    return True


@raw_inlined
def write_merged_ids(batch: MergeBatch, row: Int, size: Int, out: Ids, n: Int) -> Int:
    """Write the ids of a merged word to out[n:]; returns the new n."""
    alive = batch.alive[row] & ((ONE << np.uint64(size + 1)) - TWO)
    while alive != 0:
        out[n] = batch.symbols[row, trailing_zeros(alive)]
        alive &= alive - ONE
        n += 1
    return n
