"""How often each word occurs in texts of any size: what a vocabulary is learned from.

The words lie in a hash table that doubles when half of it is taken (word_table.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.byte_scan import PADDING
from glassllama.native.jit.compile import Int, raw_entry
from glassllama.native.tokenizers.char_classes import character_kinds
from glassllama.native.tokenizers.pretokenizer import RULES, piece_end, word_end
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
    has_room,
    slot_after,
    word_table,
)
from glassllama.tokenizers.bpe import surrogate_error
from glassllama.tokenizers.pretokenizer import Split

Bytes = NDArray[np.uint8]
Longs = NDArray[np.int64]

FIRST_SLOTS = 2**16
FIRST_LONG_BYTES = 2**16
AT_ONCE = 2**20  # bytes of texts that are counted in one go
TEXT, AT, STOP = range(3)  # where the compiled loop is: which text, where, where the piece ends


class WordCounts:
    """Counts the words of one text after another; small texts are counted many at once."""

    def __init__(self, split: Split) -> None:
        """KeyError: a split that is not compiled (word_ends.RULES)."""
        self._rule = RULES[split.patterns]
        self._normal_form = split.normal_form
        self._table = word_table(FIRST_SLOTS, FIRST_LONG_BYTES)
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def add(self, text: str) -> None:
        """TokenizerError: half of a surrogate pair is in the text."""
        try:
            data = (normalize("NFC", text) if self._normal_form else text).encode()
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Count the texts that wait; a NUL between two keeps the first from running on."""
        ends = np.cumsum([len(text) + 1 for text in self._waiting], dtype=np.int64) - 1
        data = np.frombuffer(bytearray(1).join([*self._waiting, bytes(PADDING)]), np.uint8)
        self._waiting, self._waiting_bytes = [], 0
        place = np.zeros(3, np.int64)
        while needed := count_words(data, ends, place, self._rule, character_kinds(), self._table):
            self._table = larger(self._table, needed)

    def arrays(self) -> tuple[Bytes, Longs, Longs]:
        """The bytes of all words in a row, where each word ends, and how often it occurs, (W,).

        The most frequent come first, and the order does not depend on that of the texts.
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


def larger(table: WordTable, needed: int) -> WordTable:
    """The same words in twice the room, and `needed` more bytes."""
    new = word_table(2 * len(table.slots), 2 * len(table.long) + needed)
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
    data: Bytes, ends: Longs, place: Longs, rule: Int, kinds: Bytes, table: WordTable
) -> Int:
    """Count the words of texts that end at `ends`, from `place` on.

    0: all are counted; else how many bytes the table has no room for.
    """
    for text in range(place[TEXT], len(ends)):
        at, stop, end_of_text = place[AT], place[STOP], ends[text]
        while at < end_of_text:
            if at == stop:
                stop = piece_end(data, at, end_of_text, kinds, rule)
            end = word_end(data, at, stop, kinds, rule)
            found = find(table, data, at, end)
            if found.known:
                table.slots[found.slot, VALUE] += np.uint64(1)
            elif has_room(table, end - at):
                add(table, found, data, at, end, np.uint64(1))
            else:
                place[TEXT], place[AT], place[STOP] = text, at, stop
                return end - at + LENGTH_BYTES
            at = end
        place[AT] = place[STOP] = end_of_text + 1
    return 0


def n_bytes(slots: NDArray[np.uint64], long_bytes: int) -> int:
    """How many bytes the words in these slots have together."""
    is_long = slots[:, HI] >= LONG_MARK
    short = int((slots[~is_long, HI] >> LENGTH).sum())
    return short + long_bytes - LENGTH_BYTES * int(is_long.sum())


@raw_entry
def list_words(slots: NDArray[np.uint64], long: Bytes, text: Bytes, ends: Longs) -> None:
    """The bytes of all words in the order of the slots, and where each ends."""
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
