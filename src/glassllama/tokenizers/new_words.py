"""The ids of one word that was not seen before: a token of the vocabulary, or merged.

The rules are those of `bpe.merge`, on ids and tables instead of bytes and dictionaries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.tokenizers.bpe import BYTES
from glassllama.tokenizers.compiled import Int, compiled, entry, inlined
from glassllama.tokenizers.eight_bytes import PADDING
from glassllama.tokenizers.long_words import (
    EMPTY,
    LARGEST_ID,
    PairTable,
    merge_linked,
    order_of,
    pair_table,
)
from glassllama.tokenizers.word_ends import character_kinds
from glassllama.tokenizers.word_table import VALUE, WordTable, add, find, word_table

if TYPE_CHECKING:
    from glassllama.tokenizers.array_encoder import Desk
    from glassllama.tokenizers.bpe import Vocabulary

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Ints = NDArray[np.int32]

SHORT_WORD = 64  # bytes; longer words are merged with a heap
PLACE_BITS, PLACE = 6, 63  # of a key: the place of a pair, below its order
NO_KEY = 2**32 - SHORT_WORD  # all keys from here on are those of pairs that do not merge
LANES = 8  # keys that are compared without a look at how many there are
BEFORE = SHORT_WORD + LANES  # where the symbol before the first one is
NOBODY = LARGEST_ID  # an id that no pair has
N_BYTES = 256


class Known(NamedTuple):
    """What does not change: the split, the vocabulary's words and pairs, the ids of bytes."""

    kinds: Bytes  # (0x110000,), see word_ends
    tokens: WordTable  # whole words → id; empty where words are always merged
    pairs: PairTable
    byte_ids: Ints  # (256,), EMPTY where a byte has no token
    byte_orders: Ints  # (256, 256), the orders of two bytes, EMPTY where they do not merge


def known(vocabulary: Vocabulary) -> Known:
    ids = vocabulary.ids
    byte_ids = np.array([ids.get(byte, EMPTY) for byte in BYTES], np.int32)
    tokens = token_table(vocabulary) if vocabulary.whole_words else word_table(2, 0)
    pairs = pair_table(vocabulary)
    byte_orders = np.full((N_BYTES, N_BYTES), EMPTY, np.int32)
    fill_byte_orders(byte_orders, byte_ids, pairs)
    return Known(character_kinds(), tokens, pairs, byte_ids, byte_orders)


@entry
def fill_byte_orders(orders: Ints, byte_ids: Ints, pairs: PairTable) -> None:
    for left in range(N_BYTES):
        for right in range(N_BYTES):
            if byte_ids[left] != EMPTY and byte_ids[right] != EMPTY:
                orders[left, right] = order_of(byte_ids[left], byte_ids[right], pairs)


def token_table(vocabulary: Vocabulary) -> WordTable:
    """The vocabulary's tokens → their ids."""
    tokens = list(vocabulary.ids)
    text = np.frombuffer(bytearray().join([*tokens, bytes(PADDING)]), np.uint8)
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
    at = np.int64(0)
    for k in range(len(ends)):
        add(table, find(table, text, at, ends[k]), text, at, ends[k], np.uint64(ids[k]))
        at = ends[k]


@inlined
def lowest(keys: Ints, n: Int) -> Int:
    """The lowest of the first n keys, a multiple of LANES."""
    best = np.uint32(NO_KEY)
    for k in range(0, n, LANES):  # one by one they come straight from where they were written
        first = min(min(key_at(keys, k), key_at(keys, k + 1)), key_at(keys, k + 2))
        second = min(min(key_at(keys, k + 3), key_at(keys, k + 4)), key_at(keys, k + 5))
        best = min(min(best, min(key_at(keys, k + 6), key_at(keys, k + 7))), min(first, second))
    return np.int64(best)


@inlined
def key_at(keys: Ints, at: Int) -> Int:
    return np.uint32(keys[at])


@inlined
def put_key(keys: Ints, at: Int, order: Int) -> None:
    keys[at] = np.int32(order << PLACE_BITS | at)


@compiled
def merge_short(text: Bytes, at: Int, end: Int, known: Known, desk: Desk, n: Int) -> Int:
    """Merge a word of at most SHORT_WORD bytes: ids into out[n:]; the new n.

    `bpe.merge` on a linked list that stays in place. A pair's key is its order and its place, so
    that the lowest key is the pair to merge, the leftmost of equals. Before the first symbol and
    behind the last stands NOBODY, who merges with none: no end needs a branch.
    """
    symbols, pairs = desk.symbols, known.pairs
    keys, after, before = desk.room.current, desk.room.after, desk.room.before
    size, all_known = end - at, True
    for k in range(size):
        symbols[k], after[k], before[k] = known.byte_ids[text[at + k]], k + 1, k - 1
        all_known &= symbols[k] != EMPTY
        put_key(keys, k, np.int64(known.byte_orders[text[at + k], text[at + k + 1]]))
    if not all_known:
        return merge_long(text, at, end, known, desk, n)
    lanes = (size - 1 + LANES - 1) // LANES * LANES  # the last symbol begins no pair
    for k in range(size - 1, lanes):
        keys[k] = EMPTY
    symbols[size], symbols[BEFORE], before[0] = NOBODY, NOBODY, BEFORE
    while True:
        key = lowest(keys, lanes)
        if key >= NO_KEY:
            break
        here = key & PLACE
        gone, previous = np.int64(after[here]), np.int64(before[here])
        next_one = np.int64(after[gone])
        joined = pairs.joined[key >> PLACE_BITS]
        symbols[here], after[here], before[next_one] = joined, next_one, here
        keys[gone] = EMPTY
        put_key(keys, here, order_of(joined, symbols[next_one], pairs))
        put_key(keys, previous, order_of(symbols[previous], joined, pairs))
    here = np.int64(0)
    while here < size:
        desk.out[n] = symbols[here]
        n += 1
        here = np.int64(after[here])
    return n


@compiled
def merge_long(text: Bytes, at: Int, end: Int, known: Known, desk: Desk, n: Int) -> Int:
    """Merge any word, bytes without a token left out: ids into out[n:]; the new n."""
    symbols, size = desk.symbols, np.int64(0)
    for k in range(at, end):
        id = known.byte_ids[text[k]]
        if id != EMPTY:
            symbols[size] = id
            size += 1
    size = merge_linked(symbols, size, desk.room, known.pairs)
    for k in range(size):
        desk.out[n + k] = symbols[k]
    return n + size


@compiled
def long_ids(text: Bytes, at: Int, end: Int, known: Known, desk: Desk, n: Int) -> Int:
    """The ids of any word into out[n:]; the new n."""
    token = find(known.tokens, text, at, end)
    if token.known:
        desk.out[n] = known.tokens.slots[token.slot, VALUE]
        return n + 1
    return merge_long(text, at, end, known, desk, n)
