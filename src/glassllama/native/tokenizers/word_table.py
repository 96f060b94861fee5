"""Hash table for compiled code: words (bytes) → 64-bit values; and counting words with it.

    slot   lo: bytes 0–7   hi: bytes 8–14, length   value          words of up to 15 bytes
           lo: hash        hi: index in `long`      value          longer words

A short word is its own key, so that finding it reads one slot. The bytes of longer words are in one
array, each after its length. Open addressing; a caller limits how full the table gets. Compiled
code allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.native.jit.memory import PADDING, eight_bytes, put_eight_bytes, table_of_zeros
from glassllama.native.tokenizers.corpus_decoder import copy_tokens
from glassllama.native.tokenizers.pretokenizer import (
    RULES,
    character_classes,
    segment_end,
    word_end,
)
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.vocabulary import surrogate_error

Bytes = NDArray[np.uint8]
Longs = NDArray[np.int64]

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


def new_table(slots: int, long_bytes: int) -> WordTable:
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


# Counting

INITIAL_SLOTS = 2**16
INITIAL_LONG_BYTES = 2**16
BATCH_BYTES = 2**20  # small texts are collected and counted together
TEXT, AT, STOP = range(3)  # the cursor: index of the text, position, end of the segment


class WordCounts:
    """Counts the words of texts that are added one by one."""

    def __init__(self, split: Split) -> None:
        """KeyError: the split is not compiled (pretokenizer.RULES)."""
        self._rule = RULES[split.patterns]
        self._normalize_nfc = split.normalize_nfc
        self._table = new_table(INITIAL_SLOTS, INITIAL_LONG_BYTES)
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def add(self, text: str) -> None:
        """TokenizerError: the text contains a lone surrogate."""
        try:
            data = (normalize("NFC", text) if self._normalize_nfc else text).encode()
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes >= BATCH_BYTES:
            self._count()

    def _count(self) -> None:
        """Count the pending texts; a NUL after each ends its last word."""
        ends = np.cumsum([len(text) + 1 for text in self._pending], dtype=np.int64) - 1
        data = np.frombuffer(bytearray(1).join([*self._pending, bytes(PADDING)]), np.uint8)
        self._pending, self._pending_bytes = [], 0
        cursor = np.zeros(3, np.int64)
        while missing_bytes := count_words(
            data, ends, cursor, self._rule, character_classes(), self._table
        ):
            self._table = grown(self._table, missing_bytes)

    def arrays(self) -> tuple[Bytes, Longs, Longs]:
        """The bytes of all words one after the other, and the end and the count of each word, (W,).

        The most frequent words come first; the order does not depend on the order of the texts.
        """
        self._count()
        slots, long = self._table.slots, self._table.long
        slots = slots[slots[:, HI] != 0]
        slots = slots[np.lexsort((slots[:, HI], slots[:, LO], ~slots[:, VALUE]))]
        is_long = slots[:, HI] >= LONG_MARK
        begins, sizes = np.arange(len(slots)) * 16, (slots[:, HI] >> LENGTH).astype(np.int64)
        index = (slots[is_long, HI] ^ LONG_MARK).astype(np.int64)
        lengths = long[index[:, None] + np.arange(LENGTH_BYTES)]  # (long words, LENGTH_BYTES)
        sizes[is_long] = lengths.view(np.int64)[:, 0]
        begins[is_long] = 16 * len(slots) + index + LENGTH_BYTES
        keys = (
            np.ascontiguousarray(slots[:, : HI + 1]).view(np.uint8).ravel()
        )  # LO and HI: 16 bytes
        out = np.empty(int(sizes.sum()) + PADDING, np.uint8)
        source = np.concatenate([keys, long, np.zeros(PADDING, np.uint8)])
        copy_tokens(np.arange(len(slots), dtype=np.uint32), source, begins, sizes, out)
        return out[:-PADDING], np.cumsum(sizes), slots[:, VALUE].astype(np.int64)

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Every word and its count, the most frequent first."""
        text, ends, counts = self.arrays()
        begin = 0
        for end, count in zip(ends.tolist(), counts.tolist(), strict=True):
            yield text[begin:end].tobytes(), count
            begin = end


def grown(table: WordTable, missing_bytes: int) -> WordTable:
    """A copy with twice the capacity and `missing_bytes` more bytes."""
    new = new_table(2 * len(table.slots), 2 * len(table.long) + missing_bytes)
    new.long[: len(table.long)] = table.long
    new.used[:] = table.used
    move_words(table, new)
    return new


@raw_entry
def move_words(old: WordTable, new: WordTable) -> None:
    for k in range(len(old.slots)):
        if old.slots[k, HI] != 0:
            lo, hi = old.slots[k, LO], old.slots[k, HI]
            slot = slot_after(lo, LONG_MARK if hi & LONG_MARK != 0 else hi, new.slots)
            while new.slots[slot, HI] != 0:
                slot = (slot + np.uint64(1)) & np.uint64(len(new.slots) - 1)
            new.slots[slot, LO], new.slots[slot, HI] = lo, hi
            new.slots[slot, VALUE] = old.slots[k, VALUE]


@raw_entry
def count_words(
    data: Bytes, ends: Longs, cursor: Longs, rule: Int, classes: Bytes, table: WordTable
) -> Int:
    """Count the words of the texts that end at `ends`, from `cursor` on.

    Returns 0 if all are counted, else the number of bytes for which the table has no space.
    """
    for text in range(cursor[TEXT], len(ends)):
        at, stop, end_of_text = cursor[AT], cursor[STOP], ends[text]
        while at < end_of_text:
            if at == stop:
                stop = segment_end(data, at, end_of_text, classes, rule)
            end = word_end(data, at, stop, classes, rule)
            found = find(table, data, at, end)
            if found.exists:
                table.slots[found.slot, VALUE] += np.uint64(1)
            elif has_space(table, end - at):
                add(table, found, data, at, end, np.uint64(1))
            else:
                cursor[TEXT], cursor[AT], cursor[STOP] = text, at, stop
                return end - at + LENGTH_BYTES
            at = end
        cursor[AT] = cursor[STOP] = end_of_text + 1
    return 0
