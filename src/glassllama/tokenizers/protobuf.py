"""SentencePiece's tokenizer.model: the fields that matter, out of its protobuf encoding.

A protobuf message is a row of fields, each a number and a value: a whole number of seven bits a
byte, four or eight raw bytes, or a length and so many bytes (text, or a message inside).

Sources: protobuf.dev, "Encoding"; sentencepiece_model.proto for the numbers of the fields.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.files import read_bounded

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
LONGEST_VARINT = 10  # bytes: 64 bits, seven in each
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4  # TrainerSpec.ModelType
MODEL_TYPES = {UNIGRAM: "unigram", BPE: "bpe", WORD: "word", CHAR: "char"}


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """ModelProto, as far as it decides what ids a text has. Defaults are the schema's."""

    pieces: tuple[Piece, ...]
    model_type: int
    bos_id: int  # -1 where there is none; so eos_id
    eos_id: int
    byte_fallback: bool
    blank_at_word_end: bool  # treat_whitespace_as_suffix
    unknown_text: str  # unk_surface
    has_character_map: bool  # precompiled_charsmap: a normalization that is not the identity
    normalization: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_model(path: Path) -> SentencePieceModel:
    """TokenizerError: no such file, no protobuf message, or not one of a SentencePiece model."""
    try:
        model = _model(memoryview(read_bounded(path)))
    except OSError as fault:
        raise TokenizerError(f"{path}: cannot be read ({fault.strerror})") from fault
    except (ValueError, struct.error) as fault:
        raise TokenizerError(
            f"{path}: is no SentencePiece model ({fault}); download it again"
        ) from fault
    if not model.pieces:
        raise TokenizerError(f"{path}: is no SentencePiece model: it holds no pieces")
    return model


def _model(data: memoryview) -> SentencePieceModel:
    pieces, trainer, normalizer = [], _Fields(), _Fields()
    for number, value in _fields(data):
        match number, value:
            case 1, memoryview():
                pieces.append(_piece(_Fields().read(value)))
            case 2, memoryview():
                trainer.read(value)
            case 3, memoryview():
                normalizer.read(value)
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=trainer.number(3, UNIGRAM),
        bos_id=trainer.number(41, 1),
        eos_id=trainer.number(42, 2),
        byte_fallback=bool(trainer.number(35, 0)),
        blank_at_word_end=bool(trainer.number(24, 0)),
        unknown_text=trainer.text(44, " \u2047 "),
        has_character_map=bool(normalizer.bytes(2)),
        normalization=normalizer.text(1, ""),
        add_dummy_prefix=bool(normalizer.number(3, 1)),
        remove_extra_whitespaces=bool(normalizer.number(4, 1)),
        escape_whitespaces=bool(normalizer.number(5, 1)),
    )


def _piece(fields: _Fields) -> Piece:
    (score,) = struct.unpack("<f", fields.bytes(2) or bytes(4))
    return Piece(fields.text(1, ""), score, fields.number(3, 1))


class _Fields:
    """The fields of one message, the last value of each; accessors check what they hold."""

    def __init__(self) -> None:
        self._values: dict[int, int | memoryview] = {}

    def read(self, data: memoryview) -> _Fields:
        self._values |= dict(_fields(data))
        return self

    def number(self, field: int, default: int) -> int:
        value = self._values.get(field, default)
        if not isinstance(value, int):
            raise ValueError(f"field {field} must be a number")
        return value - (1 << 64) if value >= 1 << 63 else value

    def bytes(self, field: int) -> bytes:
        value = self._values.get(field, memoryview(b""))
        if isinstance(value, int):
            raise ValueError(f"field {field} must be bytes")
        return value.tobytes()

    def text(self, field: int, default: str) -> str:
        return self.bytes(field).decode() if field in self._values else default


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message in order; raw bytes of numbers that are no varint."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == LENGTH:
            size, at = _varint(data, at)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            size = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"{size} bytes announced at byte {at}, {len(data) - at} left")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A whole number, seven bits a byte, the lowest first; and where it ends."""
    value = 0
    for place in range(LONGEST_VARINT):
        if at >= len(data):
            raise ValueError("ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than {LONGEST_VARINT} bytes at byte {at}")
