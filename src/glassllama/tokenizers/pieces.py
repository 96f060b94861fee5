"""SentencePiece's BPE, as Llama 2, TinyLlama, Mistral and Gemma use it: characters, not bytes.

    "Hello é" → ▁Hello▁é → ▁ H e l l o ▁ é → … → ▁Hello ▁ <0xC3> <0xA9>

Blanks become ▁ (U+2581), and most models put one before the text, so that a word is the same token
at the beginning and after a blank. Neighbours merge as long as they make a piece of the vocabulary,
the piece with the best score first, the leftmost of equals. A character that is no piece becomes
the pieces of its UTF-8 bytes. Source: Kudo and Richardson, SentencePiece (2018).

The text is one long word to merge. It is cut, without changing an id, between two characters that
stand side by side in no piece: nothing can merge across.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.bpe import NEVER, alternatives, merge, surrogate_error
from glassllama.tokenizers.rows import Rows, gaps_in

if TYPE_CHECKING:
    from glassllama.native.tokenizers.pair_table import PairTable

BLANK = "\u2581"  # ▁
SHORT = 32  # characters; shorter words are not worth looking for places to cut
LONG = 256  # characters; above it the heap is faster than the plain loop
MANY = 2**18  # characters: words of a longer text are found one by one
CACHED_WORDS = 2**16  # a full cache is emptied: text repeats its words within a few pages


class Kind(IntEnum):
    """SentencePiece.Type of sentencepiece_model.proto; GGUF's token_type has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a file of a SentencePiece-style tokenizer holds, whatever its format.

    `texts` and `kinds` by id; of equal texts the last is used. Pieces merge by `scores`, the higher
    first. UNUSED pieces are never made.

    `prefix`: a blank goes before every stretch of text between control tokens; with `prefix_once`
    only where a whole text begins; without `prefix_doubled` not before another blank. `trim` drops
    blanks at the ends and doubled ones. `drop_prefix`: decoding drops the blank that a text begins
    with. `added_first`: user defined pieces without a ▁ are cut out of the text before blanks are
    treated, each rest for itself, as llama.cpp does.
    """

    texts: tuple[str, ...] = field(repr=False)
    kinds: tuple[Kind, ...] = field(repr=False)
    scores: tuple[float, ...] = field(repr=False)
    prefix: bool = True
    prefix_once: bool = False
    prefix_doubled: bool = True
    trim: bool = False
    drop_prefix: bool = True
    added_first: bool = False
    unknown_text: str = " \u2047 "

    def of_kind(self, *kinds: Kind) -> dict[str, int]:
        """Text → id; the last id of a text that has several."""
        both = zip(self.texts, self.kinds, strict=True)
        return {text: id for id, (text, kind) in enumerate(both) if kind in kinds}


class SentencePieceTokenizer(Rows):
    """Text ↔ ids by SentencePiece's BPE; a `base.interfaces.Tokenizer`.

    `decode` gives the encoded text back, but ▁ as a blank. It shows no control tokens, and drops
    the blank before the first piece where encoding adds one. Odd input: the empty text has no ids;
    NUL, BOM and unassigned code points are characters like any other; a lone surrogate is a
    TokenizerError; bytes that are no UTF-8 decode to U+FFFD as Python groups them.
    """

    def __init__(
        self, pieces: Pieces, *, bos: int | None = None, stop_ids: Iterable[int] = ()
    ) -> None:
        self.pieces = pieces
        self.bos = bos
        self.stop_ids = frozenset(stop_ids)
        self.specials: Mapping[str, int] = MappingProxyType(pieces.of_kind(Kind.CONTROL))
        self._written = pieces.of_kind(Kind.CONTROL, Kind.UNKNOWN)
        self._control_pattern = alternatives(self._written)
        self._added = pieces.of_kind(Kind.USER_DEFINED)
        self._find_added()
        normal = pieces.of_kind(Kind.NORMAL)
        self._ids = {text.encode(): id for text, id in normal.items()}
        self._rank = _ranking(pieces, self._ids)
        self._byte_ids, self._unknown = _fallback(pieces)
        self._cut = cut_before_blanks(normal)
        self._bytes = [_bytes_of(pieces, id) for id in range(len(pieces.texts))]
        self.gaps = gaps_in(self._bytes)
        self.notes: list[str] = []  # what was odd in the file
        self._control_ids = frozenset(self.specials.values())
        self._cache: dict[str, list[int]] = {}
        for id in (*self.stop_ids, *([] if bos is None else [bos])):
            self.token_bytes(id)  # must exist

    @property
    def vocab_size(self) -> int:
        return len(self.pieces.texts)

    # Text → ids

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text; with `specials`, control tokens written in it become their ids."""
        parts: list[str | int] = [text]
        if specials and self._control_pattern is not None:
            pieces = self._control_pattern.split(text)  # text, control, text, …, text
            parts = list(pieces)
            parts[1::2] = [self._written[control] for control in pieces[1::2]]
        ids = self.encode_parts([part for part in parts if part != ""])
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of texts and control ids in order, with a blank where this model puts one."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            found = [part] if self._first_pattern is None else self._first_pattern.split(part)
            for n, stretch in enumerate(found):
                is_first = not ids and n == 0
                ids += [self._added[stretch]] if n % 2 else self._encode(stretch, is_first)
        return ids

    @property
    def added(self) -> Mapping[str, int]:
        """Tokens that are read from any text, though they are no control tokens: text -> id."""
        return self._added

    def _find_added(self) -> None:
        first = {text for text in self._added if self.pieces.added_first and BLANK not in text}
        self._first_pattern = alternatives(first)
        self._added_pattern = alternatives(self._added.keys() - first)

    def without_added(self, texts: Iterable[str]) -> SentencePieceTokenizer:
        """The same tokenizer, for which these added tokens are plain text."""
        other, left = copy.copy(self), {*texts}
        other._added = {text: id for text, id in self._added.items() if text not in left}
        other._find_added()
        other._cache = {}
        return other

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text without control tokens, (T,)."""
        return np.array(self.encode(text), dtype=np.uint32)

    def _encode(self, text: str, is_first: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault
        ids = [id for word in self._words(self._with_blanks(text, is_first)) for id in word]
        if self._byte_ids is not None:
            return ids
        # Characters without a piece in a row are one unknown.
        runs = ((id, list(run)) for id, run in groupby(ids))
        return [id for value, run in runs for id in (run[:1] if value == self._unknown else run)]

    def _with_blanks(self, text: str, is_first: bool) -> str:
        """The text as it is looked up: ▁ for blanks, and one in front."""
        if self.pieces.trim:
            text = " ".join(filter(None, text.split(" ")))
        if not text:
            return ""
        text = text.replace(" ", BLANK)
        pieces = self.pieces
        wanted = pieces.prefix and (is_first or not pieces.prefix_once)
        if wanted and (pieces.prefix_doubled or text[0] != BLANK):
            text = BLANK + text
        return text.rstrip(BLANK) if self.pieces.trim else text

    def _words(self, text: str) -> Iterator[list[int]]:
        """The ids of stretches that cannot merge with each other."""
        found = [text] if self._added_pattern is None else self._added_pattern.split(text)
        for n, stretch in enumerate(found):
            if n % 2:
                yield [self._added[stretch]]
            else:
                yield from map(self._word, stretches(stretch, self._cut))

    def _word(self, word: str) -> list[int]:
        if len(word) <= SHORT:
            return self._remembered(word)
        return [id for part in self._unjoined(word) for id in self._remembered(part)]

    def _remembered(self, word: str) -> list[int]:
        known = self._cache.get(word)
        if known is None:
            known = self._merged(word)
            if len(word) <= SHORT:
                if len(self._cache) >= CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = known
        return known

    def _unjoined(self, word: str) -> Iterator[str]:
        """A long word, cut between characters that are neighbours in no piece."""
        begin, neighbours = 0, self._neighbours
        for at in range(1, len(word)):
            if word[at - 1 : at + 1] not in neighbours:
                yield word[begin:at]
                begin = at
        yield word[begin:]

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        texts = (key.decode() for key in self._ids)
        return frozenset(text[at : at + 2] for text in texts for at in range(len(text) - 1))

    def _merged(self, word: str) -> list[int]:
        parts = [character.encode() for character in word]
        merged = merge(parts, self._rank) if len(word) <= LONG else self._merge_long(parts)
        ids: list[int] = []
        for part in merged:
            if (id := self._ids.get(part)) is not None:
                ids.append(id)
            elif self._byte_ids is not None:
                ids += [self._byte_ids[byte] for byte in part]
            else:
                ids.append(self._unknown)
        return ids

    def _merge_long(self, parts: list[bytes]) -> list[bytes]:
        """What the plain loop gives, in time that hardly exceeds the word's length."""
        from glassllama.native.tokenizers.pair_table import (
            merge_ids,  # compiles: only when it is needed
        )

        numbers = dict(self._numbers)
        symbols = [numbers.setdefault(part, len(numbers)) for part in parts]
        texts = list(numbers)
        merged = merge_ids(np.array(symbols, np.int32), self._pairs)
        return [texts[number] for number in merged.tolist()]

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        """What pairs are made of: pieces, and the characters in them."""
        characters = {character for key in self._ids for character in key.decode()}
        texts = dict.fromkeys([*self._ids, *(character.encode() for character in characters)])
        return {text: number for number, text in enumerate(texts)}

    @cached_property
    def _pairs(self) -> PairTable:
        from glassllama.native.tokenizers.pair_table import table_of

        return table_of(np.fromiter(self._pair_rows(), np.dtype((np.int64, 4))))

    def _pair_rows(self) -> Iterator[tuple[int, int, int, int]]:
        """(left, right, rank, joined) of all ways to halve a piece."""
        numbers = self._numbers
        for key in self._ids:
            text = key.decode()
            for cut in range(1, len(text)):
                left, right = text[:cut].encode(), text[cut:].encode()
                rank = self._rank(left, right)
                if rank != NEVER and left in numbers and right in numbers:
                    yield numbers[left], numbers[right], rank, numbers[key]

    # Ids → text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens and without the blank that encoding adds."""
        texts = []
        at_start = self.pieces.drop_prefix
        for id in ids:
            data = self.token_bytes(id)
            if id in self._control_ids or not data:
                continue
            if at_start and self.pieces.texts[id].startswith(BLANK):
                data = data[1:]
                at_start = self.pieces.trim and not data
            else:
                at_start = False
            texts.append(data)
        return b"".join(texts).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one id, ▁ as a blank; a control token's are its text."""
        data = self._bytes[id] if 0 <= id < len(self._bytes) else None
        return self.bytes_without_token(id, len(self._bytes)) if data is None else data


