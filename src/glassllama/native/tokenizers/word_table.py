"""A hash table whose keys are words: bytes → a number. For compiled code, nothing is allocated.

    slot   lo: bytes 0–7   hi: bytes 8–14, length   value          words of up to 15 bytes
           lo: hash        hi: place in `long`      value          longer ones

A short word is its own key, so that finding it touches one slot. The bytes of longer words lie in
one array, each after its length. Open addressing; at most half of the slots are taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.byte_scan import eight_bytes, put_eight_bytes
from glassllama.native.jit.compile import Int, raw_compiled, raw_inlined
from glassllama.native.jit.memory import table_of_zeros

Bytes = NDArray[np.uint8]

LO, HI, VALUE = range(3)  # columns of a slot
N_WORDS, LONG_BYTES = range(2)  # what `used` counts
SHORT = 15  # bytes
LENGTH_BYTES = 8  # before a long word
EIGHT = 8  # bytes of a long word that are looked at together; the last ones may be so twice
LONG_MARK = np.uint64(1 << 63)  # in `hi`, where short words have a length of at most 15 << 56
# Odd constants of 64 random-looking bits: the golden ratio's, and those of splitmix64's mixer
# (Steele, Lea & Flood, 2014).
SPREAD_1 = np.uint64(0x9E3779B97F4A7C15)
SPREAD_2 = np.uint64(0xBF58476D1CE4E5B9)
HALF = np.uint64(32)
LENGTH = np.uint64(56)  # where it is in `hi`
# Which bits of bytes 0–7 and 8–15 belong to a word of 0, 1, … SHORT bytes.
FIRST_BYTES = np.array([2 ** (8 * min(size, 8)) - 1 for size in range(SHORT + 1)], np.uint64)
NEXT_BYTES = np.array([2 ** (8 * max(size - 8, 0)) - 1 for size in range(SHORT + 1)], np.uint64)


class WordTable(NamedTuple):
    """slots (a power of two, 3) uint64, zeros where free; long bytes; used: words, long bytes."""

    slots: NDArray[np.uint64]
    long: Bytes
    used: NDArray[np.int64]


class Found(NamedTuple):
    """A word's slot, or the free one where it would be, and its key."""

    slot: Int
    lo: Int
    hi: Int
    known: bool


def word_table(slots: int, long_bytes: int) -> WordTable:
    """An empty table; `slots` is a power of two."""
    return WordTable(
        table_of_zeros(slots, 3), np.empty(long_bytes, np.uint8), np.zeros(2, np.int64)
    )


@raw_inlined
def slot_after(lo: Int, hi: Int, slots: NDArray[np.uint64]) -> Int:
    """Where the search for a key begins."""
    mixed = (lo ^ (hi * SPREAD_2)) * SPREAD_1
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
def is_long_word(long: Bytes, place: Int, text: Bytes, at: Int, end: Int) -> bool:
    """Whether the long word kept at a place is this one."""
    size, kept = end - at, place + LENGTH_BYTES
    if eight_bytes(long, place) != np.uint64(size):
        return False
    same: bool = eight_bytes(long, kept + size - EIGHT) == eight_bytes(text, end - EIGHT)
    for k in range(0, size - EIGHT, EIGHT):
        same &= eight_bytes(long, kept + k) == eight_bytes(text, at + k)
    return same


@raw_inlined
def find_long(table: WordTable, text: Bytes, at: Int, end: Int) -> Found:
    slots = table.slots
    lo = np.uint64(end - at) ^ eight_bytes(text, end - EIGHT)
    for k in range(at, end - EIGHT, EIGHT):
        lo = (lo ^ (lo >> HALF)) * SPREAD_1 ^ eight_bytes(text, k)
    lo = (lo ^ (lo >> HALF)) * SPREAD_2
    hi = LONG_MARK | np.uint64(table.used[LONG_BYTES])  # where it would be kept
    slot = slot_after(lo, LONG_MARK, slots)
    while slots[slot, HI] != 0:
        kept = slots[slot, HI]
        if slots[slot, LO] == lo and kept & LONG_MARK != 0:
            place = np.int64(kept ^ LONG_MARK)
            if is_long_word(table.long, place, text, at, end):
                return Found(slot, lo, kept, True)
        slot = (slot + np.uint64(1)) & np.uint64(len(slots) - 1)
    return Found(slot, lo, hi, False)


@raw_inlined
def find(table: WordTable, text: Bytes, at: Int, end: Int) -> Found:
    """Look up text[at:end], which is not empty."""
    if end - at <= SHORT:
        return find_short(table.slots, text, at, end)
    return find_long(table, text, at, end)


@raw_compiled
def has_room(table: WordTable, size: Int) -> bool:
    """Whether a word of `size` more bytes may be added."""
    fits: bool = size <= SHORT or table.used[LONG_BYTES] + LENGTH_BYTES + size <= len(table.long)
    return fits and 2 * (table.used[N_WORDS] + 1) <= len(table.slots)


@raw_compiled
def add(table: WordTable, found: Found, text: Bytes, at: Int, end: Int, value: Int) -> None:
    """Keep a word that was not found, where there is room."""
    table.slots[found.slot, LO] = found.lo
    table.slots[found.slot, HI] = found.hi
    table.slots[found.slot, VALUE] = value
    table.used[N_WORDS] += 1
    if end - at > SHORT:
        keep_long(table, text, at, end)


@raw_inlined
def keep_long(table: WordTable, text: Bytes, at: Int, end: Int) -> None:
    """The length and the bytes of a long word, behind all others."""
    place, size = table.used[LONG_BYTES], end - at
    put_eight_bytes(table.long, place, np.uint64(size))
    place += LENGTH_BYTES
    for k in range(0, size - EIGHT, EIGHT):
        put_eight_bytes(table.long, place + k, eight_bytes(text, at + k))
    put_eight_bytes(table.long, place + size - EIGHT, eight_bytes(text, end - EIGHT))
    table.used[LONG_BYTES] = place + size


@raw_compiled
def clear(table: WordTable) -> None:
    table.slots[:] = 0
    table.used[:] = 0
