"""The tables of a vocabulary that compiled code reads: tokens, pairs that merge, ids of bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import raw_entry
from glassllama.native.jit.memory import PADDING
from glassllama.native.tokenizers.pair_table import (
    EMPTY,
    PairTable,
    merge_rank_of,
    pair_table,
)
from glassllama.native.tokenizers.pretokenizer import character_classes
from glassllama.native.tokenizers.word_table import WordTable, add, find, word_table
from glassllama.tokenizers.vocabulary import BYTES, Vocabulary

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]

N_BYTES = 256


class VocabTables(NamedTuple):
    """The constant tables of the encoder."""

    classes: Bytes  # (0x110000,), see pretokenizer.character_classes
    tokens: WordTable  # token → id; empty unless words that are tokens are not merged
    pairs: PairTable
    byte_ids: Ints  # (256,), EMPTY where a byte has no token
    byte_pair_ranks: Ints  # (256, 256), merge ranks of two bytes, or EMPTY


def build_vocab_tables(vocabulary: Vocabulary) -> VocabTables:
    ids = vocabulary.ids
    byte_ids = np.array([ids.get(byte, EMPTY) for byte in BYTES], np.int32)
    tokens = token_table(vocabulary) if vocabulary.ignore_merges else word_table(2, 0)
    pairs = pair_table(vocabulary)
    byte_pair_ranks = np.full((N_BYTES, N_BYTES), EMPTY, np.int32)
    fill_byte_pair_ranks(byte_pair_ranks, byte_ids, pairs)
    return VocabTables(character_classes(), tokens, pairs, byte_ids, byte_pair_ranks)


@raw_entry
def fill_byte_pair_ranks(merge_ranks: Ints, byte_ids: Ints, pairs: PairTable) -> None:
    for left in range(N_BYTES):
        for right in range(N_BYTES):
            if byte_ids[left] != EMPTY and byte_ids[right] != EMPTY:
                merge_ranks[left, right] = merge_rank_of(byte_ids[left], byte_ids[right], pairs)


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
    """Add every token text[ends[k - 1] : ends[k]] with its id."""
    at = np.int64(0)
    for k in range(len(ends)):
        add(table, find(table, text, at, ends[k]), text, at, ends[k], np.uint64(ids[k]))
        at = ends[k]
