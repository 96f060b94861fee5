"""Encoder for corpora in compiled code: text → ids, with a cache of words (pretokens).

Text repeats its words. The ids of a word are cached in a hash table whose keys are the bytes of the
word (word_table.py); only words that are not in the cache are merged (pair_table.py). A full cache
is cleared. Compiled code allocates nothing. Batches of about two thousand words pass through
four loops that each do one thing, so that the processor can continue with the next word while it
waits for the memory of this one.

    text ──find_words──▶ ends ──look_up_words──▶ slots of the cache ──write_ids──▶ ids
                                       └─new words─▶ encode_new_words ─▶ ids in the slots
"""

from __future__ import annotations

from typing import NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.base.locks import NonReentrantLock, synchronized
from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.native.jit.memory import PADDING, WINDOW, fetch_soon, padded
from glassllama.native.tokenizers import pair_table, word_table
from glassllama.native.tokenizers.pair_table import EMPTY, SHORT_WORD
from glassllama.native.tokenizers.pretokenizer import (
    RULES,
    character_classes,
    next_ends,
    segment_end,
)
from glassllama.native.tokenizers.word_table import VALUE, WordTable
from glassllama.tokenizers.vocabulary import BYTES, Vocabulary

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

WORD_SLOTS = 2**17  # three quarters of them are used: the words of many pages of text
LONG_WORD_BYTES = 2**21  # for words of more than 15 bytes
POOL_IDS = 2**20  # for words of more than three ids
BATCH_WORDS = 2**11
BUFFER_IDS = 2**18  # ids of one call of `encode_words`
MAX_REUSED, COPY_CHUNK = 2**19, 2**14  # characters
UTF8_BYTES = 4  # of a character, at most
AT, STOP = range(2)  # the cursor: position in the text, end of the segment
NOT_CACHED = -1  # instead of a slot, for words longer than SHORT_WORD
# A value of the cache: the number of ids, then up to three ids of 20 bits each, so that most words
# are written without a branch; or IN_POOL, the number of ids and their index in `id_pool`.
COUNT, ID_BITS, ID = np.uint64(60), np.uint64(20), np.uint64(2**20 - 1)
INLINE_IDS, IN_POOL = 3, 15
ONE_ID = np.uint64(1 << 60)
POOL_INDEX_BITS, POOL_INDEX = np.uint64(40), np.uint64(2**40 - 1)
LARGEST_ID = 2**20 - 1
N_BYTES = 256


class VocabTables(NamedTuple):
    """The constant tables of the encoder."""

    classes: Bytes  # (0x110000,), see pretokenizer.character_classes
    tokens: WordTable  # token → id; empty unless words that are tokens are not merged
    pairs: pair_table.PairTable
    byte_ids: Ints  # (256,), EMPTY where a byte has no token
    byte_pair_ranks: Ints  # (256, 256), merge ranks of two bytes, or EMPTY


def build_vocab_tables(vocabulary: Vocabulary) -> VocabTables:
    ids = vocabulary.ids
    byte_ids = np.array([ids.get(byte, EMPTY) for byte in BYTES], np.int32)
    tokens = token_table(vocabulary) if vocabulary.ignore_merges else word_table.new_table(2, 0)
    pairs = pair_table.of_vocabulary(vocabulary)
    byte_pair_ranks = np.full((N_BYTES, N_BYTES), EMPTY, np.int32)
    fill_byte_pair_ranks(byte_pair_ranks, byte_ids, pairs)
    return VocabTables(character_classes(), tokens, pairs, byte_ids, byte_pair_ranks)


@raw_entry
def fill_byte_pair_ranks(merge_ranks: Ints, byte_ids: Ints, pairs: pair_table.PairTable) -> None:
    for left in range(N_BYTES):
        for right in range(N_BYTES):
            a, b = byte_ids[left], byte_ids[right]
            if a != EMPTY and b != EMPTY:
                merge_ranks[left, right] = pair_table.merge_rank_of(a, b, pairs)


