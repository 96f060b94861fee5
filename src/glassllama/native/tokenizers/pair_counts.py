"""Learning merges in compiled code: a merge changes only the pairs at its positions.

    symbols   ␣  l  o  w            all words one after the other
    after     1  2  3  –            the next position of the word that is alive; `before` likewise
    pair_of   ␣l lo ow –            the pair that starts at a position; the positions of a pair are
                                    a doubly linked list

Merging `l o` removes two pairs (␣l, ow) and adds two (␣lo, low) at each of its positions. A heap
gives the most frequent pair. Its entries are correct or too high; an entry that is too high is
corrected when it reaches the top. The plain counterpart is `tokenizers.train.learn_merges`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Progress
from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.tokenizers.backend import MIN_COUNT, NUM_EXAMPLES, Merge
from glassllama.tokenizers.vocabulary import BYTE_TOKENS

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

NONE = -1
N_PAIRS, HEAP_SIZE, N_CHANGED = range(3)  # elements of `used`
COUNT, KEY = range(2)  # columns of the heap
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # see pair_table.py
INITIAL_CAPACITY = 2**14  # pairs
CHUNK = 2**20  # positions whose pairs are counted in one call
MAX_POSITIONS = 2**31 - 1  # int32


class Symbols(NamedTuple):
    """The symbols of all words, (N,) positions; NONE where a position or link does not exist."""

    symbols: Ints
    word: Ints  # index of the word
    after: Ints
    before: Ints
    pair_of: Ints
    next_same: Ints  # the next position of the same pair
    previous_same: Ints
    counts: Longs  # (W,), of each word


class PairCounts(NamedTuple):
    """All pairs so far. `slots` is a hash table: key = left << 32 | right → index of the pair."""

    slots: Ints  # a power of two long, at most half full
    keys: Longs
    counts: Longs
    n_positions: Longs
    first: Ints  # head of the list of positions
    changed: Ints  # pairs that became more frequent in this merge
    is_changed: NDArray[np.bool_]
    heap: Longs  # (…, 2): count and key
    used: Longs


def new_pairs(capacity: int) -> PairCounts:
    """No pairs yet; `capacity` is a power of two."""
    longs, ints = np.empty((3, capacity), np.int64), np.empty((2, capacity), np.int32)
    return PairCounts(
        slots=np.full(2 * capacity, NONE, np.int32),
        keys=longs[0],
        counts=longs[1],
        n_positions=longs[2],
        first=ints[0],
        changed=ints[1],
        is_changed=np.zeros(capacity, np.bool_),
        heap=np.empty((2 * capacity, 2), np.int64),
        used=np.zeros(3, np.int64),
    )


def new_symbols(symbols: Ints, ends: Longs, counts: Longs) -> Symbols:
    """`symbols` of all words, the end of each word, and its count."""
    sizes, at = np.diff(ends, prepend=0), np.arange(len(symbols), dtype=np.int32)
    after, before = at + 1, at - 1
    after[ends - 1] = before[ends - sizes] = NONE
    word = np.repeat(np.arange(len(ends), dtype=np.int32), sizes)
    next_same, previous_same = np.empty((2, len(symbols)), np.int32)
    pair_of = np.full(len(symbols), NONE, np.int32)
    return Symbols(symbols, word, after, before, pair_of, next_same, previous_same, counts)


def with_capacity(pairs: PairCounts, more: int) -> PairCounts:
    """The same pairs with space for `more` pairs and heap entries."""
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
def slot_of(pairs: PairCounts, key: Int) -> Int:
    """The slot of a pair, or the free slot for it."""
    mask = np.uint64(len(pairs.slots) - 1)
    slot = ((np.uint64(key) * HASH_FACTOR) >> np.uint64(32)) & mask
    while pairs.slots[slot] != NONE and pairs.keys[pairs.slots[slot]] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@raw_entry
def index_all(pairs: PairCounts) -> None:
    for pair in range(pairs.used[N_PAIRS]):
        pairs.slots[slot_of(pairs, pairs.keys[pair])] = pair


@raw_inlined
def more_frequent(pairs: PairCounts, a: Int, b: Int) -> Int:
    """Whether heap entry a precedes b: higher count, then smaller left and right id."""
    heap = pairs.heap
    if heap[a, COUNT] != heap[b, COUNT]:
        return heap[a, COUNT] > heap[b, COUNT]
    return heap[a, KEY] < heap[b, KEY]


@raw_inlined
def swap(heap: Longs, a: Int, b: Int) -> None:
    heap[a, COUNT], heap[b, COUNT] = heap[b, COUNT], heap[a, COUNT]
    heap[a, KEY], heap[b, KEY] = heap[b, KEY], heap[a, KEY]


@raw_compiled
def push(pairs: PairCounts, count: Int, key: Int) -> None:
    at = pairs.used[HEAP_SIZE]
    pairs.heap[at, COUNT], pairs.heap[at, KEY] = count, key
    pairs.used[HEAP_SIZE] += 1
    while at > 0 and more_frequent(pairs, at, (at - 1) // 2):
        swap(pairs.heap, at, (at - 1) // 2)
        at = (at - 1) // 2


@raw_compiled
def pop(pairs: PairCounts) -> None:
    """Remove the first entry of the heap."""
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
def add_pair(words: Symbols, pairs: PairCounts, at: Int) -> None:
    """Count the pair that starts at a position, if there is one."""
    if words.after[at] == NONE:
        return
    key = (np.int64(words.symbols[at]) << 32) | np.int64(words.symbols[words.after[at]])
    slot = slot_of(pairs, key)
    pair = np.int64(pairs.slots[slot])
    if pair == NONE:
        pair = pairs.used[N_PAIRS]
        pairs.used[N_PAIRS] += 1
        pairs.slots[slot] = pair
        pairs.keys[pair], pairs.counts[pair], pairs.n_positions[pair] = key, 0, 0
        pairs.first[pair], pairs.is_changed[pair] = NONE, False
    pairs.counts[pair] += words.counts[words.word[at]]
    pairs.n_positions[pair] += 1
    first = pairs.first[pair]
    words.pair_of[at], words.next_same[at], words.previous_same[at] = pair, first, NONE
    if first != NONE:
        words.previous_same[first] = at
    pairs.first[pair] = at
    if not pairs.is_changed[pair]:
        pairs.is_changed[pair] = True
        pairs.changed[pairs.used[N_CHANGED]] = pair
        pairs.used[N_CHANGED] += 1


@raw_inlined
def remove_pair(words: Symbols, pairs: PairCounts, at: Int) -> None:
    """Uncount the pair that starts at a position, if there is one."""
    pair = np.int64(words.pair_of[at])
    if pair == NONE:
        return
    pairs.counts[pair] -= words.counts[words.word[at]]
    pairs.n_positions[pair] -= 1
    following, previous = words.next_same[at], words.previous_same[at]
    if following != NONE:
        words.previous_same[following] = previous
    if previous != NONE:
        words.next_same[previous] = following
    else:
        pairs.first[pair] = following
    words.pair_of[at] = NONE


@raw_compiled
def push_changed(pairs: PairCounts) -> None:
    for k in range(pairs.used[N_CHANGED]):
        pair = pairs.changed[k]
        pairs.is_changed[pair] = False
        if pairs.counts[pair] > 0:
            push(pairs, pairs.counts[pair], pairs.keys[pair])
    pairs.used[N_CHANGED] = 0


@raw_entry
def count_pairs(words: Symbols, pairs: PairCounts, begin: Int, end: Int) -> None:
    """Count the pairs at positions begin … end - 1; the capacity must suffice."""
    for at in range(begin, end):
        add_pair(words, pairs, at)
    push_changed(pairs)


@raw_entry
def most_frequent(pairs: PairCounts) -> Int:
    """Pop the most frequent pair and return its index; NONE if no pair is left."""
    while pairs.used[HEAP_SIZE] > 0:
        count, key = pairs.heap[0, COUNT], pairs.heap[0, KEY]
        pair = pairs.slots[slot_of(pairs, key)]
        pop(pairs)
        if pairs.counts[pair] == count:
            return pair
        if 0 < pairs.counts[pair] < count:  # a higher count has another entry
            push(pairs, pairs.counts[pair], key)
    return NONE


@raw_entry
def positions_of(
    words: Symbols, pairs: PairCounts, pair: Int, positions: Ints, first_words: Ints
) -> None:
    """Write the positions of a pair, unordered, and the first words that contain it, or NONE."""
    first_words[:] = NONE
    at, n = pairs.first[pair], 0
    while at != NONE:
        positions[n] = at
        n += 1
        word = words.word[at]
        for k in range(len(first_words)):  # insertion into a sorted list
            if word == first_words[k] or word == NONE:
                break
            if first_words[k] == NONE or word < first_words[k]:
                word, first_words[k] = first_words[k], word
        at = words.next_same[at]


@raw_entry
def merge_at(words: Symbols, pairs: PairCounts, pair: Int, positions: Ints, joined: Int) -> None:
    """Replace a pair by one symbol at these positions; of `a a a` the first two merge."""
    for k in range(len(positions)):
        at = np.int64(positions[k])
        if words.pair_of[at] != pair:
            continue
        removed, last = np.int64(words.after[at]), np.int64(words.before[at])
        remove_pair(words, pairs, at)
        remove_pair(words, pairs, removed)
        if last != NONE:
            remove_pair(words, pairs, last)
        following = np.int64(words.after[removed])
        words.symbols[at], words.after[at] = joined, following
        if following != NONE:
            words.before[following] = at
        if last != NONE:
            add_pair(words, pairs, last)
        add_pair(words, pairs, at)
    push_changed(pairs)


def learn_from_counts(
    text: Bytes, ends: Longs, counts: Longs, num_tokens: int, progress: Progress | None
) -> list[Merge]:
    """Merge the most frequent pair until there are `num_tokens` tokens, or no pair is left.

    `text` are the bytes of all different words, `ends` (W,) where each ends, `counts` (W,) how
    often it occurs, the most frequent words first.
    """
    tokens = list(BYTE_TOKENS)
    ids = {token: id for id, token in enumerate(tokens)}
    words, pairs = initial_pairs(text, ends, counts)
    merges: list[Merge] = []
    examples = np.empty(NUM_EXAMPLES, np.int32)
    while len(tokens) < num_tokens:
        pair = most_frequent(pairs)
        if pair < 0 or pairs.counts[pair] < MIN_COUNT:
            break
        count, key = int(pairs.counts[pair]), int(pairs.keys[pair])
        left, right = key >> 32, key & 0xFFFFFFFF
        joined = ids.setdefault(tokens[left] + tokens[right], len(tokens))
        if joined == len(tokens):
            tokens.append(tokens[left] + tokens[right])
        positions = np.empty(pairs.n_positions[pair], np.int32)
        positions_of(words, pairs, pair, positions, examples)
        if left == right:
            positions.sort()  # of three in a row the first two merge
        merges.append(Merge(left, right, joined, count, word_texts(examples, text, ends)))
        pairs = with_capacity(pairs, 2 * len(positions) + 1)
        merge_at(words, pairs, pair, positions, joined)
        if progress is not None:
            progress(len(tokens), num_tokens)
    return merges


def word_texts(words: Ints, text: Bytes, ends: Longs) -> tuple[bytes, ...]:
    """The bytes of words; NONE is skipped."""
    found = [int(word) for word in words if word != NONE]
    return tuple(text[ends[w - 1] if w else 0 : ends[w]].tobytes() for w in found)


def initial_pairs(text: Bytes, ends: Longs, counts: Longs) -> tuple[Symbols, PairCounts]:
    """Every byte as a symbol, and the counts of all pairs."""
    if len(text) > MAX_POSITIONS:
        raise TokenizerError(
            f"texts: the different words have {len(text):,} bytes together; at most "
            f"{MAX_POSITIONS:,} are supported: give less text"
        )
    id_of = np.empty(len(BYTE_TOKENS), np.int32)
    id_of[np.frombuffer(b"".join(BYTE_TOKENS), np.uint8)] = np.arange(len(BYTE_TOKENS))
    words = new_symbols(id_of[text], ends, counts)
    pairs = new_pairs(INITIAL_CAPACITY)
    for begin in range(0, len(text), CHUNK):
        end = min(begin + CHUNK, len(text))
        pairs = with_capacity(pairs, end - begin)
        count_pairs(words, pairs, begin, end)
    return words, pairs
