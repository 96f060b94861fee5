"""Text → ids at the speed of a corpus: words found in a table, in compiled loops.

Text repeats its words. So words are looked up by their bytes in a table (word_table.py), and only
those that were not seen before are made of tokens (interleaved_merge.py). When the table is full it
is emptied. Nothing is allocated on the way. Some two thousand words at a time go through four
loops: each does one thing, so that the processor can work on the next word while it waits for this
one.

    text ──next_words──▶ where words end ──look_up──▶ slots of the table ──write──▶ ids
                                              └─new words─▶ learn ─▶ their ids in the slots
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.base.locks import NonReentrantLock, synchronized
from glassllama.native.jit.byte_scan import PADDING, WINDOW, padded
from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.native.jit.memory import fetch_soon
from glassllama.native.tokenizers.interleaved_merge import (
    AT_ONCE,
    NO_WORD,
    SHORT_WORD,
    Turns,
    begin,
    ids_into,
    merge_lowest,
    put_keys,
    turns,
)
from glassllama.native.tokenizers.pair_table import Room, room
from glassllama.native.tokenizers.pretokenizer import RULES, next_ends, piece_end
from glassllama.native.tokenizers.vocab_tables import Known, known, long_ids, merge_long
from glassllama.native.tokenizers.word_table import (
    LENGTH_BYTES,
    LONG_BYTES,
    N_WORDS,
    VALUE,
    WordTable,
    add,
    clear,
    find,
    slot_after,
    word_table,
)

if TYPE_CHECKING:
    from glassllama.tokenizers.bpe import Vocabulary

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

WORD_SLOTS = 2**17  # three quarters of them are used: a text's words within many pages
KEPT_BYTES = 2**21  # for words of more than 15 bytes
KEPT_IDS = 2**20  # for words of more than three ids
WORDS = 2**11  # that go through the loops together
DESK = 2**18  # ids that are made before they are put together
LONGEST_COPIED, PIECE = 2**19, 2**14  # characters
UTF8_BYTES = 4  # of a character, at most
AT, STOP = range(2)  # where the loops are: in the text, and where the piece ends
NOT_KEPT = -1  # instead of a slot, for words longer than SHORT_WORD
# A value of the table: how many ids, and up to three of 20 bits each; MANY: count and place in
# `kept`. So that most words are written without a branch.
COUNT, ID_BITS, ID = np.uint64(60), np.uint64(20), np.uint64(2**20 - 1)
INLINE, MANY = 3, 15
ONE_ID = np.uint64(1 << 60)
PLACE_BITS, PLACE = np.uint64(40), np.uint64(2**40 - 1)
LARGEST_ID = 2**20 - 1


class Seen(NamedTuple):
    """What was learned from the text so far: words → ids."""

    words: WordTable
    kept: Ids  # (KEPT_IDS,)
    used: Longs  # (1,), how many of `kept`


class Desk(NamedTuple):
    """Where words lie between the loops, are merged, and where ids go."""

    ends: Longs  # where each word ends, behind where the first begins
    slots: Ints  # of each word in the table, or NOT_KEPT
    new: Ints  # which words were not in the table
    symbols: Ints  # this and all others are as long as the longest word may be
    room: Room
    turns: Turns
    out: Ids


def desk(longest: int) -> Desk:
    words = WORDS + WINDOW  # as many may be found at once behind the last but one
    return Desk(
        np.empty(words + 1, np.int64),
        np.empty(words, np.int32),
        np.empty(words, np.int32),
        np.empty(longest, np.int32),
        room(longest),
        turns(),
        np.full(longest, 0, np.uint32),
    )


class ArrayEncoder:
    """Text without control tokens → ids. One at a time: a second thread waits."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """KeyError: the vocabulary splits by a rule that is not compiled (see `has_rule`)."""
        self._rule = RULES[vocabulary.split.patterns]
        self._normal_form = vocabulary.split.normal_form
        self._known = known(vocabulary)
        self._seen = Seen(
            word_table(WORD_SLOTS, KEPT_BYTES),
            np.empty(KEPT_IDS, np.uint32),
            np.zeros(1, np.int64),
        )
        self._desk = desk(DESK)
        self._text = np.full(UTF8_BYTES * LONGEST_COPIED + PADDING, 0, np.uint8)
        self.lock = NonReentrantLock()

    @synchronized
    def __call__(self, text: str) -> Ids:
        """(T,) ids; UnicodeEncodeError where half of a surrogate pair is in the text."""
        if self._normal_form:
            text = normalize("NFC", text)
        parts, place = [], np.zeros(2, np.int64)
        data = self._bytes(text)
        while (before := int(place[AT])) < len(data) - PADDING:
            n = encode_words(data, place, self._rule, self._known, self._seen, self._desk)
            parts.append(self._desk.out[:n].copy())
            if place[AT] == before:  # the next words are longer than the desk
                self._desk = desk(2 * len(self._desk.out))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint32), *parts])

    def _bytes(self, text: str) -> Bytes:
        """The UTF-8 of a text, and PADDING zeros; in memory that was used before, where it fits.

        In pieces that fit a processor's cache. New memory for a text costs more than all of this.
        """
        if len(text) > LONGEST_COPIED:
            return padded(text)
        size = 0
        for at in range(0, len(text), PIECE):
            piece = text[at : at + PIECE].encode()
            self._text[size : size + len(piece)] = np.frombuffer(piece, np.uint8)
            size += len(piece)
        self._text[size : size + PADDING] = 0
        return self._text[: size + PADDING]


def has_rule(vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary's split is one that is compiled here, and its ids have a place."""
    is_known = vocabulary.split.patterns in RULES and not vocabulary.outside
    return is_known and len(vocabulary.tokens) <= LARGEST_ID


