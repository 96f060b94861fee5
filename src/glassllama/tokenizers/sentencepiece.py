"""SentencePiece BPE, as used by Llama 2, TinyLlama, Mistral and Gemma: on characters, not bytes.

    "Hello é" → ▁Hello▁é → ▁ H e l l o ▁ é → … → ▁Hello ▁ <0xC3> <0xA9>

Spaces become ▁ (U+2581), and most models put one before the text, so that a word is the same token
at the start of a text and after a space. Neighbors merge as long as they make a piece of the
vocabulary, the piece with the best score first, the leftmost of equals. A character that is not a
piece becomes the pieces of its UTF-8 bytes. Source: Kudo and Richardson, SentencePiece (2018).

The second half reads SentencePiece's tokenizer.model, a protobuf message: fields that each have
a number and a value. A value is an integer with seven bits in a byte, four or eight raw bytes,
or a length and that many bytes (text or a nested message). Sources: protobuf.dev, "Encoding";
sentencepiece_model.proto for the numbers of the fields.
"""

from __future__ import annotations

import copy
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.backend import PYTHON, BPEBackend, Merger
from glassllama.tokenizers.bpe import CACHED_PRETOKENS, merge
from glassllama.tokenizers.vocabulary import (
    END_OF_GENERATION,
    NEVER,
    PairRow,
    TokenizerBase,
    TokenTrie,
    is_special,
    read_bounded,
    stop_ids_by_name,
)

SPACE_SYMBOL = "\u2581"  # ▁
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
SHORT = 32  # characters; shorter segments are cached and not cut further
LONG = 256  # characters; a longer segment is merged by the backend
LONG_TEXT = 2**18  # characters: segments of a longer text are found one by one


