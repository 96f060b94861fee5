"""New words merged in turns: one word's next pairs are on their way while another word is merged.

    word 1   ask ─────────── put, choose, ask ─────────── put, …
    word 2        ask ─────────── put, choose, ask ────────
    word 3             ask ─────────── put, choose, ask ───      ask: `fetch_soon`, do not wait

The rule is that of `bpe.merge`. A word's symbols stay where their first byte is, and a bit for each
place says which are alive. Before the first and behind the last stands NOBODY, who merges with
none: no end needs a branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.byte_scan import leading_zeros, trailing_zeros
from glassllama.native.jit.compile import Int, raw_inlined
from glassllama.native.jit.memory import KEYS, lowest_key
from glassllama.native.tokenizers.pair_table import (
    EMPTY,
    LARGEST_ID,
    PairTable,
    fetch_pair,
    order_nearby,
)

if TYPE_CHECKING:
    from glassllama.native.tokenizers.vocab_tables import Known

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

AT_ONCE = 16  # words in work
PLACES = 64  # a bit for each in a machine word
SHORT_WORD = PLACES - 2  # bytes of the longest word with a place for NOBODY at both ends
PLACE_BITS, PLACE = 6, 63  # of a key: the place of a pair, below its order
NO_KEY = 2**32 - PLACES  # all keys from here on are those of pairs that do not merge
NOBODY = LARGEST_ID  # an id that no pair has
NO_WORD = -1
ONE, TWO, ALL = np.uint64(1), np.uint64(2), np.uint64(2**64 - 1)


class Turns(NamedTuple):
    """The words in work, a row for each. The byte k of a word is at place k + 1.

    A pair's key is its order and the place it begins at, so that the lowest key is the pair to
    merge, the leftmost of equals.
    """

    symbols: Ints  # (AT_ONCE, PLACES), ids
    keys: Ints  # (AT_ONCE, PLACES), unsigned: NO_KEY or more where nothing merges
    alive: NDArray[np.uint64]  # (AT_ONCE,), a bit for each place with a symbol, NOBODY included
    joined_at: Longs  # (AT_ONCE,), the place whose pairs have been asked for
    words: Longs  # (AT_ONCE,), which word, or NO_WORD


def turns() -> Turns:
    return Turns(
        np.empty((AT_ONCE, PLACES), np.int32),
        np.empty((AT_ONCE, PLACES), np.int32),
        np.empty(AT_ONCE, np.uint64),
        np.empty(AT_ONCE, np.int64),
        np.full(AT_ONCE, NO_WORD, np.int64),
    )


@raw_inlined
def begin(turns: Turns, row: Int, text: Bytes, at: Int, end: Int, known: Known) -> bool:
    """The bytes of a word as symbols, with the keys of their pairs; whether all have an id."""
    byte_ids, byte_orders, size = known.byte_ids, known.byte_orders, end - at
    symbols, keys, all_known = turns.symbols, turns.keys, True
    symbols[row, 0], symbols[row, size + 1], keys[row, 0] = NOBODY, NOBODY, EMPTY
    for k in range(size):
        id = byte_ids[text[at + k]]
        all_known &= id != EMPTY
        symbols[row, k + 1] = id
        put_key(keys, row, k + 1, np.int64(byte_orders[text[at + k], text[at + k + 1]]))
    for k in range(size, (size + KEYS) // KEYS * KEYS):  # the last symbol begins no pair
        keys[row, k] = EMPTY
    turns.alive[row] = ALL >> np.uint64(SHORT_WORD - size)
    return all_known


@raw_inlined
def put_key(keys: Ints, row: Int, place: Int, order: Int) -> None:
    keys[row, place] = np.int32(order << PLACE_BITS | place)


@raw_inlined
def behind(alive: Int, place: Int) -> Int:
    """The living places behind a place."""
    return alive & ~((TWO << np.uint64(place)) - ONE)


@raw_inlined
def before(alive: Int, place: Int) -> Int:
    """The last living place before a place."""
    return PLACE - leading_zeros(alive & ((ONE << np.uint64(place)) - ONE))


@raw_inlined
def put_keys(turns: Turns, row: Int, pairs: PairTable) -> None:
    """The keys of the two pairs that were asked for."""
    alive, here, symbols = turns.alive[row], turns.joined_at[row], turns.symbols
    previous, next_one = before(alive, here), trailing_zeros(behind(alive, here))
    joined = symbols[row, here]
    put_key(turns.keys, row, here, order_nearby(joined, symbols[row, next_one], pairs))
    put_key(turns.keys, row, previous, order_nearby(symbols[row, previous], joined, pairs))


@raw_inlined
def merge_lowest(turns: Turns, row: Int, size: Int, pairs: PairTable) -> bool:
    """Merge the pair that is first in order, and ask for the new symbol's pairs; False: none."""
    alive, symbols = turns.alive[row], turns.symbols
    key = lowest_key(turns.keys, row, 0)
    for first in range(KEYS, size, KEYS):
        key = min(key, lowest_key(turns.keys, row, first))
    if key >= NO_KEY:
        return False
    here = key & PLACE
    rest = behind(alive, here)
    gone, rest = trailing_zeros(rest), rest & (rest - ONE)
    joined = pairs.joined[key >> PLACE_BITS]
    symbols[row, here], turns.keys[row, gone] = joined, EMPTY
    turns.alive[row] = alive ^ (ONE << np.uint64(gone))
    turns.joined_at[row] = here
    fetch_pair(joined, symbols[row, trailing_zeros(rest)], pairs)
    fetch_pair(symbols[row, before(alive, here)], joined, pairs)
    return True


@raw_inlined
def ids_into(turns: Turns, row: Int, size: Int, out: Ids, n: Int) -> Int:
    """The ids of a word that is merged into out[n:]; the new n."""
    alive = turns.alive[row] & ((ONE << np.uint64(size + 1)) - TWO)
    while alive != 0:
        out[n] = turns.symbols[row, trailing_zeros(alive)]
        alive &= alive - ONE
        n += 1
    return n
