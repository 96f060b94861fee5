"""Byte-level byte-pair encoding (BPE): bytes of a word, merged pair by pair into tokens.

    " low" → ␣ l o w → ␣ lo w → ␣ low → ␣low

Which pair merges first is learned: every pair has a rank, the lowest goes first. Source: Sennrich
et al. (2016), on bytes as in GPT-2 (Radford et al., 2019).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, count, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.added import AddedToken, AddedTokens
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.rows import Rows, gaps_in

if TYPE_CHECKING:
    from glassllama.base.interfaces import Tokenizer
    from glassllama.native.tokenizers.corpus_decoder import ArrayDecoder
    from glassllama.native.tokenizers.corpus_encoder import ArrayEncoder
    from glassllama.native.tokenizers.pair_table import PairTable

OUTSIDE = "tokenizer: {} merges name what is no token of the vocabulary; they make none"
NEVER = 2**31 - 1  # the rank of a pair that does not merge
LONG_WORD = 512  # bytes; the plain loop needs time with the square of the length, the heap hardly
MANY_IDS = 2**16  # so many are decoded in a compiled loop, which takes a moment to load
CACHED_WORDS = 2**16  # a full cache is emptied: text repeats its words within a few pages
CACHED_LENGTH = 64  # characters; longer words seldom come twice


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a file of a byte-level BPE tokenizer holds.

    `tokens` are the bytes of each id (None: an id without a token), control tokens as their text.
    `ids` leads back from bytes to id, for tokens that merging may make: no control token is there.
    `merges` ranks pairs; None means that the rank of a pair is the id of the two joined, as in
    tiktoken's files. `whole_words`: a word that is a token is taken at once, whatever the merges.
    `controls` are read from text only on request, `added` always. `chunks` cuts a long text first.
    `flagged` are those of them that have flags. `outside`: so many merges name what is no token;
    parts that are none in the end fall into their bytes.
    """

    tokens: tuple[bytes | None, ...]
    ids: Mapping[bytes, int] = field(repr=False)
    merges: Mapping[tuple[bytes, bytes], int] | None = field(repr=False)
    split: Split
    whole_words: bool
    controls: Mapping[str, int]
    added: Mapping[str, int] = field(default_factory=dict)
    chunks: Callable[[str], Iterable[str]] | None = None
    flagged: tuple[AddedToken, ...] = field(default=(), repr=False)
    outside: int = 0

    def added_tokens(self) -> AddedTokens:
        """Controls and added tokens with their flags, where the file gives any."""
        flags = {token.text: token for token in self.flagged}
        tokens = [
            flags.get(text) or AddedToken(id=id, text=text, is_control=is_control)
            for texts, is_control in ((self.controls, True), (self.added, False))
            for text, id in texts.items()
        ]
        is_any_normal = self.split.normal_form and any(token.normalized for token in tokens)
        return AddedTokens(tokens, partial(normalize, "NFC") if is_any_normal else None)

    def rank(self, left: bytes, right: bytes) -> int:
        if self.merges is None:
            return self.ids.get(left + right, NEVER)
        return self.merges.get((left, right), NEVER)


def merge(parts: list[bytes], rank: Callable[[bytes, bytes], int]) -> list[bytes]:
    """Join neighbours, the lowest rank first and the leftmost of equals, until none has a rank."""
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


