"""Training byte-level BPE: the whole algorithm, as simple as possible.

    count the pretokens → count the pairs in them → join the most frequent pair → count again → …

Every round is a `Step` that can be printed: the pair, how often it occurred, and in which
pretokens. `tokenizers/backend.py` and the compiled backend learn the same merges faster; a test
compares them. Source: Sennrich et al. (2016); on bytes as in GPT-2 (Radford et al., 2019).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from glassllama.tokenizers.backend import BYTE_TOKENS
from glassllama.tokenizers.pretokenizer import SPLITS, Split

Word = tuple[bytes, ...]  # a pretoken as its tokens: (b" ", b"l", b"o", b"w")
Pair = tuple[bytes, bytes]

N_EXAMPLES = 3


@dataclass(frozen=True)
class Step:
    """One merge: the pair, how often it occurred, the most frequent pretokens that contain it."""

    pair: Pair
    count: int
    examples: tuple[bytes, ...]

    def __str__(self) -> str:
        left, right = self.pair
        words = " ".join(repr(word)[1:] for word in self.examples)
        return f"{left!r} + {right!r} -> {left + right!r}   {self.count:,} times, as in {words}"


def learn_merges(texts: Iterable[str], split: Split = SPLITS["llama3"]) -> Iterator[Step]:
    """The merges learned from texts in order, until every pretoken is one token."""
    words = count_words(texts, split)
    ids = {token: id for id, token in enumerate(BYTE_TOKENS)}
    while pairs := count_pairs(words):
        # The most frequent pair; among equals the one with the lowest left id, then right id.
        pair = min(pairs, key=lambda p: (-pairs[p], ids[p[0]], ids[p[1]]))
        yield Step(pair, pairs[pair], examples(words, pair))
        ids.setdefault(pair[0] + pair[1], len(ids))
        words = merge_everywhere(words, pair)


def count_words(texts: Iterable[str], split: Split) -> Counter[Word]:
    """How often each pretoken occurs; at first its tokens are its bytes."""
    counts = Counter(word for text in texts for word in split.pretokens(text))
    return Counter({bytes_of(word): count for word, count in counts.items()})


def bytes_of(word: str) -> Word:
    return tuple(bytes([value]) for value in word.encode())


def count_pairs(words: Counter[Word]) -> Counter[Pair]:
    """How often each pair of neighboring tokens occurs within pretokens."""
    pairs: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def merge_everywhere(words: Counter[Word], pair: Pair) -> Counter[Word]:
    """All pretokens with the pair joined."""
    merged: Counter[Word] = Counter()
    for word, count in words.items():
        merged[join(word, pair)] += count
    return merged


def join(word: Word, pair: Pair) -> Word:
    """The pretoken with every such pair joined, from the left: a a a → aa a."""
    tokens: list[bytes] = []
    at = 0
    while at < len(word):
        is_pair = word[at : at + 2] == pair
        tokens.append(pair[0] + pair[1] if is_pair else word[at])
        at += 2 if is_pair else 1
    return tuple(tokens)


def examples(words: Counter[Word], pair: Pair) -> tuple[bytes, ...]:
    """The most frequent pretokens that contain the pair."""
    containing = (word for word, _ in words.most_common() if pair in pairwise(word))
    return tuple(b"".join(word) for word, _ in zip(containing, range(N_EXAMPLES), strict=False))