def _ranking(pieces: Pieces, ids: Mapping[bytes, int]) -> Callable[[bytes, bytes], int]:
    """(left, right) → the rank of their merging, 0 first; NEVER if they make no piece."""
    if not all(map(math.isfinite, pieces.scores)):
        raise TokenizerError("vocabulary: a score is no finite number; the file is damaged")
    best_first = sorted({pieces.scores[id] for id in ids.values()}, reverse=True)
    rank_of_score = {score: rank for rank, score in enumerate(best_first)}
    ranks = {key: rank_of_score[pieces.scores[id]] for key, id in ids.items()}
    return lambda left, right: ranks.get(left + right, NEVER)


def _fallback(pieces: Pieces) -> tuple[list[int] | None, int]:
    """The ids of the 256 bytes, if there are such pieces; and the id of the unknown."""
    bytes_ = pieces.of_kind(Kind.BYTE)
    unknown = min(pieces.of_kind(Kind.UNKNOWN).values(), default=None)
    if bytes_:
        ids = [bytes_.get(byte_text(value)) for value in range(256)]
        if None in ids:
            missing = byte_text(ids.index(None))
            raise TokenizerError(f"vocabulary: has pieces for bytes, but none for {missing}")
        return [id for id in ids if id is not None], -1
    if unknown is None:
        raise TokenizerError("vocabulary: neither pieces for bytes nor one for the unknown")
    return None, unknown


