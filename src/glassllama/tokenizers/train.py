"""Learning a vocabulary: byte-pair encoding of one's own texts, fast.

    texts → words, counted → the most frequent pair becomes a token → again, until there are enough

The algorithm in clear Python is `bpe_lesson.py`; tests hold both to the same merges. Here a merge
changes only what it touches (native/tokenizers/pair_counts.py), in compiled loops.

Of two pairs that are equally frequent the one with the smaller left id goes first, then the one
with the smaller right id; bytes have their ids in GPT-2's order. So the merges do not depend on the
order of texts or words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.interfaces import Progress
from glassllama.native.tokenizers.pair_counts import (
    NONE,
    Ints,
    Longs,
    Pairs,
    Rows,
    begin_pairs,
    merge_at,
    most_frequent,
    new_pairs,
    new_rows,
    positions_of,
    with_room,
)
from glassllama.native.tokenizers.word_counts import Bytes, WordCounts
from glassllama.tokenizers.bpe import BytePairTokenizer, Vocabulary
from glassllama.tokenizers.byte_level import OTHERS, PRINTABLE
from glassllama.tokenizers.pretokenizer import SPLITS
from glassllama.tokenizers.writers import Form, write_folder

BYTE_TOKENS = tuple(bytes([value]) for value in (*PRINTABLE, *OTHERS))  # in GPT-2's order
LEAST_COUNT = 2  # a pair that occurs once is no pattern
N_EXAMPLES = 3  # words in which a merge was seen
FIRST_PAIRS = 2**14
PART = 2**20  # positions whose pairs are counted at once
MOST_POSITIONS = 2**31 - 1  # what int32 can number
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


@dataclass(frozen=True)
class Merge:
    """Two tokens that became one: ids, how often they stood together, and words where they did."""

    left: int
    right: int
    joined: int  # a new id, or that of a token with the same bytes
    count: int
    examples: tuple[bytes, ...]  # the most frequent words first


@dataclass(frozen=True)
class TrainedBPE:
    """A learned vocabulary. `tokens`: 256 bytes, then one for each merge, in the order learned."""

    tokens: tuple[bytes, ...]
    merges: tuple[Merge, ...] = field(repr=False)
    specials: tuple[str, ...]
    split: str  # its name in SPLITS

    @cached_property
    def tokenizer(self) -> BytePairTokenizer:
        """Merges whatever two tokens make a third, the lowest id first, as Llama 3's does.

        Control tokens have the ids after all others. Texts begin with <|begin_of_text|> and
        answers end with <|end_of_text|>, where these are among them.
        """
        controls = {name: len(self.tokens) + at for at, name in enumerate(self.specials)}
        vocabulary = Vocabulary(
            tokens=(*self.tokens, *(name.encode() for name in self.specials)),
            ids={token: id for id, token in enumerate(self.tokens)},
            merges=None,
            split=SPLITS[self.split],
            whole_words=True,
            controls=controls,
        )
        stops = [controls[END]] if END in controls else []
        return BytePairTokenizer(vocabulary, bos=controls.get(BEGIN), stop_ids=stops)

    def save(self, folder: Path, form: Form = "hf") -> list[Path]:
        """Write the files of a form and vocabulary.tsv; see `writers.write_folder`."""
        return write_folder(self, folder, form)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    specials: Sequence[str] = (),
    *,
    split: str = "llama3",
    progress: Progress | None = None,
) -> TrainedBPE:
    """Learn `vocab_size` tokens, among them 256 bytes and the control tokens `specials`.

    `progress` hears of merges. TokenizerError: a size below the bytes and control tokens, two equal
    control tokens, texts that hold too few pairs for the size, half of a surrogate pair.
    """
    wanted = check(vocab_size, specials, split)
    words = WordCounts(SPLITS[split])
    for text in texts:
        words.add(text)
    tokens, merges = learn(words, wanted, progress)
    if len(tokens) < wanted:
        most = len(tokens) + len(specials)
        raise TokenizerError(
            f"vocab_size {vocab_size}: these texts hold pairs for {most} tokens only (no other "
            f"pair comes {LEAST_COUNT} times); ask for at most {most}, or give more text"
        )
    return TrainedBPE(tuple(tokens), tuple(merges), tuple(specials), split)


def check(vocab_size: int, specials: Sequence[str], split: str) -> int:
    """How many tokens there are to be besides the control tokens."""
    if split not in SPLITS:
        raise TokenizerError(f"split {quoted(split)} is not known; known are {', '.join(SPLITS)}")
    if "" in specials or len({*specials}) < len(specials):
        raise TokenizerError(f"specials: one is empty or comes twice: {list(specials)}")
    wanted = vocab_size - len(specials)
    if wanted < len(BYTE_TOKENS):
        raise TokenizerError(
            f"vocab_size {vocab_size}: must be at least {len(BYTE_TOKENS) + len(specials)}, for "
            f"{len(BYTE_TOKENS)} bytes and {len(specials)} control tokens"
        )
    return wanted


def learn(
    words: WordCounts, wanted: int, progress: Progress | None
) -> tuple[list[bytes], list[Merge]]:
    """Merge the most frequent pair until there are `wanted` tokens, or no pair is left."""
    text, ends, counts = words.arrays()
    tokens = list(BYTE_TOKENS)
    ids = {token: id for id, token in enumerate(tokens)}
    rows, pairs = counted(text, ends, counts)
    merges: list[Merge] = []
    words_seen = np.empty(N_EXAMPLES, np.int32)
    while len(tokens) < wanted:
        pair = most_frequent(pairs)
        if pair < 0 or pairs.counts[pair] < LEAST_COUNT:
            break
        count, key = int(pairs.counts[pair]), int(pairs.keys[pair])
        left, right = key >> 32, key & 0xFFFFFFFF
        joined = ids.setdefault(tokens[left] + tokens[right], len(tokens))
        if joined == len(tokens):
            tokens.append(tokens[left] + tokens[right])
        positions = np.empty(pairs.n_positions[pair], np.int32)
        positions_of(rows, pairs, pair, positions, words_seen)
        if left == right:
            positions.sort()  # of three in a row the first two merge
        merges.append(Merge(left, right, joined, count, word_texts(words_seen, text, ends)))
        pairs = with_room(pairs, 2 * len(positions) + 1)
        merge_at(rows, pairs, pair, positions, joined)
        if progress is not None:
            progress(len(tokens), wanted)
    return tokens, merges


def word_texts(words: Ints, text: Bytes, ends: Longs) -> tuple[bytes, ...]:
    """The bytes of words; NONE is no word."""
    found = [int(word) for word in words if word != NONE]
    return tuple(text[ends[w - 1] if w else 0 : ends[w]].tobytes() for w in found)


def counted(text: Bytes, ends: Longs, counts: Longs) -> tuple[Rows, Pairs]:
    """The words as symbols, and their pairs."""
    if len(text) > MOST_POSITIONS:
        raise TokenizerError(
            f"texts: their different words have {len(text):,} bytes together, more than the "
            f"{MOST_POSITIONS:,} that can be trained on; give less text"
        )
    id_of = np.empty(len(BYTE_TOKENS), np.int32)
    id_of[[*PRINTABLE, *OTHERS]] = np.arange(len(BYTE_TOKENS))
    rows = new_rows(id_of[text], ends, counts)
    pairs = new_pairs(FIRST_PAIRS)
    for begin in range(0, len(text), PART):
        end = min(begin + PART, len(text))
        pairs = with_room(pairs, end - begin)
        begin_pairs(rows, pairs, begin, end)
    return rows, pairs