class PieceType(IntEnum):
    """SentencePiece.Type of sentencepiece_model.proto; GGUF's token_type has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The contents of a file of a SentencePiece tokenizer, whatever its format.

    `texts` and `types` by id; of equal texts the last is used. Pieces merge by `scores`, the
    highest first. UNUSED pieces are never made.

    `add_prefix`: a space is put before every part of the text between special tokens; with
    `prefix_once` only at the start of the whole text; without `prefix_doubled` not before another
    space. `trim` drops spaces at the ends and repeated ones. `drop_prefix`: decoding drops the
    space at the start. `added_first`: the text is split at user-defined pieces without ▁ before
    spaces are treated, as in llama.cpp.
    """

    texts: tuple[str, ...] = field(repr=False)
    types: tuple[PieceType, ...] = field(repr=False)
    scores: tuple[float, ...] = field(repr=False)
    add_prefix: bool = True
    prefix_once: bool = False
    prefix_doubled: bool = True
    trim: bool = False
    drop_prefix: bool = True
    added_first: bool = False
    unknown_text: str = " \u2047 "

    def of_type(self, *types: PieceType) -> dict[str, int]:
        """Text → id of the pieces of these types; of equal texts the last id."""
        all_ids = range(len(self.texts)) if PieceType.NORMAL in types else self.other_ids
        return {self.texts[id]: id for id in all_ids if self.types[id] in types}

    @cached_property
    def other_ids(self) -> list[int]:
        """The ids of the pieces that are not normal ones: a small part of all."""
        return [id for id, type in enumerate(self.types) if type is not PieceType.NORMAL]

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a piece, ▁ as a space; of a special token its text."""
        text, type = self.texts[id], self.types[id]
        if type == PieceType.BYTE:
            return bytes([int(text[3:5], 16)])
        if type == PieceType.UNKNOWN:
            return self.unknown_text.encode()
        return (text if type == PieceType.CONTROL else text.replace(SPACE_SYMBOL, " ")).encode()


class SegmentEncoder:
    """Encodes a text in segments, between which nothing can merge, and caches the short ones.

    A segment ends between two characters that are neighbors in no token, so cutting changes no id.
    """

    def __init__(self, tokens: Iterable[str], encode: Callable[[str], list[int]]) -> None:
        """`tokens`: the texts of all tokens that merges make; `encode`: the ids of a segment."""
        self._tokens = tuple(tokens)
        self._encode = encode
        self._cache: dict[str, list[int]] = {}

    def id_lists(self, text: str) -> Iterator[list[int]]:
        return map(self.encode_segment, self._segments(text))

    def encode_segment(self, segment: str) -> list[int]:
        known = self._cache.get(segment)
        if known is None:
            known = self._encode(segment)
            if len(segment) <= SHORT:
                if len(self._cache) >= CACHED_PRETOKENS:
                    self._cache.clear()
                self._cache[segment] = known
        return known

    def _segments(self, text: str) -> Iterator[str]:
        for word in self._words(text):
            begin = 0
            for at in range(1, len(word)) if len(word) > SHORT else ():
                if word[at - 1 : at + 1] not in self._neighbors:
                    yield word[begin:at]
                    begin = at
            yield word[begin:]

    def _words(self, text: str) -> Iterator[str]:
        """The text, cut before a ▁ where no token spans the cut."""
        if len(text) <= LONG_TEXT:
            yield from self._word_start.split(text)
            return
        begin = 0
        for found in self._word_start.finditer(text):
            yield text[begin : found.start()]
            begin = found.start()
        yield text[begin:]

    @cached_property
    def _neighbors(self) -> frozenset[str]:
        """All pairs of neighboring characters in tokens."""
        return frozenset(t[at : at + 2] for t in self._tokens for at in range(len(t) - 1))

    @cached_property
    def _word_start(self) -> re.Pattern[str]:
        spanned = {
            text[at]
            for text in self._tokens
            for at in range(len(text) - 1)
            if text[at + 1] == SPACE_SYMBOL
        }
        before = f"(?<=[^{re.escape(''.join(sorted(spanned)))}])" if spanned else ""
        return re.compile(f"{before}(?={SPACE_SYMBOL})")


class SentencePieceTokenizer(TokenizerBase):
    """Text ↔ ids by SentencePiece's BPE; a `base.interfaces.Tokenizer`.

    `decode` gives the encoded text back, but ▁ as a space. It leaves out special tokens, and the
    space before the first piece where encoding adds one. The empty text has no ids. NUL, BOM and
    unassigned code points are ordinary characters. A lone surrogate is a TokenizerError. Bytes that
    are not UTF-8 decode to U+FFFD as Python groups them.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        bos: int | None = None,
        stop_ids: Iterable[int] = (),
        backend: BPEBackend = PYTHON,
    ) -> None:
        tokens = [text.replace(SPACE_SYMBOL, " ").encode() for text in pieces.texts]
        for id in pieces.other_ids:
            tokens[id] = pieces.token_bytes(id)
        ids = {text: id for id, text in enumerate(pieces.texts) if text in END_OF_GENERATION}
        super().__init__(tokens, bos=bos, stop_ids={*stop_ids, *stop_ids_by_name(ids)})
        self.pieces = pieces
        self.specials = MappingProxyType(pieces.of_type(PieceType.CONTROL))
        self._backend = backend
        self._special_ids = pieces.of_type(PieceType.CONTROL, PieceType.UNKNOWN)
        self._special_trie = TokenTrie(self._special_ids)
        self._set_added(pieces.of_type(PieceType.USER_DEFINED))
        self._ids = pieces.of_type(PieceType.NORMAL)
        self._ranks = _ranks(pieces, self._ids)
        self._byte_ids, self._unknown = _fallback(pieces)
        self._segments = SegmentEncoder(self._ids, self._encode_segment)
        self._hidden = frozenset(self.specials.values())

    @property
    def added(self) -> Mapping[str, int]:
        return self._added

    def _set_added(self, added: dict[str, int]) -> None:
        self._added = added
        first = {text for text in added if self.pieces.added_first and SPACE_SYMBOL not in text}
        self._first_trie = TokenTrie(first)
        self._added_trie = TokenTrie(added.keys() - first)

    def without_added(self, texts: Iterable[str]) -> SentencePieceTokenizer:
        other, removed = copy.copy(self), {*texts}
        other._set_added({text: id for text, id in self._added.items() if text not in removed})
        return other

    def _id_lists(self, text: str, specials: bool, at_start: bool) -> Iterator[list[int]]:
        parts = self._special_trie.split(text) if specials else [text]  # text, token, text, …
        for n, part in enumerate(parts):
            if n % 2:
                yield [self._special_ids[part]]
                continue
            for m, inner in enumerate(self._first_trie.split(part)):
                is_first = at_start and n == m == 0
                yield [self._added[inner]] if m % 2 else self._encode_text(inner, is_first)

    def _encode_text(self, text: str, is_first: bool) -> list[int]:
        text.encode()  # UnicodeEncodeError: a lone surrogate
        ids: list[int] = []
        for n, part in enumerate(self._added_trie.split(self._with_spaces(text, is_first))):
            if n % 2:
                ids.append(self._added[part])
            else:
                ids += chain.from_iterable(self._segments.id_lists(part))
        if self._byte_ids is not None:
            return ids
        # Several characters without a piece are one unknown.
        runs = ((id, list(run)) for id, run in groupby(ids))
        return [id for value, run in runs for id in (run[:1] if value == self._unknown else run)]

    def _with_spaces(self, text: str, is_first: bool) -> str:
        """The text with ▁ for spaces, and one in front."""
        if self.pieces.trim:
            text = " ".join(filter(None, text.split(" ")))
        if not text:
            return ""
        text = text.replace(" ", SPACE_SYMBOL)
        pieces = self.pieces
        adds_prefix = pieces.add_prefix and (is_first or not pieces.prefix_once)
        if adds_prefix and (pieces.prefix_doubled or text[0] != SPACE_SYMBOL):
            text = SPACE_SYMBOL + text
        return text.rstrip(SPACE_SYMBOL) if self.pieces.trim else text

    def _encode_segment(self, segment: str) -> list[int]:
        parts = merge([*segment], self._rank) if len(segment) <= LONG else self._merge_long(segment)
        ids: list[int] = []
        for part in parts:
            if (id := self._ids.get(part)) is not None:
                ids.append(id)
            elif self._byte_ids is not None:
                ids += [self._byte_ids[byte] for byte in part.encode()]
            else:
                ids.append(self._unknown)
        return ids

    def _rank(self, left: str, right: str) -> int:
        return self._ranks.get(left + right, NEVER)

    def _merge_long(self, segment: str) -> list[str]:
        """What `merge` gives, in a time that hardly exceeds the length of the segment."""
        numbers = dict(self._numbers)
        symbols = [numbers.setdefault(character, len(numbers)) for character in segment]
        texts = list(numbers)
        return [texts[number] for number in self._merger(np.array(symbols, np.int32)).tolist()]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Numbers for all parts of pairs: pieces, and the characters in them."""
        texts = dict.fromkeys(self._ids) | dict.fromkeys(chain.from_iterable(self._ids))
        return {text: number for number, text in enumerate(texts)}

    @cached_property
    def _merger(self) -> Merger:
        return self._backend.merger(self._pair_rows())

    def _pair_rows(self) -> Iterator[PairRow]:
        """All ways to split a piece in two parts that are pieces or characters."""
        numbers = self._numbers
        for text, rank in self._ranks.items():
            for cut in range(1, len(text)):
                left, right = numbers.get(text[:cut]), numbers.get(text[cut:])
                if left is not None and right is not None:
                    yield left, right, rank, numbers[text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and without the space that encoding adds."""
        texts = []
        at_start = self.pieces.drop_prefix
        for id in ids:
            data = self.token_bytes(id)
            if id in self._hidden or not data:
                continue
            if at_start and self.pieces.texts[id].startswith(SPACE_SYMBOL):
                data = data[1:]
                at_start = self.pieces.trim and not data
            else:
                at_start = False
            texts.append(data)
        return b"".join(texts).decode("utf-8", "replace")


