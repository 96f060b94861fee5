"""Merges BATCH_SIZE new words in turns: table lookups of one word overlap the merging of others.

    word 1   prefetch ────── update keys, merge, prefetch ────── update keys, …
    word 2        prefetch ────── update keys, merge, prefetch ──────
    word 3             prefetch ────── update keys, merge, prefetch ──────

The rule is that of `bpe.merge`. A symbol stays at the position of its first byte, and a bit mask
says which positions are alive. A SENTINEL that merges with nothing stands before the first and
after the last symbol, so that the ends need no branch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_inlined
from glassllama.native.jit.memory import KEYS, leading_zeros, lowest_key, trailing_zeros
from glassllama.native.tokenizers.pair_table import (
    EMPTY,
    LARGEST_ID,
    PairTable,
    prefetch_pair,
    prefetched_merge_rank,
)
from glassllama.native.tokenizers.vocab_tables import VocabTables

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

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
    batch: MergeBatch, row: Int, text: Bytes, at: Int, end: Int, tables: VocabTables
) -> bool:
    """Set the symbols of a word and the keys of its pairs; False if a byte has no id."""
    byte_ids, byte_pair_ranks, size = tables.byte_ids, tables.byte_pair_ranks, end - at
    symbols, keys, all_known = batch.symbols, batch.keys, True
    symbols[row, 0], symbols[row, size + 1], keys[row, 0] = SENTINEL, SENTINEL, EMPTY
    for k in range(size):
        id = byte_ids[text[at + k]]
        all_known &= id != EMPTY
        symbols[row, k + 1] = id
        set_key(keys, row, k + 1, np.int64(byte_pair_ranks[text[at + k], text[at + k + 1]]))
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
