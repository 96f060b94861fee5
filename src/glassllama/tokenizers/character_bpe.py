"""BPE on the characters of a word, as tokenizer.json's model states it: one word → ids.

Characters without a token become the tokens of their bytes (`byte_fallback`) or one unknown.
Source: the model BPE of tokenizers; tests hold both to the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from glassllama.tokenizers.bpe import CACHED_WORDS, NEVER
from glassllama.tokenizers.pieces import LONG, SHORT, cut_before_blanks, stretches

if TYPE_CHECKING:
    from glassllama.native.tokenizers.pair_table import PairTable

Merges = Mapping[tuple[int, int], tuple[int, int]]  # pair of ids → rank, id of the joined
NO_MERGE = (NEVER, 0)


@dataclass(frozen=True, kw_only=True)
class CharacterBPE:
    """`ids`: the tokens that text may become. `bytes_of`: byte → id, of the bytes that have one.

    `fuse_unknown`: unknown characters in a row are one; None as `unknown` drops them.
    `whole_words`: a word that is a token is taken at once.
    """

    ids: Mapping[str, int] = field(repr=False)
    merges: Merges = field(repr=False)
    bytes_of: Mapping[int, int] = field(repr=False)
    unknown: int | None
    fuse_unknown: bool
    whole_words: bool
    _cache: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)

    def without(self, unread: Collection[int]) -> CharacterBPE:
        """The same where no text becomes one of these ids."""
        merges = {pair: made for pair, made in self.merges.items() if made[1] not in unread}
        ids = {text: id for text, id in self.ids.items() if id not in unread}
        return replace(self, ids=ids, merges=merges)

    def id_lists(self, word: str) -> Iterator[list[int]]:
        """The ids of a word, some at a time."""
        if self.whole_words and word in self.ids:
            yield [self.ids[word]]
            return
        parts: Iterator[list[int]] = map(self._remembered, self._parts(word))
        yield from self._fused(parts) if self.fuse_unknown else parts

    def _fused(self, lists: Iterator[list[int]]) -> Iterator[list[int]]:
        """One unknown for several in a row, also where the word was cut between them."""
        last = None
        for ids in lists:
            if ids[:1] == [self.unknown] == [last]:
                ids = ids[1:]
            if ids:
                last = ids[-1]
                yield ids

    def _parts(self, word: str) -> Iterator[str]:
        """The word, cut where nothing can merge across."""
        if len(word) <= SHORT or self._neighbours is None:
            yield word
            return
        for piece in stretches(word, self._cut):
            begin = 0
            for at in range(1, len(piece)) if len(piece) > SHORT else ():
                if piece[at - 1 : at + 1] not in self._neighbours:
                    yield piece[begin:at]
                    begin = at
            if begin < len(piece):
                yield piece[begin:]

    def _remembered(self, word: str) -> list[int]:
        known = self._cache.get(word)
        if known is None:
            known = self._merged(self._symbols(word))
            if len(word) <= SHORT:
                if len(self._cache) >= CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = known
        return known

    def _symbols(self, word: str) -> list[int]:
        symbols: list[int] = []
        waiting: list[int] = []  # unknowns come behind bytes that follow them, as in tokenizers
        for char in word:
            if (id := self.ids.get(char)) is not None:
                symbols += [*waiting, id]
                waiting = []
                continue
            in_bytes = [self.bytes_of.get(byte) for byte in char.encode()] if self.bytes_of else []
            if in_bytes and None not in in_bytes:
                symbols += [id for id in in_bytes if id is not None]
            elif self.unknown is not None and not (self.fuse_unknown and waiting):
                symbols += waiting
                waiting = [self.unknown]
        return symbols + waiting

    def _merged(self, symbols: list[int]) -> list[int]:
        if len(symbols) > LONG:
            from glassllama.native.tokenizers.pair_table import (
                merge_ids,  # compiles: only when needed
            )

            merged: list[int] = merge_ids(np.array(symbols, np.int32), self._pairs).tolist()
            return merged
        found = [self.merges.get(pair, NO_MERGE) for pair in pairwise(symbols)]
        while found and (lowest := min(found)) != NO_MERGE:
            at = found.index(lowest)
            symbols[at : at + 2] = [lowest[1]]
            del found[at]
            for place in (at - 1, at):
                if 0 <= place < len(found):
                    pair = symbols[place], symbols[place + 1]
                    found[place] = self.merges.get(pair, NO_MERGE)
        return symbols

    @cached_property
    def _pairs(self) -> PairTable:
        from glassllama.native.tokenizers.pair_table import table_of

        rows = [(left, right, *made) for (left, right), made in self.merges.items()]
        return table_of(np.array(rows, np.int64))

    @cached_property
    def _joined(self) -> list[str]:
        """The texts of all tokens that merges make."""
        texts = {id: text for text, id in self.ids.items()}
        return [texts[id] for _, id in self.merges.values() if id in texts]

    @cached_property
    def _neighbours(self) -> frozenset[str] | None:
        """Characters side by side in a token; None where tokens are not the text they stand for."""
        other = {*self.bytes_of.values(), self.unknown}
        if any(left in other or right in other for left, right in self.merges):
            return None
        return frozenset(text[at : at + 2] for text in self._joined for at in range(len(text) - 1))

    @cached_property
    def _cut(self) -> re.Pattern[str]:
        return cut_before_blanks(self._joined)