def _ranks(pieces: Pieces, ids: Mapping[str, int]) -> dict[str, int]:
    """Text → rank of the merges that make it, 0 for the best score."""
    if not all(map(math.isfinite, pieces.scores)):
        raise TokenizerError("vocabulary: a score is no finite number; the file is damaged")
    scores = np.array([pieces.scores[id] for id in ids.values()])
    _, ranks = np.unique(-scores, return_inverse=True)
    return dict(zip(ids, ranks.tolist(), strict=True))


def _fallback(pieces: Pieces) -> tuple[list[int] | None, int]:
    """The ids of the 256 bytes, if there are such pieces; and the id of the unknown piece."""
    byte_pieces = pieces.of_type(PieceType.BYTE)
    unknown = min(pieces.of_type(PieceType.UNKNOWN).values(), default=None)
    if byte_pieces:
        names = [f"<0x{value:02X}>" for value in range(256)]
        if missing := [name for name in names if name not in byte_pieces]:
            raise TokenizerError(f"vocabulary: has pieces for bytes, but none for {missing[0]}")
        return [byte_pieces[name] for name in names], -1
    if unknown is None:
        raise TokenizerError("vocabulary: neither pieces for bytes nor one for the unknown")
    return None, unknown


# tokenizer.model

UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4  # TrainerSpec.ModelType
MODEL_TYPES = {UNIGRAM: "unigram", BPE: "bpe", WORD: "word", CHAR: "char"}
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of ModelProto
TEXT, SCORE, TYPE = 1, 2, 3  # fields of a piece
# What else decides which ids a text has: message, number of the field → name, default.
SETTINGS: dict[tuple[int, int], tuple[str, int | str | bytes]] = {
    (TRAINER, 3): ("model_type", UNIGRAM),
    (TRAINER, 24): ("treat_whitespace_as_suffix", False),
    (TRAINER, 35): ("byte_fallback", False),
    (TRAINER, 41): ("bos_id", 1),
    (TRAINER, 42): ("eos_id", 2),
    (TRAINER, 44): ("unk_surface", " \u2047 "),
    (NORMALIZER, 1): ("name", ""),
    (NORMALIZER, 2): ("precompiled_charsmap", b""),
    (NORMALIZER, 3): ("add_dummy_prefix", True),
    (NORMALIZER, 4): ("remove_extra_whitespaces", True),
    (NORMALIZER, 5): ("escape_whitespaces", True),
}
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types
MAX_VARINT = 10  # bytes: 64 bits, seven in each


