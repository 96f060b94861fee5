"""Byte-level byte-pair encoding (BPE): the bytes of a pretoken are merged pair by pair into tokens.

    " low" → ␣ l o w → ␣ lo w → ␣ low → ␣low

The order of merges was learned: every pair has a rank, the lowest is merged first. Source: Sennrich
et al. (2016); on bytes as in GPT-2 (Radford et al., 2019).

Files (tokenizer.json, GGUF) write bytes as GPT-2 does: every byte is one visible character.
Printable Latin-1 is itself, the others are U+0100 and following, so that a space is written Ġ and a
newline Ċ. The token " low" is written "Ġlow".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import chain, pairwise
from types import MappingProxyType
from typing import AnyStr

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.backend import PYTHON, BPEBackend, CorpusDecoder, Merger
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.vocabulary import (
    BYTES,
    NEVER,
    NOT_PRINTABLE,
    PRINTABLE,
    AddedToken,
    TokenizerBase,
    Vocabulary,
    size_of_vocabulary,
    surrogate_error,
)

UNKNOWN_MERGES = "tokenizer: {} merges have parts that are not tokens; these are split into bytes"
LONG_PRETOKEN = 512  # bytes; the time of `merge` grows with the square of the length
MANY_IDS = 2**16  # from here on ids are decoded by the backend, which may take a moment to load
CACHED_PRETOKENS = 2**16  # a full cache is cleared: text repeats its pretokens within a few pages
CACHED_LENGTH = 64  # characters; longer pretokens are seldom repeated


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
        self.specials = MappingProxyType(vocabulary.added(is_special=True))
        self._backend = backend
        self._added = vocabulary.token_splitter()
        self._cache: dict[str, list[int]] = {}
        if vocabulary.num_unknown_merges:
            self.notes.append(UNKNOWN_MERGES.format(vocabulary.num_unknown_merges))
        for token in vocabulary.added_tokens:
            self.token_bytes(token.id)  # must exist

    @property
    def added(self) -> Mapping[str, int]:
        return self.vocabulary.added(is_special=False)

    def without_added(self, texts: Iterable[str]) -> BytePairTokenizer:
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

    def _id_lists(self, text: str, specials: bool, at_start: bool) -> Iterator[list[int]]:
        for part in self._parts(text, specials):
            yield [part] if isinstance(part, int) else self._encode_text(part)

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
        for pretoken in chain.from_iterable(self.vocabulary.split.pretoken_batches(text)):
            known = self._cache.get(pretoken)
            if known is None:
                known = self._encode_pretoken(pretoken.encode())
                if len(pretoken) <= CACHED_LENGTH:
                    if len(self._cache) >= CACHED_PRETOKENS:
                        self._cache.clear()
                    self._cache[pretoken] = known
            ids += known
        return ids

    def _encode_pretoken(self, pretoken: bytes) -> list[int]:
        vocabulary = self.vocabulary
        if vocabulary.ignore_merges and pretoken in vocabulary.ids:
            return [vocabulary.ids[pretoken]]
        if len(pretoken) > LONG_PRETOKEN:
            return self._encode_long_pretoken(pretoken)
        parts = [byte for byte in map(BYTES.__getitem__, pretoken) if byte in vocabulary.ids]
        merged = merge(parts, vocabulary.rank)
        if not vocabulary.non_token_ids:
            return [vocabulary.ids[part] for part in merged]
        return [*chain.from_iterable(map(vocabulary.ids_of_part, merged))]

    def _encode_long_pretoken(self, pretoken: bytes) -> list[int]:
        """The same ids as by `merge`, in a time that hardly exceeds the length of the pretoken."""
        ids_of_bytes = np.array([self.vocabulary.ids.get(byte, -1) for byte in BYTES], np.int32)
        symbols = ids_of_bytes[np.frombuffer(pretoken, np.uint8)]
        merged: list[int] = self._merger(symbols[symbols >= 0]).tolist()
        others = {id: part for part, id in self.vocabulary.non_token_ids.items()}
        if not others:
            return merged
        split = (self.vocabulary.ids_of_part(others[id]) if id in others else [id] for id in merged)
        return [*chain.from_iterable(split)]

    @cached_property
    def _corpus_encoder(self) -> Callable[[str], NDArray[np.uint32]] | None:
        return self._backend.corpus_encoder(self.vocabulary)

    @cached_property
    def _corpus_decoder(self) -> CorpusDecoder | None:
        return self._backend.corpus_decoder(self.vocabulary)

    @cached_property
    def _merger(self) -> Merger:
        return self._backend.merger(self.vocabulary.pair_rows())


def tokenizer_of_ranks(
    tokens: Sequence[bytes],
    specials: Sequence[str],
    *,
    bos: str,
    stops: Iterable[str],
    split: Split,
    backend: BPEBackend,
    text_chunks: Callable[[str], Iterable[str]] | None = None,
) -> BytePairTokenizer:
    """As Llama 3's: any two tokens that make a third merge, the lowest id first.

    Special tokens have the last ids. `bos` and `stops` are used if they are among them.
    """
    ids = {name: len(tokens) + at for at, name in enumerate(specials)}
    vocabulary = Vocabulary(
        tokens=(*tokens, *(name.encode() for name in specials)),
        ids={token: id for id, token in enumerate(tokens)},
        merges=None,
        split=split,
        ignore_merges=True,
        added_tokens=tuple(AddedToken(id=id, text=n, is_special=True) for n, id in ids.items()),
        text_chunks=text_chunks,
    )
    stop_ids = [ids[name] for name in stops if name in ids]
    return BytePairTokenizer(vocabulary, bos=ids.get(bos), stop_ids=stop_ids, backend=backend)


# Bytes as text

CHARACTER_TO_BYTE = {byte: byte for byte in PRINTABLE} | {
    0x100 + at: byte for at, byte in enumerate(NOT_PRINTABLE)
}
BYTE_TO_CHARACTER = {byte: chr(character) for character, byte in CHARACTER_TO_BYTE.items()}
BYTE_CHARACTERS = {*BYTE_TO_CHARACTER.values()}
BYTE_LEVEL_TEXT = re.compile(f"[{re.escape(''.join(sorted(BYTE_CHARACTERS)))}]*")
NOT_LATIN1 = 0xFFFF  # for characters that stand for no byte, so that encoding fails
TO_LATIN1 = dict.fromkeys(NOT_PRINTABLE, NOT_LATIN1) | CHARACTER_TO_BYTE  # for str.translate


def to_bytes(text: str) -> bytes:
    """The bytes of a token in GPT-2's characters: "Ġlow" → b" low". TokenizerError: others."""
    try:
        return text.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError as fault:
        raise TokenizerError(
            f"vocabulary: token {quoted(text)} holds {text[fault.start]!r}, which stands for "
            "no byte; this is not a byte-level vocabulary"
        ) from fault