def token_table(vocabulary: Vocabulary) -> WordTable:
    """The vocabulary's tokens → their ids."""
    tokens = list(vocabulary.ids)
    text = np.frombuffer(bytearray().join([*tokens, bytes(PADDING)]), np.uint8)
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    slots = 1 << max(4, (2 * len(tokens)).bit_length())
    table = word_table.new_table(slots, len(text) + 8 * len(tokens))
    fill_tokens(table, text, ends, np.fromiter(vocabulary.ids.values(), np.int64))
    return table


@raw_entry
def fill_tokens(table: WordTable, text: Bytes, ends: Longs, ids: Longs) -> None:
    """Add every token text[ends[k - 1] : ends[k]] with its id."""
    at = np.int64(0)
    for k in range(len(ends)):
        found = word_table.find(table, text, at, ends[k])
        word_table.add(table, found, text, at, ends[k], np.uint64(ids[k]))
        at = ends[k]


class WordCache(NamedTuple):
    """Words of the text so far → their ids."""

    words: WordTable
    id_pool: Ids  # (POOL_IDS,)
    used: Longs  # (1,), elements of `id_pool` in use


class Buffers(NamedTuple):
    """Words between the loops, memory for merging, and the output."""

    ends: Longs  # the start of the first word, then the end of each word
    slots: Ints  # of each word in the cache, or NOT_CACHED
    new: Ints  # indices of the words that were not in the cache
    symbols: Ints  # this and the following have room for the longest possible word
    scratch: pair_table.MergeScratch
    batch: pair_table.MergeBatch
    out: Ids


def new_buffers(longest: int) -> Buffers:
    words = BATCH_WORDS + WINDOW  # up to WINDOW words are found at once
    return Buffers(
        np.empty(words + 1, np.int64),
        np.empty(words, np.int32),
        np.empty(words, np.int32),
        np.empty(longest, np.int32),
        pair_table.new_scratch(longest),
        pair_table.new_batch(),
        np.full(longest, 0, np.uint32),
    )


class CorpusEncoder:
    """Text without special tokens → ids. One call at a time: a second thread waits."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """KeyError: the split of the vocabulary is not compiled (see `is_supported`)."""
        self._rule = RULES[vocabulary.split.patterns]
        self._normalize_nfc = vocabulary.split.normalize_nfc
        self._tables = build_vocab_tables(vocabulary)
        self._cache = WordCache(
            word_table.new_table(WORD_SLOTS, LONG_WORD_BYTES),
            np.empty(POOL_IDS, np.uint32),
            np.zeros(1, np.int64),
        )
        self._buffers = new_buffers(BUFFER_IDS)
        self._text = np.full(UTF8_BYTES * MAX_REUSED + PADDING, 0, np.uint8)
        self.lock = NonReentrantLock()

    @synchronized
    def __call__(self, text: str) -> Ids:
        """(T,) ids; UnicodeEncodeError: the text contains a lone surrogate."""
        if self._normalize_nfc:
            text = normalize("NFC", text)
        parts, cursor = [], np.zeros(2, np.int64)
        data = self._bytes(text)
        while (before := int(cursor[AT])) < len(data) - PADDING:
            n = encode_words(data, cursor, self._rule, self._tables, self._cache, self._buffers)
            parts.append(self._buffers.out[:n].copy())
            if cursor[AT] == before:  # the next words are longer than the buffers
                self._buffers = new_buffers(2 * len(self._buffers.out))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint32), *parts])

    def _bytes(self, text: str) -> Bytes:
        """The UTF-8 of a text and PADDING zeros, in a reused buffer where it fits.

        Copied in chunks that fit the processor's cache; allocating memory would cost more time.
        """
        if len(text) > MAX_REUSED:
            return padded(text)
        size = 0
        for at in range(0, len(text), COPY_CHUNK):
            piece = text[at : at + COPY_CHUNK].encode()
            self._text[size : size + len(piece)] = np.frombuffer(piece, np.uint8)
            size += len(piece)
        self._text[size : size + PADDING] = 0
        return self._text[: size + PADDING]


def is_supported(vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary's split is compiled, and its ids fit into 20 bits."""
    is_known = vocabulary.split.patterns in RULES and not vocabulary.num_unknown_merges
    return is_known and len(vocabulary.tokens) <= LARGEST_ID


