"""SentencePiece's tokenizer.model: its protobuf encoding, and the tokenizer it describes.

A protobuf message is a sequence of fields, each a number and a value: an integer with seven bits in
a byte, four or eight raw bytes, or a length and that many bytes (text, or a nested message).
Sources: protobuf.dev, "Encoding"; sentencepiece_model.proto for the numbers of the fields.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.backend import PYTHON, BPEBackend
from glassllama.tokenizers.files import read_bounded
from glassllama.tokenizers.sentencepiece import (
    BYTE_PIECE,
    Pieces,
    PieceType,
    SentencePieceTokenizer,
)
from glassllama.tokenizers.special_tokens import END_OF_GENERATION, is_special, stop_ids_by_name

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types
MAX_VARINT = 10  # bytes: 64 bits, seven in each
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4  # TrainerSpec.ModelType
MODEL_TYPES = {UNIGRAM: "unigram", BPE: "bpe", WORD: "word", CHAR: "char"}


def read_sentencepiece(path: Path, backend: BPEBackend = PYTHON) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model of type BPE.

    TokenizerError: no such file, another type (unigram), or a normalization other than identity.
    """
    model = read_model(path)
    try:
        _check_supported(model)
        texts = [piece.text for piece in model.pieces]
        stop_ids = stop_ids_of(texts) | ({model.eos_id} if model.eos_id >= 0 else set())
        return SentencePieceTokenizer(
            Pieces(
                texts=tuple(texts),
                types=piece_types(texts, [piece.type for piece in model.pieces]),
                scores=tuple(piece.score for piece in model.pieces),
                add_prefix=model.add_dummy_prefix,
                trim=model.remove_extra_whitespaces,
                drop_prefix=model.add_dummy_prefix or model.remove_extra_whitespaces,
                unknown_text=model.unknown_text,
            ),
            bos=model.bos_id if model.bos_id >= 0 else None,
            stop_ids=stop_ids,
            backend=backend,
        )
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
    types = list(map(PieceType, numbers))
    for id, (text, type) in enumerate(zip(texts, types, strict=True)):
        if type == PieceType.USER_DEFINED and is_special(text):
            types[id] = PieceType.CONTROL
        if type == PieceType.BYTE and not BYTE_PIECE.fullmatch(text):
            raise TokenizerError(
                f"piece {id}: a byte is written <0x00> … <0xFF>, got {quoted(text)}"
            )
        if not text:
            types[id] = PieceType.UNUSED
    return tuple(types)


def stop_ids_of(texts: Sequence[str]) -> set[int]:
    """The ids of the pieces that end an answer by their name."""
    return stop_ids_by_name({t: id for id, t in enumerate(texts) if t in END_OF_GENERATION})


# tokenizer.model


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """The fields of ModelProto that decide which ids a text has. Defaults are the schema's."""

    pieces: tuple[Piece, ...]
    model_type: int
    bos_id: int  # -1: none; eos_id likewise
    eos_id: int
    byte_fallback: bool
    treat_whitespace_as_suffix: bool
    unknown_text: str  # unk_surface
    has_character_map: bool  # precompiled_charsmap: a normalization other than identity
    normalization: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_model(path: Path) -> SentencePieceModel:
    """TokenizerError: no such file, not a protobuf message, or not a SentencePiece model."""
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
    pieces, trainer, normalizer = [], _Message(), _Message()
    for number, value in _fields(data):
        match number, value:
            case 1, memoryview():
                pieces.append(_piece(_Message().read(value)))
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
        treat_whitespace_as_suffix=bool(trainer.number(24, 0)),
        unknown_text=trainer.text(44, " \u2047 "),
        has_character_map=bool(normalizer.bytes(2)),
        normalization=normalizer.text(1, ""),
        add_dummy_prefix=bool(normalizer.number(3, 1)),
        remove_extra_whitespaces=bool(normalizer.number(4, 1)),
        escape_whitespaces=bool(normalizer.number(5, 1)),
    )


def _piece(message: _Message) -> Piece:
    (score,) = struct.unpack("<f", message.bytes(2) or bytes(4))
    return Piece(message.text(1, ""), score, message.number(3, 1))


def _check_supported(model: SentencePieceModel) -> None:
    type = MODEL_TYPES.get(model.model_type, model.model_type)
    has_bytes = any(piece.type == PieceType.BYTE for piece in model.pieces)
    for is_supported, field, problem in (
        (model.model_type == BPE, "trainer_spec.model_type", f"want bpe, got {type}"),
        (
            not model.has_character_map,
            "normalizer_spec.precompiled_charsmap",
            f"normalization {quoted(model.normalization)} is not supported, only identity is",
        ),
        (
            model.escape_whitespaces,
            "normalizer_spec.escape_whitespaces",
            "false not supported",
        ),
        (
            not model.treat_whitespace_as_suffix,
            "trainer_spec.treat_whitespace_as_suffix",
            "not supported",
        ),
        (
            model.byte_fallback == has_bytes,
            "trainer_spec.byte_fallback",
            f"is {model.byte_fallback}, but pieces for bytes are "
            f"{'there' if has_bytes else 'missing'}",
        ),
    ):
        if not is_supported:
            raise TokenizerError(f"{field}: {problem}")


# Protobuf


class _Message:
    """The fields of one message, the last value of each; accessors check the type."""

    def __init__(self) -> None:
        self._values: dict[int, int | memoryview] = {}

    def read(self, data: memoryview) -> _Message:
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
    for shift in range(0, 7 * MAX_VARINT, 7):
        if at >= len(data):
            raise ValueError("ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than {MAX_VARINT} bytes at byte {at}")
