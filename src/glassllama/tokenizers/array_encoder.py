"""Text → ids at the speed of a corpus: words found in a table, in one compiled loop.

Text repeats its words. So the loop finds where a word ends (word_ends.py), looks its bytes up in a
table (word_table.py), and only words that were not seen before are merged, by the rules of
`bpe.merge`. Nothing is allocated on the way but for words longer than SHORT_WORD. When the table
is full it is emptied.

    text ──word_end──▶ bytes ──find──▶ ids of the word ──▶ out
                         └─not there─▶ merge ─▶ out, and into the table
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.tokenizers.bpe import BYTES
from glassllama.tokenizers.compiled import Int, compiled, entry, inlined
from glassllama.tokenizers.eight_bytes import PADDING, padded
from glassllama.tokenizers.long_words import (
    EMPTY,
    PairTable,
    Room,
    joined_of,
    merge_linked,
    pair_table,
    rank_of,
    room,
)
from glassllama.tokenizers.word_ends import RULES, character_kinds, piece_end, word_end
from glassllama.tokenizers.word_table import (
    VALUE,
    WordTable,
    add,
    clear,
    find,
    has_room,
    word_table,
)

if TYPE_CHECKING:
    from glassllama.tokenizers.bpe import Vocabulary

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Ints = NDArray[np.int32]

SHORT_WORD = 64  # bytes; longer words are merged with a heap, and not kept
WORD_SLOTS = 2**17  # half of them are used: a text's words within many pages
KEPT_BYTES = 2**20  # for words of more than 15 bytes
KEPT_IDS = 2**19  # for words of more than one id
DESK = 2**18  # ids that are made before they are put together
AT, STOP = range(2)  # where the compiled loop is: in the text, and where the piece ends
# A value of the table: how many ids, and up to three of 20 bits each; MANY: count and place in
# `kept`. So that most words are written without a branch.
COUNT, ID_BITS, ID = np.uint64(60), np.uint64(20), np.uint64(2**20 - 1)
INLINE, MANY = 3, 15
PLACE_BITS, PLACE = np.uint64(40), np.uint64(2**40 - 1)
HALF, LOW_HALF, NO_RANK = np.uint64(32), np.uint64(2**32 - 1), np.uint64(2**64 - 1)
LARGEST_ID = 2**20 - 1
N_BYTES = 256


class Known(NamedTuple):
    """What does not change: the split, the vocabulary's words and pairs, the ids of bytes."""

    kinds: Bytes  # (0x110000,), see word_ends
    tokens: WordTable  # whole words → id; empty where words are always merged
    pairs: PairTable
    byte_ids: Ints  # (256,), EMPTY where a byte has no token
    byte_ranks: Ints  # (256, 256), the ranks of two bytes, EMPTY where they do not merge


class Seen(NamedTuple):
    """What was learned from the text so far: words → ids."""

    words: WordTable
    kept: Ids  # (KEPT_IDS,)
    used: NDArray[np.int64]  # (1,), how many of `kept`


class Desk(NamedTuple):
    """Where words are merged, and where ids go; as long as the longest word may be."""

    symbols: Ints
    room: Room
    out: Ids


def desk(longest: int) -> Desk:
    return Desk(np.empty(longest, np.int32), room(longest), np.empty(longest, np.uint32))


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
        self._lock = threading.Lock()

    def __call__(self, text: str) -> Ids:
        """(T,) ids; UnicodeEncodeError where half of a surrogate pair is in the text."""
        data = padded(normalize("NFC", text) if self._normal_form else text)
        parts, place = [np.empty(0, np.uint32)], np.zeros(2, np.int64)
        with self._lock:
            while (before := int(place[AT])) < len(data) - PADDING:
                n = encode_words(data, place, self._rule, self._known, self._seen, self._desk)
                parts.append(self._desk.out[:n].copy())
                if place[AT] == before:  # the next word is longer than the desk
                    self._desk = desk(2 * len(self._desk.out))
        return np.concatenate(parts)

    def forget(self) -> None:
        """Empty the table of words, as it is at the beginning."""
        with self._lock:
            self._seen.words.slots[:] = 0
            self._seen.words.used[:] = 0
            self._seen.used[:] = 0