@raw_compiled
def find_words(text: Bytes, cursor: Longs, rule: Int, classes: Bytes, buffers: Buffers) -> Int:
    """Write the ends of the next words into buffers.ends; returns their number; moves `cursor`."""
    at, stop, size = cursor[AT], cursor[STOP], len(text) - PADDING
    max_words, last = len(buffers.slots) - WINDOW, at + len(buffers.out) // 2
    n = 0
    buffers.ends[0] = at
    while at < size and at < last and n < max_words:
        if at == stop:
            stop = segment_end(text, at, size, classes, rule)
        n = next_ends(text, at, stop, rule, classes, buffers.ends, n + 1) - 1
        at = buffers.ends[n]
    cursor[AT], cursor[STOP] = at, stop
    return n


@raw_compiled
def clear_if_full(cache: WordCache, words: Int) -> None:
    """Clear the cache if `words` more words may not fit."""
    table = cache.words
    fits = 4 * (table.used[word_table.N_WORDS] + words) <= 3 * len(table.slots)
    most_bytes = table.used[word_table.LONG_BYTES] + (SHORT_WORD + word_table.LENGTH_BYTES) * words
    fits &= most_bytes <= len(table.long)
    fits &= cache.used[0] + SHORT_WORD * words <= len(cache.id_pool)
    if not fits:
        word_table.clear(table)
        cache.used[0] = 0


@raw_compiled
def look_up_words(
    text: Bytes, words: Int, table: WordTable, tokens: WordTable, buffers: Buffers
) -> Int:
    """Find the slots of the words; missing words are added without a value.

    Returns how many words are new; their indices are in buffers.new.
    """
    n = 0
    for k in range(words):
        at, end = buffers.ends[k], buffers.ends[k + 1]
        if end - at > SHORT_WORD:
            buffers.slots[k] = NOT_CACHED
            continue
        found = word_table.find(table, text, at, end)
        buffers.slots[k] = found.slot
        if not found.exists:
            word_table.add(table, found, text, at, end, np.uint64(0))
            fetch_soon(tokens.slots, word_table.slot_after(found.lo, found.hi, tokens.slots))
            buffers.new[n] = k
            n += 1
    return n


@raw_compiled
def encode_new_words(
    text: Bytes, new: Int, tables: VocabTables, cache: WordCache, buffers: Buffers, n: Int
) -> None:
    """Set the values of the new words in the cache; out[n:] is scratch memory."""
    slots, num_merging = cache.words.slots, 0
    for k in range(new):
        word = buffers.new[k]
        token = word_table.find(tables.tokens, text, buffers.ends[word], buffers.ends[word + 1])
        if token.exists:
            slots[buffers.slots[word], VALUE] = ONE_ID | tables.tokens.slots[token.slot, VALUE]
        else:
            buffers.new[num_merging] = word
            num_merging += 1
    merge_new_words(text, num_merging, tables, cache, buffers, n)


@raw_compiled
def merge_new_words(
    text: Bytes, num_merging: Int, tables: VocabTables, cache: WordCache, buffers: Buffers, n: Int
) -> None:
    """Set the values of the first `num_merging` words in `new`, merging BATCH_SIZE in turns."""
    taken, done, words, ends = np.int64(0), np.int64(0), buffers.batch.words, buffers.ends
    byte_ids, ranks = tables.byte_ids, tables.byte_pair_ranks
    while done < num_merging:
        for row in range(pair_table.BATCH_SIZE):
            if words[row] != pair_table.NO_WORD:
                pair_table.update_keys(buffers.batch, row, tables.pairs)
            elif taken < num_merging:
                word = np.int64(buffers.new[taken])
                taken += 1
                at, end = ends[word], ends[word + 1]
                if pair_table.start_word(buffers.batch, row, text, at, end, byte_ids, ranks):
                    words[row] = word
                else:
                    end = merge_long(text, at, end, tables, buffers, n)
                    store_ids(word, cache, buffers, n, end)
                    done += 1
        # A second loop: the keys written above are read 16 at once.
        for row in range(pair_table.BATCH_SIZE):
            word = words[row]
            if word == pair_table.NO_WORD:
                continue
            size = ends[word + 1] - ends[word]
            if not pair_table.merge_lowest(buffers.batch, row, size, tables.pairs):
                end = pair_table.write_merged_ids(buffers.batch, row, size, buffers.out, n)
                store_ids(word, cache, buffers, n, end)
                words[row] = pair_table.NO_WORD
                done += 1