@raw_compiled
def next_words(text: Bytes, place: Longs, rule: Int, kinds: Bytes, desk: Desk) -> Int:
    """The ends of the next words into desk.ends; how many they are. Moves `place`."""
    at, stop, size = place[AT], place[STOP], len(text) - PADDING
    enough, far = len(desk.slots) - WINDOW, at + len(desk.out) // 2
    n = 0
    desk.ends[0] = at
    while at < size and at < far and n < enough:
        if at == stop:
            stop = piece_end(text, at, size, kinds, rule)
        n = next_ends(text, at, stop, rule, kinds, desk.ends, n + 1) - 1
        at = desk.ends[n]
    place[AT], place[STOP] = at, stop
    return n


@raw_compiled
def make_room(seen: Seen, words: Int) -> None:
    """See to it that so many words can be added: where there is no room, forget all others."""
    table = seen.words
    fits = 4 * (table.used[N_WORDS] + words) <= 3 * len(table.slots)
    fits &= table.used[LONG_BYTES] + (SHORT_WORD + LENGTH_BYTES) * words <= len(table.long)
    fits &= seen.used[0] + SHORT_WORD * words <= len(seen.kept)
    if not fits:
        clear(table)
        seen.used[0] = 0


@raw_compiled
def look_up(text: Bytes, words: Int, table: WordTable, tokens: WordTable, desk: Desk) -> Int:
    """The words' slots; those not found are added, without a value, and listed: how many."""
    n = 0
    for k in range(words):
        at, end = desk.ends[k], desk.ends[k + 1]
        if end - at > SHORT_WORD:
            desk.slots[k] = NOT_KEPT
            continue
        found = find(table, text, at, end)
        desk.slots[k] = found.slot
        if not found.known:
            add(table, found, text, at, end, np.uint64(0))
            fetch_soon(tokens.slots, slot_after(found.lo, found.hi, tokens.slots))
            desk.new[n] = k
            n += 1
    return n


@raw_compiled
def learn(text: Bytes, new: Int, known: Known, seen: Seen, desk: Desk, n: Int) -> None:
    """Give the new words their values; out[n:] is free to work in."""
    slots, merging = seen.words.slots, 0
    for k in range(new):
        word = desk.new[k]
        token = find(known.tokens, text, desk.ends[word], desk.ends[word + 1])
        if token.known:
            slots[desk.slots[word], VALUE] = ONE_ID | known.tokens.slots[token.slot, VALUE]
        else:
            desk.new[merging] = word
            merging += 1
    merge_new(text, merging, known, seen, desk, n)


