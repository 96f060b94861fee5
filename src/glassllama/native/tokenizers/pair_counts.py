"""Counted words as symbols, and the pairs in them: what changes when a pair is merged, and no more.

    word      ␣  l  o  w            positions in one row, words one after the other
    after     1  2  3  –            the next living position of the word, and `before` the last
    pair_of   ␣l lo ow –            the pair that begins at a position; the positions of a pair are
                                    a list in both directions, so that any of them leaves at once

Merging `l o` touches its positions only: at each, two pairs go (␣l, ow) and two come (␣lo, low).
A heap knows the most frequent pair: entries are true or too high, and a too high one is corrected
when it comes to the top.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

NONE = -1
N_PAIRS, HEAP_SIZE, N_TOUCHED = range(3)  # what `used` counts
COUNT, KEY = range(2)  # columns of the heap
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # see pair_table.py


class Rows(NamedTuple):
    """The words, (N,) positions; what is said of a position is NONE where it has ended."""

    symbols: Ints
    word: Ints  # which word it belongs to
    after: Ints
    before: Ints
    pair_of: Ints
    next_same: Ints  # the next position with the same pair
    last_same: Ints
    counts: Longs  # (W,) how often each word occurs


class Pairs(NamedTuple):
    """All pairs that ever were; `places` finds them by key = left << 32 | right."""

    places: Ints  # hash table of numbers of pairs, a power of two long, at most half full
    keys: Longs
    counts: Longs
    n_positions: Longs
    first: Ints  # a position of each
    touched: Ints  # pairs that became more frequent in this merge
    is_touched: NDArray[np.bool_]
    heap: Longs  # (…, 2): count and key
    used: Longs


def new_pairs(capacity: int) -> Pairs:
    """Room for a number of pairs, a power of two."""
    longs, ints = np.empty((3, capacity), np.int64), np.empty((2, capacity), np.int32)
    return Pairs(
        places=np.full(2 * capacity, NONE, np.int32),
        keys=longs[0],
        counts=longs[1],
        n_positions=longs[2],
        first=ints[0],
        touched=ints[1],
        is_touched=np.zeros(capacity, np.bool_),
        heap=np.empty((2 * capacity, 2), np.int64),
        used=np.zeros(3, np.int64),
    )


def new_rows(symbols: Ints, ends: Longs, counts: Longs) -> Rows:
    """Words, given as their symbols in a row, where each ends, and how often it occurs."""
    word, after, before, pair_of, next_same, last_same = np.empty((6, len(symbols)), np.int32)
    rows = Rows(symbols, word, after, before, pair_of, next_same, last_same, counts)
    lay_out(rows, ends)
    return rows


def with_room(pairs: Pairs, more: int) -> Pairs:
    """The same pairs, and room for `more` of them, on the heap too."""
    n_pairs, heap_size = pairs.used[N_PAIRS], pairs.used[HEAP_SIZE]
    capacity = len(pairs.keys)
    if n_pairs + more <= capacity and heap_size + more <= len(pairs.heap):
        return pairs
    while n_pairs + more > capacity or heap_size + more > 2 * capacity:
        capacity *= 2
    new = new_pairs(capacity)
    for name in ("keys", "counts", "n_positions", "first"):
        getattr(new, name)[:n_pairs] = getattr(pairs, name)[:n_pairs]
    new.heap[:heap_size] = pairs.heap[:heap_size]
    new.used[:] = pairs.used
    index_all(new)
    return new


@raw_inlined
def place_of(pairs: Pairs, key: Int) -> Int:
    """Where in `places` a pair is, or the free place where it would be."""
    mask = np.uint64(len(pairs.places) - 1)
    place = ((np.uint64(key) * SPREAD) >> np.uint64(32)) & mask
    while pairs.places[place] != NONE and pairs.keys[pairs.places[place]] != key:
        place = (place + np.uint64(1)) & mask
    return place


@raw_entry
def index_all(pairs: Pairs) -> None:
    for pair in range(pairs.used[N_PAIRS]):
        pairs.places[place_of(pairs, pairs.keys[pair])] = pair


@raw_inlined
def more_frequent(pairs: Pairs, a: Int, b: Int) -> Int:
    """Whether entry a goes before b: the higher count, of equals the smaller left and right id."""
    heap = pairs.heap
    if heap[a, COUNT] != heap[b, COUNT]:
        return heap[a, COUNT] > heap[b, COUNT]
    return heap[a, KEY] < heap[b, KEY]


@raw_inlined
def swap(heap: Longs, a: Int, b: Int) -> None:
    heap[a, COUNT], heap[b, COUNT] = heap[b, COUNT], heap[a, COUNT]
    heap[a, KEY], heap[b, KEY] = heap[b, KEY], heap[a, KEY]


@raw_compiled
def push(pairs: Pairs, count: Int, key: Int) -> None:
    at = pairs.used[HEAP_SIZE]
    pairs.heap[at, COUNT], pairs.heap[at, KEY] = count, key
    pairs.used[HEAP_SIZE] += 1
    while at > 0 and more_frequent(pairs, at, (at - 1) // 2):
        swap(pairs.heap, at, (at - 1) // 2)
        at = (at - 1) // 2


@raw_compiled
def pop(pairs: Pairs) -> None:
    """Take the first entry off."""
    size = pairs.used[HEAP_SIZE] - 1
    pairs.used[HEAP_SIZE] = size
    swap(pairs.heap, 0, size)
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and more_frequent(pairs, child + 1, child):
            child += 1
        if not more_frequent(pairs, child, at):
            break
        swap(pairs.heap, at, child)
        at = child


@raw_inlined
def begin_pair(rows: Rows, pairs: Pairs, at: Int) -> None:
    """The pair that begins at a position has come to be, if there is one."""
    if rows.after[at] == NONE:
        return
    key = (np.int64(rows.symbols[at]) << 32) | np.int64(rows.symbols[rows.after[at]])
    place = place_of(pairs, key)
    pair = np.int64(pairs.places[place])
    if pair == NONE:
        pair = pairs.used[N_PAIRS]
        pairs.used[N_PAIRS] += 1
        pairs.places[place] = pair
        pairs.keys[pair], pairs.counts[pair], pairs.n_positions[pair] = key, 0, 0
        pairs.first[pair], pairs.is_touched[pair] = NONE, False
    pairs.counts[pair] += rows.counts[rows.word[at]]
    pairs.n_positions[pair] += 1
    first = pairs.first[pair]
    rows.pair_of[at], rows.next_same[at], rows.last_same[at] = pair, first, NONE
    if first != NONE:
        rows.last_same[first] = at
    pairs.first[pair] = at
    if not pairs.is_touched[pair]:
        pairs.is_touched[pair] = True
        pairs.touched[pairs.used[N_TOUCHED]] = pair
        pairs.used[N_TOUCHED] += 1


@raw_inlined
def end_pair(rows: Rows, pairs: Pairs, at: Int) -> None:
    """The pair that begins at a position is no more, if there was one."""
    pair = np.int64(rows.pair_of[at])
    if pair == NONE:
        return
    pairs.counts[pair] -= rows.counts[rows.word[at]]
    pairs.n_positions[pair] -= 1
    following, previous = rows.next_same[at], rows.last_same[at]
    if following != NONE:
        rows.last_same[following] = previous
    if previous != NONE:
        rows.next_same[previous] = following
    else:
        pairs.first[pair] = following
    rows.pair_of[at] = NONE


@raw_compiled
def push_touched(pairs: Pairs) -> None:
    for k in range(pairs.used[N_TOUCHED]):
        pair = pairs.touched[k]
        pairs.is_touched[pair] = False
        if pairs.counts[pair] > 0:
            push(pairs, pairs.counts[pair], pairs.keys[pair])
    pairs.used[N_TOUCHED] = 0


@raw_entry
def lay_out(rows: Rows, ends: Longs) -> None:
    """Link the positions of each word, which ends at ends[w]; the symbols are there already."""
    at = 0
    for word in range(len(ends)):
        begin = at
        while at < ends[word]:
            rows.word[at] = word
            rows.before[at] = at - 1 if at > begin else NONE
            rows.after[at] = at + 1 if at + 1 < ends[word] else NONE
            rows.pair_of[at] = NONE
            at += 1


@raw_entry
def begin_pairs(rows: Rows, pairs: Pairs, begin: Int, end: Int) -> None:
    """Count the pairs of these positions, for which there must be room."""
    for at in range(begin, end):
        begin_pair(rows, pairs, at)
    push_touched(pairs)


@raw_entry
def most_frequent(pairs: Pairs) -> Int:
    """The number of the most frequent pair, taken off the heap; NONE when none is left."""
    while pairs.used[HEAP_SIZE] > 0:
        count, key = pairs.heap[0, COUNT], pairs.heap[0, KEY]
        pair = pairs.places[place_of(pairs, key)]
        pop(pairs)
        if pairs.counts[pair] == count:
            return pair
        if 0 < pairs.counts[pair] < count:  # if it is higher, another entry says so
            push(pairs, pairs.counts[pair], key)
    return NONE


@raw_entry
def positions_of(rows: Rows, pairs: Pairs, pair: Int, positions: Ints, words: Ints) -> None:
    """Where a pair is, in no particular order; the first of the words that it is in, or NONE."""
    words[:] = NONE
    at, n = pairs.first[pair], 0
    while at != NONE:
        positions[n] = at
        n += 1
        word = rows.word[at]
        for k in range(len(words)):  # an insertion into those that come before
            if word == words[k] or word == NONE:
                break
            if words[k] == NONE or word < words[k]:
                word, words[k] = words[k], word
        at = rows.next_same[at]


@raw_entry
def merge_at(rows: Rows, pairs: Pairs, pair: Int, positions: Ints, joined: Int) -> None:
    """Put one symbol in the place of a pair at these positions; of `a a a` the first two merge."""
    for k in range(len(positions)):
        at = np.int64(positions[k])
        if rows.pair_of[at] != pair:
            continue
        gone, last = np.int64(rows.after[at]), np.int64(rows.before[at])
        end_pair(rows, pairs, at)
        end_pair(rows, pairs, gone)
        if last != NONE:
            end_pair(rows, pairs, last)
        following = np.int64(rows.after[gone])
        rows.symbols[at], rows.after[at] = joined, following
        if following != NONE:
            rows.before[following] = at
        if last != NONE:
            begin_pair(rows, pairs, last)
        begin_pair(rows, pairs, at)
    push_touched(pairs)