def read_sentencepiece(path: Path, backend: BPEBackend = PYTHON) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model of type BPE.

    TokenizerError: no such file, another type (unigram), or a normalization other than identity.
    """
    pieces, settings = read_model(path, BPE)
    bos, eos = (id if id >= 0 else None for id in (settings["bos_id"], settings["eos_id"]))
    stop_ids = () if eos is None else (eos,)
    try:
        return SentencePieceTokenizer(pieces, bos=bos, stop_ids=stop_ids, backend=backend)
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from fault


def read_model(path: Path, model_type: int) -> tuple[Pieces, dict[str, Any]]:
    """The pieces and SETTINGS of a SentencePiece model of this type. TokenizerError."""
    try:
        return _model(memoryview(read_bounded(path)), model_type)
    except OSError as fault:
        raise TokenizerError(f"{path}: cannot be read ({fault.strerror})") from fault
    except (ValueError, struct.error) as fault:
        what = f"is no SentencePiece model ({fault}); download it again"
        raise TokenizerError(f"{path}: {what}") from fault
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from fault


def piece_types(texts: Sequence[str], numbers: Sequence[int]) -> tuple[PieceType, ...]:
    """The types of pieces from their numbers in a file; empty pieces are UNUSED.

    A USER_DEFINED piece that looks like a special token is a CONTROL piece.
    """
    if wrong := set(numbers) - {type.value for type in PieceType}:
        raise TokenizerError(
            f"vocabulary: type {min(wrong)} of a token is not known, only 1 … 6 are"
        )
    by_number = {type.value: type for type in PieceType}
    types = [by_number[number] for number in numbers]
    for id, (text, type) in enumerate(zip(texts, types, strict=True)):
        if type is PieceType.NORMAL and text:
            continue  # nearly all are
        if type is PieceType.BYTE and not BYTE_PIECE.fullmatch(text):
            raise TokenizerError(
                f"piece {id}: a byte is written <0x00> … <0xFF>, got {quoted(text)}"
            )
        if not text:
            types[id] = PieceType.UNUSED
        elif type is PieceType.USER_DEFINED and is_special(text):
            types[id] = PieceType.CONTROL
    return tuple(types)


def _model(data: memoryview, model_type: int) -> tuple[Pieces, dict[str, Any]]:
    """The pieces and SETTINGS. ValueError: not such a message. TokenizerError: not supported."""
    messages: dict[int, dict[int, int | memoryview]] = {TRAINER: {}, NORMALIZER: {}}
    pieces: list[tuple[str, float, int]] = []
    for number, value in _fields(data):
        if isinstance(value, memoryview) and number == PIECES:
            fields = dict(_fields(value))
            (score,) = struct.unpack("<f", _value(fields, SCORE, bytes(4)))
            pieces.append((_value(fields, TEXT, ""), score, _value(fields, TYPE, 1)))
        elif isinstance(value, memoryview) and number in messages:
            messages[number] |= dict(_fields(value))
    if not pieces:
        raise ValueError("it holds no pieces")
    settings = {
        name: _value(messages[message], number, default)
        for (message, number), (name, default) in SETTINGS.items()
    }
    texts, scores, numbers = zip(*pieces, strict=True)
    _check_supported(settings, model_type, PieceType.BYTE in numbers)
    adds_prefix, trims = settings["add_dummy_prefix"], settings["remove_extra_whitespaces"]
    found = Pieces(
        texts=texts,
        types=piece_types(texts, numbers),
        scores=scores,
        add_prefix=adds_prefix,
        trim=trims,
        drop_prefix=adds_prefix or trims,
        unknown_text=settings["unk_surface"],
    )
    return found, settings


def _check_supported(settings: Mapping[str, Any], model_type: int, has_bytes: bool) -> None:
    type, name = settings["model_type"], quoted(settings["name"])
    fallback = settings["byte_fallback"]
    bytes_are = "there" if has_bytes else "missing"
    checks = {
        f"trainer_spec.model_type: expected {MODEL_TYPES[model_type]}, got "
        f"{MODEL_TYPES.get(type, type)}": type == model_type,
        f"normalizer_spec.precompiled_charsmap: normalization {name} is not supported, only "
        "identity is": model_type == UNIGRAM or not settings["precompiled_charsmap"],
        "normalizer_spec.escape_whitespaces: false not supported": settings["escape_whitespaces"],
        "trainer_spec.treat_whitespace_as_suffix: not supported":
            not settings["treat_whitespace_as_suffix"],
        f"trainer_spec.byte_fallback: is {fallback}, but pieces for bytes are {bytes_are}":
            fallback == has_bytes,
    }  # fmt: skip
    for problem, is_supported in checks.items():
        if not is_supported:
            raise TokenizerError(problem)


def _value(fields: Mapping[int, int | memoryview], number: int, default: Any) -> Any:
    """The value of a field, of the type of its default."""
    value = fields.get(number)
    if value is None:
        return default
    if isinstance(value, int) != isinstance(default, int):
        raise ValueError(f"field {number} must be of type {type(default).__name__}")
    if isinstance(value, memoryview):
        return str(value, "utf-8") if isinstance(default, str) else value.tobytes()
    value -= (value >> 63) << 64
    return bool(value) if isinstance(default, bool) else value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message in order; raw bytes of numbers that are not varints."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire_type = key & 7
        if wire_type == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire_type == LENGTH:
            size, at = _varint(data, at)
        elif wire_type in (EIGHT_BYTES, FOUR_BYTES):
            size = 8 if wire_type == EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"{size} bytes announced at byte {at}, {len(data) - at} left")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer, seven bits a byte, the lowest first; and the position after it."""
    value = 0
    for size, byte in enumerate(data[at : at + MAX_VARINT]):
        value |= (byte & 0x7F) << 7 * size
        if byte < 0x80:
            return value, at + size + 1
    raise ValueError(f"a number of more than {MAX_VARINT} bytes, or a cut one, at byte {at}")
