"""Hash table for compiled code: words (bytes) → 64-bit values. Nothing is allocated.

    slot   lo: bytes 0–7   hi: bytes 8–14, length   value          words of up to 15 bytes
           lo: hash        hi: index in `long`      value          longer words

A short word is its own key, so that finding it reads one slot. The bytes of longer words are in one
array, each after its length. Open addressing; a caller limits how full the table gets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_compiled, raw_inlined
from glassllama.native.jit.memory import eight_bytes, put_eight_bytes, table_of_zeros

Bytes = NDArray[np.uint8]

LO, HI, VALUE = range(3)  # columns of a slot
N_WORDS, LONG_BYTES = range(2)  # elements of `used`
SHORT = 15  # bytes
LENGTH_BYTES = 8  # before a long word
BLOCK = 8  # bytes of a long word that are compared at once; the last block may overlap
LONG_MARK = np.uint64(1 << 63)  # in `hi`, where short words have a length of at most 15 << 56
# Multipliers for hashing: 2^64 / golden ratio, and one of splitmix64 (Steele, Lea & Flood, 2014).
HASH_FACTOR_1 = np.uint64(0x9E3779B97F4A7C15)
HASH_FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9)
HALF = np.uint64(32)
LENGTH = np.uint64(56)  # shift of the length in `hi`
# Masks of bytes 0–7 and 8–15 for words of 0, 1, … SHORT bytes.
FIRST_BYTES = np.array([2 ** (8 * min(size, 8)) - 1 for size in range(SHORT + 1)], np.uint64)
NEXT_BYTES = np.array([2 ** (8 * max(size - 8, 0)) - 1 for size in range(SHORT + 1)], np.uint64)


class WordTable(NamedTuple):
    """slots (2^k, 3), zeros where free; bytes of long words; number of words and of their bytes."""

    slots: NDArray[np.uint64]
    long: Bytes
    used: NDArray[np.int64]


class Found(NamedTuple):
    """The slot of a word, or the free slot for it, and its key."""

    slot: Int
    lo: Int
    hi: Int
    exists: bool


def word_table(slots: int, long_bytes: int) -> WordTable:
    """An empty table; `slots` is a power of two."""
    return WordTable(
        table_of_zeros(slots, 3), np.empty(long_bytes, np.uint8), np.zeros(2, np.int64)
    )


@raw_inlined
def slot_after(lo: Int, hi: Int, slots: NDArray[np.uint64]) -> Int:
    """The slot at which the search for a key starts."""
    mixed = (lo ^ (hi * HASH_FACTOR_2)) * HASH_FACTOR_1
    return (mixed ^ (mixed >> HALF)) & np.uint64(len(slots) - 1)


@raw_inlined
def find_short(slots: NDArray[np.uint64], text: Bytes, at: Int, end: Int) -> Found:
    size = end - at
    lo = eight_bytes(text, at) & FIRST_BYTES[size]
    hi = eight_bytes(text, at + 8) & NEXT_BYTES[size] | np.uint64(size) << LENGTH
    slot = slot_after(lo, hi, slots)
    while slots[slot, HI] != 0:
        if slots[slot, LO] == lo and slots[slot, HI] == hi:
            return Found(slot, lo, hi, True)
        slot = (slot + np.uint64(1)) & np.uint64(len(slots) - 1)
    return Found(slot, lo, hi, False)


@raw_inlined
def is_long_word(long: Bytes, index: Int, text: Bytes, at: Int, end: Int) -> bool:
    """Whether the long word stored at an index is text[at:end]."""
    size, start = end - at, index + LENGTH_BYTES
    if eight_bytes(long, index) != np.uint64(size):
        return False
    same: bool = eight_bytes(long, start + size - BLOCK) == eight_bytes(text, end - BLOCK)
    for k in range(0, size - BLOCK, BLOCK):
        same &= eight_bytes(long, start + k) == eight_bytes(text, at + k)
    return same


@raw_inlined
def find_long(table: WordTable, text: Bytes, at: Int, end: Int) -> Found:
    slots = table.slots
    lo = np.uint64(end - at) ^ eight_bytes(text, end - BLOCK)
    for k in range(at, end - BLOCK, BLOCK):
        lo = (lo ^ (lo >> HALF)) * HASH_FACTOR_1 ^ eight_bytes(text, k)
    lo = (lo ^ (lo >> HALF)) * HASH_FACTOR_2
    hi = LONG_MARK | np.uint64(table.used[LONG_BYTES])  # where it would be stored
    slot = slot_after(lo, LONG_MARK, slots)
    while slots[slot, HI] != 0:
        stored = slots[slot, HI]
        if slots[slot, LO] == lo and stored & LONG_MARK != 0:
            index = np.int64(stored ^ LONG_MARK)
            if is_long_word(table.long, index, text, at, end):
                return Found(slot, lo, stored, True)
        slot = (slot + np.uint64(1)) & np.uint64(len(slots) - 1)
    return Found(slot, lo, hi, False)


@raw_inlined
def find(table: WordTable, text: Bytes, at: Int, end: Int) -> Found:
    """Look up text[at:end], which must not be empty."""
    if end - at <= SHORT:
        return find_short(table.slots, text, at, end)
    return find_long(table, text, at, end)


@raw_compiled
def has_space(table: WordTable, size: Int) -> bool:
    """Whether a word of `size` bytes fits and at most half of the slots would be in use."""
    fits: bool = size <= SHORT or table.used[LONG_BYTES] + LENGTH_BYTES + size <= len(table.long)
    return fits and 2 * (table.used[N_WORDS] + 1) <= len(table.slots)


@raw_compiled
def add(table: WordTable, found: Found, text: Bytes, at: Int, end: Int, value: Int) -> None:
    """Add a word that was not found; the caller has checked that it fits."""
    table.slots[found.slot, LO] = found.lo
    table.slots[found.slot, HI] = found.hi
    table.slots[found.slot, VALUE] = value
    table.used[N_WORDS] += 1
    if end - at > SHORT:
        append_long(table, text, at, end)


@raw_inlined
def append_long(table: WordTable, text: Bytes, at: Int, end: Int) -> None:
    """Append the length and the bytes of a long word."""
    index, size = table.used[LONG_BYTES], end - at
    put_eight_bytes(table.long, index, np.uint64(size))
    index += LENGTH_BYTES
    for k in range(0, size - BLOCK, BLOCK):
        put_eight_bytes(table.long, index + k, eight_bytes(text, at + k))
    put_eight_bytes(table.long, index + size - BLOCK, eight_bytes(text, end - BLOCK))
    table.used[LONG_BYTES] = index + size


@raw_compiled
def clear(table: WordTable) -> None:
    table.slots[:] = 0
    table.used[:] = 0
