"""SentencePiece Unigram, the vocabulary of SigLIP's text tower: the likeliest way to cut a text.

Every piece has a log probability. Of all ways to cut a text into pieces the one with the largest
sum is chosen, by dynamic programming over the positions (Viterbi). Source: Subword Regularization
(Kudo, 2018), section 3.2; the normalization by a table of replacements is SentencePiece's
(Kudo and Richardson, 2018, section 3.2), whose format is that of the library darts-clone.
"""

from __future__ import annotations

import re
import string
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.sentencepiece import SPACE_SYMBOL, UNIGRAM, Pieces, PieceType, read_model

UNKNOWN_PENALTY = 10.0  # below the least likely piece
USER_DEFINED_LESS = 0.1  # than the largest score for each of its bytes: always chosen
PUNCTUATION = str.maketrans("", "", string.punctuation)
SPACES = re.compile(r"\s+")


class Replacements:
    """The table of `precompiled_charsmap`: texts → what they become, the longest match first.

    A double-array trie of uint32 units, then zero-terminated replacements in UTF-8. A unit has a
    label (the byte that leads to it), whether a value follows, and the offset of its children.
    """

    def __init__(self, data: bytes) -> None:
        """Raises TokenizerError: not such a table."""
        (size,) = struct.unpack_from("<I", data) if len(data) >= 4 else (0,)
        if size % 4 or not 0 < size <= len(data) - 4:
            raise TokenizerError("normalizer_spec.precompiled_charsmap: damaged")
        self._units = np.frombuffer(data, "<u4", size // 4, 4).tolist()
        self._texts = data[4 + size :]

    def longest(self, data: bytes, at: int) -> tuple[int, bytes] | None:
        """The length of the longest match at this byte and its replacement; None: no match."""
        node, found = self._offset(self._units[0]), None
        for end in range(at, len(data)):
            node ^= data[end]
            unit = self._unit(node)
            if unit & (1 << 31 | 0xFF) != data[end]:
                break
            node ^= self._offset(unit)
            if unit >> 8 & 1:
                found = end + 1 - at, self._unit(node) & 0x7FFFFFFF
        if found is None:
            return None
        length, start = found
        return length, self._texts[start : self._texts.find(b"\0", start)]

    def _unit(self, node: int) -> int:
        if not 0 <= node < len(self._units):
            raise TokenizerError("normalizer_spec.precompiled_charsmap: damaged")
        unit: int = self._units[node]
        return unit

    @staticmethod
    def _offset(unit: int) -> int:
        return (unit >> 10) << ((unit & 1 << 9) >> 6)


@dataclass(frozen=True)
class UnigramEncoder:
    """Text → ids by a Unigram model."""

    pieces: Pieces
    replacements: Replacements | None

    def encode(self, text: str) -> list[int]:
        """The ids of a text; several unknown characters in a row are one unknown.

        Time is proportional to the length of the text times that of the longest piece. Raises
        TokenizerError: a lone surrogate.
        """
        try:
            normalized = self.normalize(text)
        except UnicodeEncodeError:
            raise TokenizerError("text: a lone surrogate is no character") from None
        ids: list[int] = []
        for is_unknown, run in groupby(self._best(normalized), lambda part: part[0] == self._unk):
            parts = list(run)
            if not is_unknown:
                ids += [id for id, _ in parts]
            elif self._byte_ids:
                ids += [self._byte_ids[byte] for _, text in parts for byte in text.encode()]
            else:
                ids.append(self._unk)
        return ids

    def normalize(self, text: str) -> str:
        """Replacements made, ▁ for spaces: SentencePiece's Normalizer."""
        pieces, out, after_space = self.pieces, list[str](), self.pieces.trim
        for part in self._replaced(text.encode()):
            if after_space:
                part = part.lstrip(" ")
            out.append(part)
            if part:
                after_space = part.endswith(" ") and pieces.trim
        joined = "".join(out)
        if not joined.strip(" ") and pieces.trim:
            return ""
        joined = (" " if pieces.add_prefix and joined else "") + joined
        joined = joined.replace(" ", SPACE_SYMBOL)
        return joined.rstrip(SPACE_SYMBOL) if pieces.trim else joined

    def _replaced(self, data: bytes) -> Iterator[str]:
        """The replacements of matches of the table; user-defined pieces and others as they are."""
        at = 0
        while at < len(data):
            if found := self._user_defined(data, at):
                yield found
                at += len(found.encode())
                continue
            match = self.replacements.longest(data, at) if self.replacements else None
            if match is None:
                length = utf8_length(data[at])
                match = length, data[at : at + length]
            yield match[1].decode("utf-8", "replace")
            at += match[0]

    def _user_defined(self, data: bytes, at: int) -> str | None:
        """The longest user-defined piece at this byte."""
        return next((text for raw, text in self._fixed if data.startswith(raw, at)), None)

    def _best(self, text: str) -> list[tuple[int, str]]:
        """The pieces of the best way to cut a text: ids and texts. Sums are in float32."""
        scores = [np.float32(0)] + [np.float32(-np.inf)] * len(text)
        starts, ids = [0] * (len(text) + 1), [self._unk] * (len(text) + 1)
        for start in range(len(text)):
            here, has_single = scores[start], False
            for end, id, score in self._pieces_at(text, start):
                has_single |= end == start + 1
                if here + score > scores[end]:
                    scores[end], starts[end], ids[end] = here + score, start, id
            if not has_single and here + self._unknown_score > scores[start + 1]:
                scores[start + 1] = here + self._unknown_score
                starts[start + 1], ids[start + 1] = start, self._unk
        found, end = list[tuple[int, str]](), len(text)
        while end > 0:
            found.append((ids[end], text[starts[end] : end]))
            end = starts[end]
        return found[::-1]

    def _pieces_at(self, text: str, start: int) -> Iterator[tuple[int, int, np.float32]]:
        """The pieces that begin here: end, id, score."""
        node = self._trie
        for position in range(start, len(text)):
            below = node.get(text[position])
            if below is None:
                return
            node = below
            if "" in node:
                id = node[""]
                yield position + 1, id, self._scores[id]

    # --- made once --------------------------------------------------------------------------------

    @cached_property
    def _unk(self) -> int:
        return min(self.pieces.of_type(PieceType.UNKNOWN).values())

    @cached_property
    def _byte_ids(self) -> list[int]:
        found = self.pieces.of_type(PieceType.BYTE)
        return [found[f"<0x{byte:02X}>"] for byte in range(256)] if found else []

    @cached_property
    def _fixed(self) -> list[tuple[bytes, str]]:
        texts = self.pieces.of_type(PieceType.USER_DEFINED)
        return [(text.encode(), text) for text in sorted(texts, key=len, reverse=True)]

    @cached_property
    def _scores(self) -> list[np.float32]:
        own = np.array(self.pieces.scores, np.float32)
        normal = [id for id, type in enumerate(self.pieces.types) if type is PieceType.NORMAL]
        largest = own[normal].max() if normal else np.float32(0)
        for text, id in self.pieces.of_type(PieceType.USER_DEFINED).items():
            own[id] = np.float32(len(text.encode())) * largest - np.float32(USER_DEFINED_LESS)
        return [np.float32(score) for score in own]

    @cached_property
    def _unknown_score(self) -> np.float32:
        normal = [
            score
            for score, type in zip(self.pieces.scores, self.pieces.types, strict=True)
            if type is PieceType.NORMAL
        ]
        return np.float32(np.float32(min(normal, default=0.0)) - np.float32(UNKNOWN_PENALTY))

    @cached_property
    def _trie(self) -> dict[str, Any]:
        """Characters → the trie of what follows; "" → the id of a piece that ends here."""
        root: dict[str, Any] = {}
        for text, id in self.pieces.of_type(PieceType.NORMAL, PieceType.USER_DEFINED).items():
            node = root
            for character in text:
                node = node.setdefault(character, {})
            node[""] = id
        return root


class SiglipTokenizer:
    """Texts → the ids that SigLIP reads: lower case, no punctuation, an end, padding to T.

    Padding is not masked: SigLIP was trained to see it.
    """

    def __init__(self, encoder: UnigramEncoder, end: int, length: int = 64) -> None:
        """`end`: the id of </s>, which is the padding, too; `length`: T."""
        self.encoder, self.end, self.length = encoder, end, length

    def encode(self, text: str) -> list[int]:
        """(T,) ids; a longer text is cut. Raises TokenizerError."""
        plain = SPACES.sub(" ", text.lower().translate(PUNCTUATION)).strip()
        ids = self.encoder.encode(plain.replace(SPACE_SYMBOL, " "))[: self.length - 1]
        return ids + [self.end] * (self.length - len(ids))

    def encode_batch(self, texts: Iterable[str]) -> np.ndarray:
        """(N, T) int64."""
        return np.array([self.encode(text) for text in texts], np.int64)


def utf8_length(first: int) -> int:
    """Bytes of a character of UTF-8, from its first one."""
    return 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def read_siglip_tokenizer(path: Path, length: int = 64) -> SiglipTokenizer:
    """From spiece.model. TokenizerError: no such file, another type, a damaged table."""
    pieces, settings = read_model(path, UNIGRAM)
    charsmap = settings["precompiled_charsmap"]
    try:
        encoder = UnigramEncoder(pieces, Replacements(charsmap) if charsmap else None)
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from None
    return SiglipTokenizer(encoder, settings["eos_id"], length)
