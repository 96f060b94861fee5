"""Counts the words (pretokens) of texts of any size, from which a vocabulary is learned.

The counts are in a hash table that doubles when half of its slots are in use (word_table.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_entry
from glassllama.native.jit.memory import PADDING
from glassllama.native.tokenizers.pretokenizer import (
    RULES,
    character_classes,
    segment_end,
    word_end,
)
from glassllama.native.tokenizers.word_table import (
    HI,
    LENGTH,
    LENGTH_BYTES,
    LO,
    LONG_BYTES,
    LONG_MARK,
    VALUE,
    WordTable,
    add,
    find,
    has_space,
    slot_after,
    word_table,
)
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.vocabulary import surrogate_error

Bytes = NDArray[np.uint8]
Longs = NDArray[np.int64]

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
        self._table = word_table(INITIAL_SLOTS, INITIAL_LONG_BYTES)
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
        slots = self._table.slots[self._table.slots[:, HI] != 0]
        slots = slots[np.lexsort((slots[:, HI], slots[:, LO], ~slots[:, VALUE]))]
        text = np.empty(n_bytes(slots, self._table.used[LONG_BYTES]), np.uint8)
        ends = np.empty(len(slots), np.int64)
        list_words(slots, self._table.long, text, ends)
        return text, ends, slots[:, VALUE].astype(np.int64)

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Every word and its count, the most frequent first."""
        text, ends, counts = self.arrays()
        begin = 0
        for end, count in zip(ends.tolist(), counts.tolist(), strict=True):
            yield text[begin:end].tobytes(), count
            begin = end


def grown(table: WordTable, missing_bytes: int) -> WordTable:
    """A copy with twice the capacity and `missing_bytes` more bytes."""
    new = word_table(2 * len(table.slots), 2 * len(table.long) + missing_bytes)
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


def n_bytes(slots: NDArray[np.uint64], long_bytes: int) -> int:
    """The number of bytes of all words in these slots."""
    is_long = slots[:, HI] >= LONG_MARK
    short = int((slots[~is_long, HI] >> LENGTH).sum())
    return short + long_bytes - LENGTH_BYTES * int(is_long.sum())


@raw_entry
def list_words(slots: NDArray[np.uint64], long: Bytes, text: Bytes, ends: Longs) -> None:
    """Write the bytes of all words, in the order of the slots, and the end of each."""
    at = np.int64(0)
    for k in range(len(slots)):
        lo, hi = slots[k, LO], slots[k, HI]
        if hi & LONG_MARK != 0:
            begin, size = np.int64(hi ^ LONG_MARK), np.int64(0)
            for b in range(LENGTH_BYTES):
                size |= np.int64(long[begin + b]) << (8 * b)
            for b in range(size):
                text[at + b] = long[begin + LENGTH_BYTES + b]
        else:
            size = np.int64(hi >> LENGTH)
            for b in range(8 if size > 8 else size):
                text[at + b] = (lo >> np.uint64(8 * b)) & np.uint64(0xFF)
            for b in range(8, size):
                text[at + b] = (hi >> np.uint64(8 * b - 64)) & np.uint64(0xFF)
        at += size
        ends[k] = at