def has_rule(vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary's split is one that is compiled here, and its ids have a place."""
    return vocabulary.split.patterns in RULES and len(vocabulary.tokens) <= LARGEST_ID


def known(vocabulary: Vocabulary) -> Known:
    ids = vocabulary.ids
    byte_ids = np.array([ids.get(byte, EMPTY) for byte in BYTES], np.int32)
    tokens = token_table(vocabulary) if vocabulary.whole_words else word_table(2, 0)
    pairs = pair_table(vocabulary)
    byte_ranks = np.full((N_BYTES, N_BYTES), EMPTY, np.int32)
    fill_byte_ranks(byte_ranks, byte_ids, pairs)
    return Known(character_kinds(), tokens, pairs, byte_ids, byte_ranks)


@entry
def fill_byte_ranks(ranks: Ints, byte_ids: Ints, pairs: PairTable) -> None:
    for left in range(N_BYTES):
        for right in range(N_BYTES):
            if byte_ids[left] != EMPTY and byte_ids[right] != EMPTY:
                ranks[left, right] = rank_of(byte_ids[left], byte_ids[right], pairs)


def token_table(vocabulary: Vocabulary) -> WordTable:
    """The vocabulary's tokens → their ids."""
    tokens = list(vocabulary.ids)
    text = np.frombuffer(b"".join([*tokens, bytes(PADDING)]), np.uint8)
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    slots = 1 << max(4, (2 * len(tokens)).bit_length())
    table = word_table(slots, len(text) + 8 * len(tokens))
    fill_tokens(table, text, ends, np.fromiter(vocabulary.ids.values(), np.int64))
    return table


@entry
def fill_tokens(
    table: WordTable, text: Bytes, ends: NDArray[np.int64], ids: NDArray[np.int64]
) -> None:
    """Add every token, text[ends[k - 1] : ends[k]], with its id."""
    at = 0
    for k in range(len(ends)):
        add(table, find(table, text, at, ends[k]), text, at, ends[k], ids[k])
        at = ends[k]


@inlined
def lowest_rank(ranks: Ints, n: Int) -> Int:
    """Where the lowest of the first n ranks is, the leftmost of equals; EMPTY: there is none."""
    best = NO_RANK
    for k in range(n):
        best = min(best, np.uint64(np.uint32(ranks[k])) << HALF | np.uint64(k))  # no branch
    return EMPTY if best >> HALF == NO_RANK >> HALF else np.int64(best & LOW_HALF)


@inlined
def merge_short(text: Bytes, at: Int, end: Int, known: Known, desk: Desk, n: Int) -> Int:
    """Merge a short word whose bytes all have tokens: ids into out[n:]; the new n.

    `bpe.merge` on a linked list that stays in place; the last symbol begins no pair.
    """
    symbols, pairs = desk.symbols, known.pairs
    ranks, after, before = desk.room.current, desk.room.after, desk.room.before
    last = end - at - 1
    for k in range(last):
        symbols[k], after[k], before[k] = known.byte_ids[text[at + k]], k + 1, k - 1
        ranks[k] = known.byte_ranks[text[at + k], text[at + k + 1]]
    symbols[last], after[last], before[last] = known.byte_ids[text[end - 1]], last + 1, last - 1
    while True:
        here = lowest_rank(ranks, last)
        if here == EMPTY:
            break
        gone = after[here]
        next_one, previous = np.int64(after[gone]), np.int64(before[here])
        symbols[here] = joined_of(symbols[here], symbols[gone], pairs)
        after[here], ranks[here] = next_one, EMPTY
        if gone < last:
            ranks[gone] = EMPTY
        if next_one <= last:
            before[next_one] = here
            ranks[here] = rank_of(symbols[here], symbols[next_one], pairs)
        if previous >= 0:
            ranks[previous] = rank_of(symbols[previous], symbols[here], pairs)
    here = 0
    while here <= last:
        desk.out[n] = symbols[here]
        n += 1
        here = np.int64(after[here])
    return n


@compiled
def merge_long(text: Bytes, at: Int, end: Int, known: Known, desk: Desk, n: Int) -> Int:
    """Merge any word, bytes without a token left out: ids into out[n:]; the new n."""
    symbols, size = desk.symbols, 0
    for k in range(at, end):
        id = known.byte_ids[text[k]]
        if id != EMPTY:
            symbols[size] = id
            size += 1
    size = merge_linked(symbols, size, desk.room, known.pairs)
    for k in range(size):
        desk.out[n + k] = symbols[k]
    return n + size


@inlined
def merge_word(text: Bytes, at: Int, end: Int, known: Known, desk: Desk, n: Int) -> Int:
    """The ids of text[at:end] into out[n:]; the new n."""
    token = find(known.tokens, text, at, end)
    if token.known:
        desk.out[n] = known.tokens.slots[token.slot, VALUE]
        return n + 1
    is_short = end - at <= SHORT_WORD
    for k in range(at, end):
        is_short &= known.byte_ids[text[k]] != EMPTY
    if is_short:
        return merge_short(text, at, end, known, desk, n)
    return merge_long(text, at, end, known, desk, n)


@inlined
def remember(text: Bytes, at: Int, end: Int, seen: Seen, out: Ids, begin: Int, size: Int) -> None:
    """Keep a word's ids, `size` of them; where there is no more room, forget all others."""
    if not has_room(seen.words, end - at) or seen.used[0] + size > len(seen.kept):
        clear(seen.words)
        seen.used[0] = 0
    if size <= INLINE:
        value = np.uint64(size) << COUNT
        for k in range(size):
            value |= np.uint64(out[begin + k]) << (ID_BITS * np.uint64(k))
    else:
        value = np.uint64(MANY) << COUNT | np.uint64(size) << PLACE_BITS | np.uint64(seen.used[0])
        for k in range(size):
            seen.kept[seen.used[0] + k] = out[begin + k]
        seen.used[0] += size
    add(seen.words, find(seen.words, text, at, end), text, at, end, value)


@inlined
def recall(seen: Seen, slot: Int, out: Ids, n: Int) -> Int:
    """The ids of a word that was seen before into out[n:]; the new n. May write INLINE more."""
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


@entry
def encode_words(
    text: Bytes, place: NDArray[np.int64], rule: Int, known: Known, seen: Seen, desk: Desk
) -> Int:
    """The ids of the next words into desk.out, until it may be full; how many they are."""
    at, stop, n = place[AT], place[STOP], 0
    size, room = len(text) - PADDING, len(desk.out) - INLINE
    while at < size:
        if at == stop:
            stop = piece_end(text, at, size, known.kinds, rule)
        end = word_end(text, at, stop, known.kinds, rule)
        if n + end - at > room:  # a word has no more ids than bytes
            break
        if end - at > SHORT_WORD:
            n = merge_word(text, at, end, known, desk, n)
        else:
            found = find(seen.words, text, at, end)
            if found.known:
                n = recall(seen, found.slot, desk.out, n)
            else:
                before = n
                n = merge_word(text, at, end, known, desk, n)
                remember(text, at, end, seen, desk.out, before, n - before)
        at = end
    place[AT], place[STOP] = at, stop
    return n
