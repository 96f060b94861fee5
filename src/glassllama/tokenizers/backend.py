"""Plain-Python versions of the compiled BPE loops.

`PYTHON` is the default of all tokenizers. native/tokenizers has the compiled backend; the functions
of weights/tokenizer.py and tokenizer_gguf.py that read tokenizers pass it to them, and callers of
`train_bpe` may. Short texts do not need it: their pretokens are merged by `bpe.merge`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from glassllama.base.interfaces import Progress
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.vocabulary import BYTE_TOKENS, PairRow, Vocabulary, surrogate_error

MIN_COUNT = 2  # a pair that occurs once is not merged
NUM_EXAMPLES = 3  # pretokens that are recorded with a merge

Ints = NDArray[np.int32]
CorpusDecoder = Callable[[Sequence[int]], bytes | None]
Merger = Callable[[Ints], Ints]  # ids of bytes or characters (n,) → ids after all merges (T,)
Pair = tuple[int, int]


@dataclass(frozen=True)
class Merge:
    """One learned merge: the ids of the pair, how often it occurred, and examples."""

    left: int
    right: int
    joined: int  # a new id, or that of a token with the same bytes
    count: int
    examples: tuple[bytes, ...]  # pretokens that contain the pair, the most frequent first


class BPEBackend:
    """What BPE tokenizers compute in bulk, in plain Python; a subclass may compile it."""

    def corpus_encoder(self, vocabulary: Vocabulary) -> Callable[[str], NDArray[np.uint32]] | None:
        """Text without special tokens → ids; None: not faster than `BytePairTokenizer.encode`.

        UnicodeEncodeError: the text contains a lone surrogate.
        """
        return None

    def corpus_decoder(self, vocabulary: Vocabulary) -> CorpusDecoder | None:
        """Many ids → bytes, or None if an id is not in the vocabulary."""
        return None

    def merger(self, pair_rows: Iterable[PairRow]) -> Merger:
        """Merges long pretokens by these pairs in n log n: the rule of `bpe.merge`."""
        pairs = {(left, right): (rank, joined) for left, right, rank, joined in pair_rows}
        return partial(merge_with_heap, pairs=pairs)

    def learn_merges(
        self, texts: Iterable[str], split: Split, num_tokens: int, progress: Progress | None
    ) -> list[Merge]:
        """Merge the most frequent pair of the texts until there are `num_tokens` tokens.

        Of equally frequent pairs the one with the smaller left id goes first, then the smaller
        right id. Ends earlier if no pair occurs MIN_COUNT times. TokenizerError: lone surrogates.
        """
        # A merge updates only the pretokens with the pair.
        counts = count_pretokens(texts, split)
        words = sorted(counts, key=lambda word: (-counts[word], word))
        tokens = list(BYTE_TOKENS)
        ids = {token: id for id, token in enumerate(tokens)}
        symbols = [[ids[bytes([value])] for value in word] for word in words]
        pair_counts: Counter[Pair] = Counter()
        words_with = defaultdict[Pair, set[int]](set)  # pair → pretokens that contain it, or did

        def count(index: int, times: int) -> None:
            for pair in pairwise(symbols[index]):
                pair_counts[pair] += times
                words_with[pair].add(index)

        for index, word in enumerate(words):
            count(index, counts[word])
        merges: list[Merge] = []
        while len(tokens) < num_tokens and pair_counts:
            pair = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
            if pair_counts[pair] < MIN_COUNT:
                break
            token = tokens[pair[0]] + tokens[pair[1]]
            joined = ids.setdefault(token, len(tokens))
            if joined == len(tokens):
                tokens.append(token)
            found = sorted(i for i in words_with.pop(pair) if pair in pairwise(symbols[i]))
            examples = tuple(words[index] for index in found[:NUM_EXAMPLES])
            merges.append(Merge(*pair, joined, pair_counts[pair], examples))
            for index in found:
                count(index, -counts[words[index]])
                symbols[index] = replace_pair(symbols[index], pair, joined)
                count(index, counts[words[index]])
            if progress is not None:
                progress(len(tokens), num_tokens)
        return merges


PYTHON = BPEBackend()


def merge_with_heap(symbols: Ints, pairs: dict[Pair, tuple[int, int]]) -> Ints:
    """Merge the pair with the lowest rank, the leftmost of equals, until none has a rank.

    `pairs`: (left, right) → (rank, merged). The symbols are a linked list and the candidates are in
    a heap of (rank, position), so that a merge changes only its two neighbors.
    """
    ids: list[int | None] = [*symbols.tolist()]
    n = len(ids)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap: list[tuple[int, int]] = []

    def pair_at(at: int) -> tuple[int, int] | None:
        left, right = ids[at], ids[after[at]] if after[at] < n else None
        return None if left is None or right is None else pairs.get((left, right))

    def push(at: int) -> None:
        found = pair_at(at) if at >= 0 else None
        if found is not None:
            heappush(heap, (found[0], at))

    for at in range(n):
        push(at)
    while heap:
        rank, at = heappop(heap)
        found = pair_at(at)
        if found is None or found[0] != rank:
            continue  # outdated by another merge
        removed = after[at]
        ids[at], ids[removed], after[at] = found[1], None, after[removed]
        if after[at] < n:
            before[after[at]] = at
        push(before[at])
        push(at)
    return np.array([id for id in ids if id is not None], np.int32)


def count_pretokens(texts: Iterable[str], split: Split) -> Counter[bytes]:
    """The pretokens of all texts as UTF-8, and how often each occurs."""
    counts: Counter[bytes] = Counter()
    for text in texts:
        try:
            counts.update(word.encode() for word in split.pretokens(text))
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault
    return counts


def replace_pair(symbols: list[int], pair: Pair, joined: int) -> list[int]:
    """Replace a pair by one symbol everywhere, from the left: of `a a a` the first two merge."""
    result: list[int] = []
    for symbol in symbols:
        result.append(symbol)
        if tuple(result[-2:]) == pair:
            result[-2:] = [joined]
    return result