class BytePairTokenizer(Rows):
    """Text ↔ ids by byte-level BPE; a `base.interfaces.Tokenizer`.

    Odd input: the empty text has no ids; NUL, BOM and unassigned code points are text like any
    other; a lone surrogate, which is no character, is a TokenizerError; bytes that are not UTF-8
    decode to U+FFFD. A byte that the vocabulary has no token for is left out, as the tokenizers
    such models were trained with do (SmolLM2 lacks six control characters).
    """

    def __init__(
        self, vocabulary: Vocabulary, *, bos: int | None, stop_ids: Iterable[int] = ()
    ) -> None:
        self.vocabulary = vocabulary
        self.bos = bos
        self.stop_ids = frozenset(stop_ids)
        self.specials: Mapping[str, int] = MappingProxyType(dict(vocabulary.controls))
        self._added = vocabulary.added_tokens()
        self.notes: list[str] = []  # what was odd in the file
        self.gaps = gaps_in(vocabulary.tokens)
        self._cache: dict[str, list[int]] = {}
        if vocabulary.outside:
            self.notes.append(OUTSIDE.format(vocabulary.outside))
        for id in (*self.stop_ids, *self._added.ids(), *([] if bos is None else [bos])):
            self.token_bytes(id)  # must exist

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text; with `specials`, control tokens written in it become their ids."""
        ids = [self.bos] if bos and self.bos is not None else []
        try:
            for piece in self._pieces(text, specials):
                ids += [piece] if isinstance(piece, int) else self._encode_words(piece)
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault
        return ids

    @property
    def added(self) -> Mapping[str, int]:
        """Tokens that are read from any text, though they are no control tokens: text -> id."""
        return MappingProxyType(dict(self.vocabulary.added))

    def without_added(self, texts: Iterable[str]) -> BytePairTokenizer:
        """The same tokenizer, for which these added tokens are plain text."""
        left = {*texts}
        unread = {self.vocabulary.added[text] for text in left}
        ids = {token: id for token, id in self.vocabulary.ids.items() if id not in unread}
        merges = self.vocabulary.merges
        if merges is not None and len(ids) < len(self.vocabulary.ids):  # merges could make one
            merges = {
                (a, b): rank for (a, b), rank in merges.items() if {a, b, a + b} <= ids.keys()
            }
        added = {text: id for text, id in self.vocabulary.added.items() if text not in left}
        vocabulary = replace(self.vocabulary, ids=ids, merges=merges, added=added)
        return BytePairTokenizer(vocabulary, bos=self.bos, stop_ids=self.stop_ids)

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text without control tokens, (T,): the same as `encode`, for corpora.

        Compiled at the first call, which takes a few seconds once on a machine; from then on tens
        of times as fast.
        """
        encoder = self._array_encoder
        if encoder is None:
            return np.array(self.encode(text), dtype=np.uint32)
        parts = [np.empty(0, np.uint32)]
        try:
            for piece in self._pieces(text, specials=False):
                is_id = isinstance(piece, int)
                parts.append(np.array([piece], np.uint32) if is_id else encoder(str(piece)))
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault
        return np.concatenate(parts)

    def _pieces(self, text: str, specials: bool) -> Iterator[str | int]:
        """The text in its chunks, without the added tokens in it, and the ids of those."""
        chunks = self.vocabulary.chunks
        for chunk in (text,) if chunks is None else chunks(text):
            yield from self._added.cut(chunk, specials=specials)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a character that is cut in two, or no UTF-8, becomes U+FFFD."""
        data = self._array_decoder(ids) if len(ids) >= MANY_IDS else None
        if data is None:  # few, or one of them is not in the vocabulary
            data = b"".join([self.token_bytes(id) for id in ids])
        return data.decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one id; a control token's are its text."""
        tokens = self.vocabulary.tokens
        token = tokens[id] if 0 <= id < len(tokens) else None
        return self.bytes_without_token(id, len(tokens)) if token is None else token

    def _encode_words(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in chain.from_iterable(self.vocabulary.split.word_lists(text)):
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
        if vocabulary.whole_words and word in vocabulary.ids:
            return [vocabulary.ids[word]]
        if len(word) > LONG_WORD:
            return self._encode_long_word(word)
        parts = [byte for byte in map(BYTES.__getitem__, word) if byte in vocabulary.ids]
        merged = merge(parts, vocabulary.rank)
        if vocabulary.outside:
            merged = [piece for part in merged for piece in self._known_pieces(part)]
        return [vocabulary.ids[part] for part in merged]

    def _known_pieces(self, part: bytes) -> list[bytes]:
        """What merges made, or the bytes of what is no token."""
        if part in self.vocabulary.ids:
            return [part]
        return [byte for byte in map(BYTES.__getitem__, part) if byte in self.vocabulary.ids]

    def _encode_long_word(self, word: bytes) -> list[int]:
        """The same ids as the plain loop gives, in time that hardly exceeds the word's length."""
        from glassllama.native.tokenizers.pair_table import (
            merge_ids,  # compiles: only when it is needed
        )

        ids_of_bytes = np.array([self.vocabulary.ids.get(byte, -1) for byte in BYTES], np.int32)
        symbols = ids_of_bytes[np.frombuffer(word, np.uint8)]
        merged: list[int] = merge_ids(symbols[symbols >= 0], self._pairs).tolist()
        if not self.vocabulary.outside:
            return merged
        parts = {number: part for part, number in self._merging.ids.items()}
        pieces = (piece for number in merged for piece in self._known_pieces(parts[number]))
        return [self.vocabulary.ids[piece] for piece in pieces]

    @cached_property
    def _merging(self) -> Vocabulary:
        """The vocabulary with a number, beyond all ids, also for parts that are no token."""
        vocabulary = self.vocabulary
        if not vocabulary.outside:
            return vocabulary
        ids = dict(vocabulary.ids)
        numbers = count(len(vocabulary.tokens))
        for left, right in vocabulary.merges or ():
            for part in (left, right, left + right):
                if part not in ids:
                    ids[part] = next(numbers)
        return replace(vocabulary, ids=ids)

    @cached_property
    def _array_encoder(self) -> ArrayEncoder | None:
        """None where the vocabulary splits words in a way that is not compiled."""
        from glassllama.native.tokenizers.corpus_encoder import ArrayEncoder, has_rule

        return ArrayEncoder(self.vocabulary) if has_rule(self.vocabulary) else None

    @cached_property
    def _array_decoder(self) -> ArrayDecoder:
        from glassllama.native.tokenizers.corpus_decoder import ArrayDecoder

        return ArrayDecoder(self.vocabulary)

    @cached_property
    def _pairs(self) -> PairTable:
        from glassllama.native.tokenizers.pair_table import pair_table

        return pair_table(self._merging)


BYTES = tuple(bytes([value]) for value in range(256))


def alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Finds any of these texts, the longest where several begin; None where there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def written_in(text: str, wanted: Iterable[str]) -> list[str]:
    """Those of the wanted texts that are written in a text, in its order, each once."""
    pattern = alternatives(wanted)
    return [] if pattern is None else list(dict.fromkeys(pattern.findall(text)))


def prompt_ids(tokenizer: Tokenizer, text: str, specials: bool) -> list[int]:
    """A text with the model's own beginning, which is not doubled where the text has it, too."""
    ids = tokenizer.encode(text, bos=True, specials=specials)
    doubled = specials and ids[:2] == [tokenizer.bos] * 2
    return ids[1:] if doubled else ids


def surrogate_error(text: str) -> TokenizerError:
    at = next(at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return TokenizerError(
        f"text: character {at} is U+{ord(text[at]):04X}, half of a UTF-16 pair and no character; "
        "read the text as UTF-8"
    )
