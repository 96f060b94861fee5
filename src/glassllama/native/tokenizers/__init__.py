"""Compiled loops of the tokenizers: encoding and decoding corpora, learning a vocabulary.

`CompiledBackend` replaces the loops of `tokenizers.backend.BPEBackend`. Nothing is imported or
compiled before the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.interfaces import Progress
from glassllama.tokenizers.backend import BPEBackend, CorpusDecoder, Merge, Merger
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.vocabulary import Vocabulary


class CompiledBackend(BPEBackend):
    """The same in compiled code."""

    def corpus_encoder(self, vocabulary: Vocabulary) -> Callable[[str], NDArray[np.uint32]] | None:
        from glassllama.native.tokenizers.corpus_encoder import CorpusEncoder, is_supported

        return CorpusEncoder(vocabulary) if is_supported(vocabulary) else None

    def corpus_decoder(self, vocabulary: Vocabulary) -> CorpusDecoder:
        from glassllama.native.tokenizers.corpus_decoder import CorpusDecoder

        return CorpusDecoder(vocabulary)

    def merger(self, pair_rows: Iterable[tuple[int, int, int, int]]) -> Merger:
        from glassllama.native.tokenizers.pair_table import merge_ids, table_of

        rows: Any = np.fromiter(pair_rows, np.dtype((np.int64, 4)))
        return partial(merge_ids, table=table_of(rows))

    def learn_merges(
        self, texts: Iterable[str], split: Split, num_tokens: int, progress: Progress | None
    ) -> list[Merge]:
        from glassllama.native.tokenizers.pair_counts import learn_from_counts
        from glassllama.native.tokenizers.word_table import WordCounts

        words = WordCounts(split)
        for text in texts:
            words.add(text)
        return learn_from_counts(*words.arrays(), num_tokens, progress)


COMPILED = CompiledBackend()