def byte_text(value: int) -> str:
    """How the piece of a byte is written."""
    return f"<0x{value:02X}>"


def stretches(text: str, cut: re.Pattern[str]) -> Iterator[str]:
    """What `cut.split(text)` gives, one by one if the text is long; `cut` finds places."""
    if len(text) <= MANY:
        yield from cut.split(text)
        return
    begin = 0
    for found in cut.finditer(text):
        yield text[begin : found.start()]
        begin = found.start()
    yield text[begin:]


def cut_before_blanks(normal: Iterable[str]) -> re.Pattern[str]:
    """Finds the places before a ▁ that no piece spans."""
    before = {text[at] for text in normal for at in range(len(text) - 1) if text[at + 1] == BLANK}
    spanned = re.escape("".join(sorted(before)))
    return re.compile(f"(?<=[^{spanned}])(?={BLANK})" if spanned else f"(?={BLANK})")


def _bytes_of(pieces: Pieces, id: int) -> bytes:
    text, kind = pieces.texts[id], pieces.kinds[id]
    if kind == Kind.BYTE:
        return bytes([int(text[3:5], 16)])
    if kind == Kind.UNKNOWN:
        return pieces.unknown_text.encode()
    return (text if kind == Kind.CONTROL else text.replace(BLANK, " ")).encode()