@raw_compiled
def merge_new(text: Bytes, merging: Int, known: Known, seen: Seen, desk: Desk, n: Int) -> None:
    """The values of the first so many of the words in `new`, merged in turns."""
    taken, done, words, ends = np.int64(0), np.int64(0), desk.turns.words, desk.ends
    while done < merging:
        for row in range(AT_ONCE):
            if words[row] != NO_WORD:
                put_keys(desk.turns, row, known.pairs)
            elif taken < merging:
                word = np.int64(desk.new[taken])
                taken += 1
                if begin(desk.turns, row, text, ends[word], ends[word + 1], known):
                    words[row] = word
                else:
                    end = merge_long(text, ends[word], ends[word + 1], known, desk, n)
                    give_value(word, seen, desk, n, end)
                    done += 1
        for row in range(AT_ONCE):  # what was written above is read 16 at once: not too early
            word = words[row]
            if word == NO_WORD:
                continue
            size = ends[word + 1] - ends[word]
            if not merge_lowest(desk.turns, row, size, known.pairs):
                end = ids_into(desk.turns, row, size, desk.out, n)
                give_value(word, seen, desk, n, end)
                words[row] = NO_WORD
                done += 1


@raw_inlined
def give_value(word: Int, seen: Seen, desk: Desk, begin: Int, end: Int) -> None:
    slots = seen.words.slots
    slots[desk.slots[word], VALUE] = value_of(seen, desk.out, begin, end - begin)


@raw_inlined
def value_of(seen: Seen, out: Ids, begin: Int, size: Int) -> Int:
    """A value that holds `size` ids, or says where in `kept` they are."""
    if size <= INLINE:
        value = np.uint64(size) << COUNT
        for k in range(size):
            value |= np.uint64(out[begin + k]) << (ID_BITS * np.uint64(k))
        return value
    place = seen.used[0]
    for k in range(size):
        seen.kept[place + k] = out[begin + k]
    seen.used[0] += size
    return np.uint64(MANY) << COUNT | np.uint64(size) << PLACE_BITS | np.uint64(place)


@raw_inlined
def recall(seen: Seen, slot: Int, out: Ids, n: Int) -> Int:
    """The ids of a word into out[n:]; the new n. May write INLINE more."""
    value = seen.words.slots[slot, VALUE]
    count = np.int64(value >> COUNT)
    if count != MANY:
        out[n] = value & ID
        out[n + 1] = value >> ID_BITS & ID
        out[n + 2] = value >> (ID_BITS + ID_BITS) & ID
        return n + count
    count, place = np.int64(value >> PLACE_BITS & ID), np.int64(value & PLACE)
    for k in range(count):
        out[n + k] = seen.kept[place + k]
    return n + count


@raw_compiled
def write(text: Bytes, words: Int, known: Known, seen: Seen, desk: Desk, n: Int) -> Int:
    """The ids of all words into out[n:]; the new n."""
    for k in range(words):
        slot = desk.slots[k]
        if slot == NOT_KEPT:
            n = long_ids(text, desk.ends[k], desk.ends[k + 1], known, desk, n)
        else:
            n = recall(seen, slot, desk.out, n)
    return n


@raw_entry
def encode_words(text: Bytes, place: Longs, rule: Int, known: Known, seen: Seen, desk: Desk) -> Int:
    """The ids of the next words into desk.out, until it may be full; how many they are."""
    n, room = np.int64(0), len(desk.out) - INLINE
    while place[AT] < len(text) - PADDING:
        at, stop = place[AT], place[STOP]
        words = next_words(text, place, rule, known.kinds, desk)
        if n + place[AT] - at > room:  # words have no more ids than bytes
            place[AT], place[STOP] = at, stop
            break
        make_room(seen, words)
        new = look_up(text, words, seen.words, known.tokens, desk)
        learn(text, new, known, seen, desk, n)
        n = write(text, words, known, seen, desk, n)
    return n