@raw_inlined
def store_ids(word: Int, cache: WordCache, buffers: Buffers, begin: Int, end: Int) -> None:
    """Set the value of a new word: its ids out[begin:end], or their index in `id_pool`."""
    size, out = end - begin, buffers.out
    if size <= INLINE_IDS:
        value = np.uint64(size) << COUNT
        for k in range(size):
            value |= np.uint64(out[begin + k]) << (ID_BITS * np.uint64(k))
    else:
        start = cache.used[0]
        for k in range(size):
            cache.id_pool[start + k] = out[begin + k]
        cache.used[0] += size
        value = np.uint64(IN_POOL) << COUNT | np.uint64(size) << POOL_INDEX_BITS | np.uint64(start)
    cache.words.slots[buffers.slots[word], VALUE] = value


@raw_inlined
def copy_cached_ids(cache: WordCache, slot: Int, out: Ids, n: Int) -> Int:
    """Copy the ids of a word to out[n:]; returns the new n. Writes up to INLINE_IDS more."""
    value = cache.words.slots[slot, VALUE]
    count = np.int64(value >> COUNT)
    if count != IN_POOL:
        out[n] = value & ID
        out[n + 1] = value >> ID_BITS & ID
        out[n + 2] = value >> (ID_BITS + ID_BITS) & ID
        return n + count
    count, start = np.int64(value >> POOL_INDEX_BITS & ID), np.int64(value & POOL_INDEX)
    for k in range(count):
        out[n + k] = cache.id_pool[start + k]
    return n + count


@raw_compiled
def merge_long(
    text: Bytes, at: Int, end: Int, tables: VocabTables, buffers: Buffers, n: Int
) -> Int:
    """Merge a word of any length; bytes without a token are dropped.

    Writes the ids to out[n:] and returns the new n.
    """
    symbols, size = buffers.symbols, np.int64(0)
    for k in range(at, end):
        id = tables.byte_ids[text[k]]
        if id != EMPTY:
            symbols[size] = id
            size += 1
    size = pair_table.merge_linked(symbols, size, buffers.scratch, tables.pairs)
    for k in range(size):
        buffers.out[n + k] = symbols[k]
    return n + size


@raw_compiled
def long_ids(text: Bytes, at: Int, end: Int, tables: VocabTables, buffers: Buffers, n: Int) -> Int:
    """Write the ids of a word of any length to out[n:]; returns the new n."""
    token = word_table.find(tables.tokens, text, at, end)
    if token.exists:
        buffers.out[n] = tables.tokens.slots[token.slot, VALUE]
        return n + 1
    return merge_long(text, at, end, tables, buffers, n)


@raw_compiled
def write_ids(
    text: Bytes, words: Int, tables: VocabTables, cache: WordCache, buffers: Buffers, n: Int
) -> Int:
    """Write the ids of all words to out[n:]; returns the new n."""
    for k in range(words):
        slot = buffers.slots[k]
        if slot == NOT_CACHED:
            n = long_ids(text, buffers.ends[k], buffers.ends[k + 1], tables, buffers, n)
        else:
            n = copy_cached_ids(cache, slot, buffers.out, n)
    return n


@raw_entry
def encode_words(
    text: Bytes, cursor: Longs, rule: Int, tables: VocabTables, cache: WordCache, buffers: Buffers
) -> Int:
    """Write the ids of the next words to buffers.out until it may be full; returns their number."""
    n, capacity = np.int64(0), len(buffers.out) - INLINE_IDS
    while cursor[AT] < len(text) - PADDING:
        at, stop = cursor[AT], cursor[STOP]
        words = find_words(text, cursor, rule, tables.classes, buffers)
        if n + cursor[AT] - at > capacity:  # a word has at most as many ids as bytes
            cursor[AT], cursor[STOP] = at, stop
            break
        clear_if_full(cache, words)
        new = look_up_words(text, words, cache.words, tables.tokens, buffers)
        encode_new_words(text, new, tables, cache, buffers, n)
        n = write_ids(text, words, tables, cache, buffers, n)
    return n
