"""SentencePiece-style vocabularies out of tokenizer.model, tokenizer.json and GGUF metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields, is_whole
from glassllama.tokenizers.byte_level import is_control
from glassllama.tokenizers.ends import END_OF_ANSWER, end_ids
from glassllama.tokenizers.pieces import Kind, Pieces, SentencePieceTokenizer
from glassllama.tokenizers.protobuf import BPE, MODEL_TYPES, SentencePieceModel, read_model

__all__ = [
    "SentencePieceTokenizer",
    "read_sentencepiece",
    "sentencepiece_from_gguf",
]

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# What llama.cpp takes for such a vocabulary where a file names none, or one that it does not have.
DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": None, "eom_token_id": None}
NO_ID = 2**32 - 1  # -1 as GGUF's unsigned numbers have it


# tokenizer.model


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model of type BPE.

    TokenizerError: no such file, another type (unigram), or a normalization other than identity.
    """
    model = read_model(path)
    try:
        _check_supported(model)
        texts = [piece.text for piece in model.pieces]
        return SentencePieceTokenizer(
            Pieces(
                texts=tuple(texts),
                kinds=_kinds(texts, [piece.kind for piece in model.pieces]),
                scores=tuple(piece.score for piece in model.pieces),
                prefix=model.add_dummy_prefix,
                trim=model.remove_extra_whitespaces,
                drop_prefix=model.add_dummy_prefix or model.remove_extra_whitespaces,
                unknown_text=model.unknown_text,
            ),
            bos=model.bos_id if model.bos_id >= 0 else None,
            stop_ids=_ends(texts, model.eos_id if model.eos_id >= 0 else None),
        )
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from fault


def require(true: bool, field: str, problem: str) -> None:
    if not true:
        raise TokenizerError(f"{field}: {problem}")


def _check_supported(model: SentencePieceModel) -> None:
    kind = MODEL_TYPES.get(model.model_type, model.model_type)
    require(model.model_type == BPE, "trainer_spec.model_type", f"want bpe, got {kind}")
    require(
        not model.has_character_map,
        "normalizer_spec.precompiled_charsmap",
        f"normalization {quoted(model.normalization)} is not supported, only identity is",
    )
    require(model.escape_whitespaces, "normalizer_spec.escape_whitespaces", "false not supported")
    require(not model.blank_at_word_end, "trainer_spec.treat_whitespace_as_suffix", "not supported")
    has_bytes = any(piece.kind == Kind.BYTE for piece in model.pieces)
    require(
        model.byte_fallback == has_bytes,
        "trainer_spec.byte_fallback",
        f"is {model.byte_fallback}, but pieces for bytes are {'there' if has_bytes else 'missing'}",
    )


# GGUF


def gguf_fields(metadata: Mapping[str, Any]) -> Fields:
    """The values of `tokenizer.ggml.*`, by their names behind that."""
    prefix = "tokenizer.ggml."
    named = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return Fields("tokenizer.ggml", named, TokenizerError)


def sentencepiece_from_gguf(metadata: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer of GGUF metadata whose `tokenizer.ggml.model` is "llama".

    Where keys are missing, llama.cpp's rules hold: bos and a blank are put before a text, every
    piece is a normal one, and of equal scores the leftmost pair merges first.
    TokenizerError names the key that is missing or wrong.
    """
    fields = gguf_fields(metadata)
    texts = [str(text) for text in fields.items("tokens", of="text")]
    ids, notes = named_ids(fields, len(texts), DEFAULT_IDS)
    bos, eos = ids["bos_token_id"], ids["eos_token_id"]
    kinds = as_long(fields, "token_type", len(texts), "whole")
    numbers = [int(kind) for kind in kinds] if kinds is not None else _guessed(texts, bos, eos)
    if Kind.BYTE not in numbers:
        numbers = [
            Kind.BYTE if BYTE_PIECE.fullmatch(t) else n for t, n in zip(texts, numbers, strict=True)
        ]
    numbers = [
        Kind.CONTROL if t in END_OF_ANSWER else n for t, n in zip(texts, numbers, strict=True)
    ]
    scores = as_long(fields, "scores", len(texts), "number")
    table = fields.values.get("precompiled_charsmap")  # bytes, as a list of numbers or as text
    if table is not None and (not isinstance(table, Sized) or len(table)):
        fields.refuse("precompiled_charsmap", "none: only the identity is supported")
    prefix = bool(fields.boolean("add_space_prefix", True))
    tokenizer = SentencePieceTokenizer(
        Pieces(
            texts=tuple(texts),
            kinds=_kinds(texts, numbers),
            scores=(0.0,) * len(texts) if scores is None else tuple(map(float, scores)),
            prefix=prefix,
            drop_prefix=prefix,
            added_first=True,
        ),
        bos=bos if fields.boolean("add_bos_token", True) else None,
        stop_ids=_ends(texts, eos) | {id for key in STOP_KEYS if (id := ids[key]) is not None},
    )
    tokenizer.notes += notes
    return tokenizer


def token_id(fields: Fields, key: str, default: int | None = None) -> int | None:
    """An id of GGUF's metadata; files write 2^32 - 1 or -1 where there is none."""
    value = fields.values.get(key)
    if is_whole(value) and value in (-1, NO_ID):
        return None
    return fields.whole(key, default, least=0)


def named_ids(
    fields: Fields, size: int, defaults: Mapping[str, int | None]
) -> tuple[dict[str, int | None], list[str]]:
    """The ids that a GGUF file names, and notes. An id of `size` or more becomes the default."""
    ids: dict[str, int | None] = {}
    notes: list[str] = []
    for key, default in defaults.items():
        usual = default if default is not None and default < size else None
        id = token_id(fields, key, usual)
        if id is not None and id >= size:
            notes.append(f"tokenizer.ggml: {key} is {id}, beyond the {size} tokens: not used")
            id = usual
        ids[key] = id
    return ids, notes


def as_long(fields: Fields, key: str, length: int, of: str) -> Sequence[Any] | None:
    """A list with a value for every token, or None where the file has none."""
    values = fields.items(key, None, of=of)
    if values is not None and len(values) != length:
        raise TokenizerError(f"tokenizer.ggml: {key} has {len(values)} values for {length} tokens")
    return values


def _guessed(texts: Sequence[str], bos: int | None, eos: int | None) -> list[int]:
    """The kinds of pieces in a file that gives none: normal, but for the ends of a text."""
    ends = {id for id in (bos, eos) if id is not None and id < len(texts)}
    return [
        Kind.CONTROL if id in ends else Kind.UNKNOWN if text == "<unk>" else Kind.NORMAL
        for id, text in enumerate(texts)
    ]


def _kinds(texts: Sequence[str], numbers: Sequence[int]) -> tuple[Kind, ...]:
    known = {kind.value for kind in Kind}
    if wrong := set(numbers) - known:
        raise TokenizerError(
            f"vocabulary: type {min(wrong)} of a token is not known, only 1 … 6 are"
        )
    kinds = list(map(Kind, numbers))
    for id, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind == Kind.USER_DEFINED and is_control(text):
            kinds[id] = Kind.CONTROL
        if kind == Kind.BYTE and not BYTE_PIECE.fullmatch(text):
            raise TokenizerError(
                f"piece {id}: a byte is written <0x00> … <0xFF>, got {quoted(text)}"
            )
        if not text:
            kinds[id] = Kind.UNUSED
    return tuple(kinds)


def _ends(texts: Sequence[str | None], eos: int | None) -> set[int]:
    ends = end_ids({text: id for id, text in enumerate(texts) if text in END_OF_ANSWER})
    return ends if eos is None else ends | {eos}
