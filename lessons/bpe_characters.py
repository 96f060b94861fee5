"""The original form of byte-pair encoding: characters of words, and an end-of-word marker.

    low low lower newest  →  l o w </w>  l o w </w>  l o w e r </w>  n e w e s t </w>
    join l o  →  join lo w  →  join low </w>  →  …

Words are the text between spaces, so that the spaces are lost, and characters that were not in the
texts are unknown. Bytes solve both problems (bpe_bytes.py). The marker distinguishes `er` at the
end of `lower</w>` from `er` in `era</w>`. Source: Sennrich et al. (2016), section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

END_OF_WORD = "</w>"

Word = tuple[str, ...]  # ("l", "o", "w", "</w>")
Pair = tuple[str, str]


def letters(word: str) -> Word:
    return (*word, END_OF_WORD)


def learn_merges(texts: Iterable[str], count: int) -> list[Pair]:
    """The first `count` merges, or all if there are fewer; ties are broken alphabetically."""
    words = Counter(letters(word) for text in texts for word in text.split())
    merges: list[Pair] = []
    while len(merges) < count and (pairs := count_pairs(words)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({join(word, best): times for word, times in words.items()})
    return merges


def count_pairs(words: Counter[Word]) -> Counter[Pair]:
    pairs: Counter[Pair] = Counter()
    for word, times in words.items():
        for pair in pairwise(word):
            pairs[pair] += times
    return pairs


def join(word: Word, pair: Pair) -> Word:
    """The word with every such pair joined, from the left."""
    parts: list[str] = []
    at = 0
    while at < len(word):
        is_pair = word[at : at + 2] == pair
        parts.append("".join(pair) if is_pair else word[at])
        at += 2 if is_pair else 1
    return tuple(parts)


def encode(text: str, merges: Sequence[Pair]) -> list[str]:
    """The tokens of a text: the characters of every word, merged in the order of learning."""
    tokens: list[str] = []
    for word in map(letters, text.split()):
        for pair in merges:
            word = join(word, pair)
        tokens += word
    return tokens


def decode(tokens: Iterable[str]) -> str:
    """The text, with one space between words."""
    return "".join(tokens).replace(END_OF_WORD, " ").removesuffix(" ")
