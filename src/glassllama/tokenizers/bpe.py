"""Byte-level byte-pair encoding (BPE): the bytes of a pretoken are merged pair by pair into tokens.

    " low" → ␣ l o w → ␣ lo w → ␣ low → ␣low

The order of merges was learned: every pair has a rank, the lowest is merged first. Source: Sennrich
et al. (2016); on bytes as in GPT-2 (Radford et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, count, pairwise
from types import MappingProxyType
from typing import AnyStr

import numpy as np
from numpy.typing import NDArray

from glassllama.tokenizers.backend import PYTHON, BPEBackend, Merger
from glassllama.tokenizers.vocabulary import (
    BYTES,
    NEVER,
    TokenizerBase,
    Vocabulary,
    surrogate_error,
)

UNKNOWN_MERGES = "tokenizer: {} merges name what is no token of the vocabulary; they make none"
LONG_WORD = 512  # bytes; the time of `merge` grows with the square of the length
MANY_IDS = 2**16  # from here on ids are decoded by the backend, which may take a moment to load
CACHED_WORDS = 2**16  # a full cache is cleared: text repeats its words within a few pages
CACHED_LENGTH = 64  # characters; longer words are seldom repeated


def merge(parts: list[AnyStr], rank: Callable[[AnyStr, AnyStr], int]) -> list[AnyStr]:
    """Join neighbors, the lowest rank first and the leftmost of equals, until none has a rank."""
    ranks = [rank(left, right) for left, right in pairwise(parts)]
    while ranks and (lowest := min(ranks)) != NEVER:
        at = ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del ranks[at]
        if at > 0:
            ranks[at - 1] = rank(parts[at - 1], parts[at])
        if at < len(ranks):
            ranks[at] = rank(parts[at], parts[at + 1])
    return parts


class BytePairTokenizer(TokenizerBase):
    """Text ↔ ids by byte-level BPE; a `base.interfaces.Tokenizer`.

    The empty text has no ids. NUL, BOM and unassigned code points are ordinary text. A lone
    surrogate is a TokenizerError. Bytes that are not UTF-8 decode to U+FFFD. A byte without a token
    is dropped, as by the tokenizers such models were trained with (SmolLM2 lacks six control
    characters).
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos: int | None,
        stop_ids: Iterable[int] = (),
        backend: BPEBackend = PYTHON,
    ) -> None:
        super().__init__(vocabulary.tokens, bos=bos, stop_ids=stop_ids)
        self.vocabulary = vocabulary
        self.specials: Mapping[str, int] = MappingProxyType(vocabulary.added(is_special=True))
        self._backend = backend
        self._added = vocabulary.token_splitter()
        self._cache: dict[str, list[int]] = {}
        if vocabulary.num_unknown_merges:
            self.notes.append(UNKNOWN_MERGES.format(vocabulary.num_unknown_merges))
        for token in vocabulary.added_tokens:
            self.token_bytes(token.id)  # must exist

    @property
    def added(self) -> Mapping[str, int]:
        """Added tokens that are not special: text → id."""
        return self.vocabulary.added(is_special=False)

    def without_added(self, texts: Iterable[str]) -> BytePairTokenizer:
        """The same tokenizer, for which these added tokens are ordinary text."""
        removed = {*texts}
        removed_ids = {self.added[text] for text in removed}
        ids = {token: id for token, id in self.vocabulary.ids.items() if id not in removed_ids}
        merges = self.vocabulary.merges
        if merges is not None and len(ids) < len(self.vocabulary.ids):  # merges could make one
            merges = {
                (a, b): rank for (a, b), rank in merges.items() if {a, b, a + b} <= ids.keys()
            }
        added = tuple(t for t in self.vocabulary.added_tokens if t.text not in removed)
        vocabulary = replace(self.vocabulary, ids=ids, merges=merges, added_tokens=added)
        return BytePairTokenizer(
            vocabulary, bos=self.bos, stop_ids=self.stop_ids, backend=self._backend
        )

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text; with `specials`, special tokens written in it become their ids."""
        ids = [self.bos] if bos and self.bos is not None else []
        try:
            for part in self._parts(text, specials):
                ids += [part] if isinstance(part, int) else self._encode_text(part)
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault
        return ids

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text without special tokens, (T,): the same as `encode`, for corpora.

        A compiled backend is tens of times as fast as `encode`; its first call on a machine
        compiles for a few seconds.
        """
        encoder = self._corpus_encoder
        if encoder is None:
            return super().encode_array(text)
        arrays = [np.empty(0, np.uint32)]
        try:
            for part in self._parts(text, specials=False):
                is_id = isinstance(part, int)
                arrays.append(np.array([part], np.uint32) if is_id else encoder(str(part)))
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault
        return np.concatenate(arrays)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a character that is cut in two, or not UTF-8, becomes U+FFFD."""
        decoder = self._corpus_decoder if len(ids) >= MANY_IDS else None
        data = None if decoder is None else decoder(ids)
        if data is None:  # no decoder, or an id that is not in the vocabulary
            data = b"".join([self.token_bytes(id) for id in ids])
        return data.decode("utf-8", "replace")

    def _parts(self, text: str, specials: bool) -> Iterator[str | int]:
        """The text between added tokens, chunk by chunk, and the ids of these tokens."""
        chunks = self.vocabulary.text_chunks
        for chunk in (text,) if chunks is None else chunks(text):
            yield from self._added.split(chunk, specials=specials)

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in chain.from_iterable(self.vocabulary.split.pretoken_batches(text)):
            known = self._cache.get(word)
            if known is None:
                known = self._encode_word(word.encode())
                if len(word) <= CACHED_LENGTH:
                    if len(self._cache) >= CACHED_WORDS:
                        self._cache.clear()
                    self._cache[word] = known
            ids += known
        return ids

    def _encode_word(self, word: bytes) -> list[int]:
        vocabulary = self.vocabulary
        if vocabulary.ignore_merges and word in vocabulary.ids:
            return [vocabulary.ids[word]]
        if len(word) > LONG_WORD:
            return self._encode_long_word(word)
        parts = [byte for byte in map(BYTES.__getitem__, word) if byte in vocabulary.ids]
        return self._ids_of_parts(merge(parts, vocabulary.rank))

    def _encode_long_word(self, word: bytes) -> list[int]:
        """The same ids as by `merge`, in a time that hardly exceeds the length of the word."""
        ids_of_bytes = np.array([self.vocabulary.ids.get(byte, -1) for byte in BYTES], np.int32)
        symbols = ids_of_bytes[np.frombuffer(word, np.uint8)]
        merged: list[int] = self._merger(symbols[symbols >= 0]).tolist()
        if not self.vocabulary.num_unknown_merges:
            return merged
        parts = {id: part for part, id in self._with_ids_for_all_parts.ids.items()}
        return self._ids_of_parts(parts[id] for id in merged)

    def _ids_of_parts(self, parts: Iterable[bytes]) -> list[int]:
        """The ids of merged parts; a part that is not a token becomes its bytes."""
        ids = self.vocabulary.ids
        if not self.vocabulary.num_unknown_merges:
            return [ids[part] for part in parts]
        tokens = (
            [part] if part in ids else filter(ids.__contains__, map(BYTES.__getitem__, part))
            for part in parts
        )
        return [ids[token] for token in chain.from_iterable(tokens)]

    @cached_property
    def _with_ids_for_all_parts(self) -> Vocabulary:
        """The vocabulary with ids, beyond all others, also for merged parts that are no tokens."""
        vocabulary = self.vocabulary
        if not vocabulary.num_unknown_merges:
            return vocabulary
        ids = dict(vocabulary.ids)
        new_ids = count(len(vocabulary.tokens))
        for left, right in vocabulary.merges or ():
            for part in (left, right, left + right):
                if part not in ids:
                    ids[part] = next(new_ids)
        return replace(vocabulary, ids=ids)

    @cached_property
    def _corpus_encoder(self) -> Callable[[str], NDArray[np.uint32]] | None:
        return self._backend.corpus_encoder(self.vocabulary)

    @cached_property
    def _corpus_decoder(self) -> Callable[[Sequence[int]], bytes | None] | None:
        return self._backend.corpus_decoder(self.vocabulary)

    @cached_property
    def _merger(self) -> Merger:
        return self._backend.merger(self._with_ids_for_all_parts.pair_rows())