def byte_level_vocabulary(
    *,
    tokens: Mapping[int, str],
    merges: Iterable[tuple[str, str]],
    added_tokens: Collection[AddedToken],
    unused: Mapping[int, str],
    split: Split,
    ignore_merges: bool,
    mergeable: Container[str] | None = None,
) -> Vocabulary:
    """A vocabulary from `tokens` in GPT-2's characters, and added and `unused` ones in plain text.

    The rank of a merge is its index (of equal pairs the last); merges name tokens only.
    `mergeable`: the added tokens that merges may make in other text; None: all.
    TokenizerError: two tokens have the same text or id, or an id is far too large.
    """
    texts = {token.id: token.text for token in added_tokens}
    if "" in texts.values() or len(texts) < len(added_tokens) or texts.keys() & unused:
        raise TokenizerError("vocabulary: an added token is empty or shares its id with another")
    texts |= unused
    if both := texts.keys() & tokens.keys():
        raise TokenizerError(f"vocabulary: id {min(both)} is given to two tokens")
    made = {
        token.id: token.text
        for token in added_tokens
        if not token.is_special
        and is_byte_level(token.text)
        and (mergeable is None or token.text in mergeable)
    }
    tokens = {**tokens, **made}
    bytes_of = {token: to_bytes(token) for token in tokens.values()}
    ids = {bytes_of[token]: id for id, token in tokens.items()}
    if b"" in ids or len(ids) < len(tokens):
        what = "a token is empty" if b"" in ids else "a token is given twice"
        raise TokenizerError(f"vocabulary: {what}; the file is damaged")
    by_id = {id: bytes_of[token] for id, token in tokens.items()}
    by_id |= {id: text.encode(errors="surrogatepass") for id, text in texts.items()}
    return Vocabulary(
        tokens=tuple(map(by_id.get, range(size_of_vocabulary(by_id)))),
        ids=ids,
        merges={(bytes_of[a], bytes_of[b]): rank for rank, (a, b) in enumerate(merges)},
        split=split,
        ignore_merges=ignore_merges,
        added_tokens=tuple(added_tokens),
    )


def is_byte_level(text: str) -> bool:
    """Whether all characters of a text stand for bytes."""
    return BYTE_LEVEL_TEXT.fullmatch(text) is not None


def with_merges(vocabulary: Vocabulary, merges: Iterable[str]) -> Vocabulary:
    """A GGUF vocabulary with its merges "a b"; of equal pairs the first counts.

    Merges may name or make what is not a token, or a special token, which no text becomes. As in
    llama.cpp such parts are split into bytes in the end; `num_unknown_merges` counts them.
    Merges that are not in GPT-2's characters have no effect.
    """
    ranks: dict[tuple[bytes, bytes], int] = {}
    non_tokens: dict[bytes, int] = {}
    num_unknown = 0
    bytes_of = cache(lambda part: to_bytes(part) if is_byte_level(part) else b"")
    for rank, line in enumerate(merges):
        cut = line.find(" ", 1)  # a merge may start with a space
        pair = bytes_of(line[: max(cut, 0)]), bytes_of(line[cut + 1 :])
        if not (pair[0] and pair[1]):
            num_unknown += 1
            continue
        unknown = [part for part in (*pair, pair[0] + pair[1]) if part not in vocabulary.ids]
        num_unknown += bool(unknown)
        for part in unknown:
            non_tokens.setdefault(part, len(vocabulary.tokens) + len(non_tokens))
        ranks.setdefault(pair, rank)
    return replace(
        vocabulary, merges=ranks, num_unknown_merges=num_unknown, non_token_ids=non_tokens
    )
