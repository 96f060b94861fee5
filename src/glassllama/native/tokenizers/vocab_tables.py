"""What is known before any text is seen, and the ids of one long word by it.

The rules are those of `bpe.merge`, on ids and tables instead of bytes and dictionaries. Short
words that are new are merged in interleaved_merge.py, several at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.byte_scan import PADDING
from glassllama.native.jit.compile import Int, raw_compiled, raw_entry
from glassllama.native.tokenizers.char_classes import character_kinds
from glassllama.native.tokenizers.pair_table import (
    EMPTY,
    PairTable,
    merge_linked,
    order_of,
    pair_table,
)
from glassllama.native.tokenizers.word_table import VALUE, WordTable, add, find, word_table
from glassllama.tokenizers.bpe import BYTES

if TYPE_CHECKING:
    from glassllama.native.tokenizers.corpus_encoder import Desk
    from glassllama.tokenizers.bpe import Vocabulary

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Ints = NDArray[np.int32]

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


@raw_entry
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


@raw_entry
def fill_tokens(
    table: WordTable, text: Bytes, ends: NDArray[np.int64], ids: NDArray[np.int64]
) -> None:
    """Add every token, text[ends[k - 1] : ends[k]], with its id."""
    at = np.int64(0)
    for k in range(len(ends)):
        add(table, find(table, text, at, ends[k]), text, at, ends[k], np.uint64(ids[k]))
        at = ends[k]


@raw_compiled
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


@raw_compiled
def long_ids(text: Bytes, at: Int, end: Int, known: Known, desk: Desk, n: Int) -> Int:
    """The ids of any word into out[n:]; the new n."""
    token = find(known.tokens, text, at, end)
    if token.known:
        desk.out[n] = known.tokens.slots[token.slot, VALUE]
        return n + 1
    return merge_long(text, at, end, known, desk, n)
