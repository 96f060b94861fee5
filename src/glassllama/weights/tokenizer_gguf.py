"""The tokenizer of a GGUF file, from its metadata `tokenizer.ggml.*`.

Where keys are missing, the rules of llama.cpp apply. Sources: GGUF specification, "tokenizer";
llama.cpp, src/llama-vocab.cpp (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields, is_integer
from glassllama.base.interfaces import Tokenizer
from glassllama.native.tokenizers import COMPILED
from glassllama.tokenizers import bpe
from glassllama.tokenizers.bpe import BytePairTokenizer
from glassllama.tokenizers.pretokenizer import OTHER_SPLITS, SPLITS
from glassllama.tokenizers.sentencepiece import BYTE_PIECE, Pieces, PieceType, piece_types
from glassllama.tokenizers.sentencepiece import SentencePieceTokenizer as PieceTokenizer
from glassllama.tokenizers.vocabulary import (
    END_OF_GENERATION,
    AddedToken,
    is_special,
    stop_ids_by_name,
)

# `tokenizer.ggml.pre` → name of a split. Converters wrote several names for the same pattern.
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), "llama3"),
    **dict.fromkeys(("pixtral", "midm-2.0", "lfm2", "smaug-bpe", "dbrx"), "llama3"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "smollm"),
    **dict.fromkeys(("exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum"), "gpt2"),
    **dict.fromkeys(("trillion", "granite-docling", "a.x-4.0"), "gpt2"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo"), "qwen2"),
    **dict.fromkeys(("gpt-4o", "llama4"), "gpt-4o"),
    **{name: name for name in ("tekken", "falcon", "default", "viking")},
    **{name: name for name in ("deepseek-llm", "deepseek-coder", "deepseek-v3")},
}
# For these, llama.cpp merges even a pretoken that is itself a token, and adds no bos.
NOT_LIKE_LLAMA3 = ("smaug-bpe", "dbrx")
ID_KEYS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
# What llama.cpp uses for SentencePiece where a file names no id, or one that it does not have.
DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2}
NO_ID = 2**32 - 1  # -1 as an unsigned number
BYTE_LEVEL_TYPES = {*PieceType} - {PieceType.BYTE}
Ids = Mapping[str, int | None]  # by the names in ID_KEYS
TEMPLATE_TOKENS = ("bos_token", "eos_token")  # names in chat templates


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. TokenizerError: names the key that is missing or unknown."""
    fields = gguf_fields(metadata)
    model = fields.text("model")
    if model not in ("gpt2", "llama"):
        fields.refuse("model", "'gpt2' (byte-level BPE) or 'llama' (SentencePiece)")
    texts = list[str](fields.items("tokens", of="text"))
    notes: list[str] = []
    defaults = DEFAULT_IDS if model == "llama" else {}
    ids = {key: named_id(fields, key, len(texts), defaults.get(key), notes) for key in ID_KEYS}
    types = per_token(fields, "token_type", texts, "integer")
    make = sentencepiece if model == "llama" else byte_level
    tokenizer = make(fields, texts, None if types is None else np.asarray(types).tolist(), ids)
    ends = {id for key, id in ids.items() if key != "bos_token_id" and id is not None}
    named = {text: id for id, text in enumerate(texts) if text in END_OF_GENERATION}
    tokenizer.stop_ids |= stop_ids_by_name(named) | ends
    tokenizer.notes += notes
    return tokenizer


def gguf_fields(metadata: Mapping[str, Any]) -> Fields:
    """The values of `tokenizer.ggml.*`, without this prefix."""
    prefix = "tokenizer.ggml."
    named = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return Fields("tokenizer.ggml", named, TokenizerError)


def byte_level(
    fields: Fields, texts: list[str], types: list[int] | None, ids: Ids
) -> BytePairTokenizer:
    """A byte-level tokenizer; of equal texts the last id is used, as in llama.cpp."""
    pre = fields.text("pre", "")
    if pre not in PRE_TOKENIZERS:
        came = f"is {quoted(pre)}, which is not supported" if pre else "is missing"
        raise TokenizerError(
            f"tokenizer.ggml: pre {came}; known are {', '.join(PRE_TOKENIZERS)}. Another pattern "
            "would split words wrongly: convert the model again, or set the key"
        )
    # llama.cpp's rule where the file is silent: Llama 3 and Tekken start with bos.
    like_llama3 = PRE_TOKENIZERS[pre] in ("llama3", "tekken") and pre not in NOT_LIKE_LLAMA3
    types = types or [PieceType.NORMAL] * len(texts)
    if strange := {*types} - BYTE_LEVEL_TYPES:
        raise TokenizerError(
            f"tokenizer.ggml: token_type: {min(strange)} has no place in a byte-level vocabulary"
        )
    ids_of = {type: dict[str, int]() for type in BYTE_LEVEL_TYPES}  # type → text → id
    for id, (text, type) in enumerate(zip(texts, with_named_specials(texts, types), strict=True)):
        if text:
            ids_of[PieceType(type)][text] = id
    normal = {t: id for t, id in ids_of[PieceType.NORMAL].items() if bpe.is_byte_level(t)}
    added = [
        AddedToken(id=id, text=text, is_special=type == PieceType.CONTROL or is_special(text))
        for type in (PieceType.CONTROL, PieceType.USER_DEFINED)
        for text, id in ids_of[type].items()
    ]
    used = {*normal.values(), *(token.id for token in added)}
    if not normal.keys() & bpe.BYTE_CHARACTERS:
        raise TokenizerError("tokenizer.ggml: tokens: no byte has one: no byte-level vocabulary")
    vocabulary = bpe.byte_level_vocabulary(
        tokens={id: text for text, id in normal.items()},
        merges=(),  # added by `with_merges`, which needs the ids
        added_tokens=added,
        unused={id: text for id, text in enumerate(texts) if id not in used},
        split={**SPLITS, **OTHER_SPLITS}[PRE_TOKENIZERS[pre]],
        ignore_merges=like_llama3,
    )
    return BytePairTokenizer(
        bpe.with_merges(vocabulary, fields.items("merges", of="text")),
        bos=ids["bos_token_id"] if fields.boolean("add_bos_token", like_llama3) else None,
        backend=COMPILED,
    )


def sentencepiece(
    fields: Fields, texts: list[str], types: list[int] | None, ids: Ids
) -> PieceTokenizer:
    """A SentencePiece tokenizer.

    Where keys are missing, bos and a space are put before a text, every piece is a normal one
    except the ends of a text, and of equal scores the leftmost pair merges first.
    """
    if types is None:
        types = [PieceType.UNKNOWN if text == "<unk>" else PieceType.NORMAL for text in texts]
        for id in (ids["bos_token_id"], ids["eos_token_id"]):
            if id is not None:
                types[id] = PieceType.CONTROL
    if PieceType.BYTE not in types:
        types = [
            PieceType.BYTE if BYTE_PIECE.fullmatch(text) else type
            for text, type in zip(texts, types, strict=True)
        ]
    given = per_token(fields, "scores", texts, "number")
    scores = np.zeros(len(texts)) if given is None else np.asarray(given, np.float64)
    char_map = fields.values.get("precompiled_charsmap")  # bytes, as a list of numbers or as text
    if char_map is not None and (not isinstance(char_map, Sized) or len(char_map)):
        fields.refuse("precompiled_charsmap", "none: only the identity is supported")
    add_prefix = fields.boolean("add_space_prefix", True)
    pieces = Pieces(
        texts=tuple(texts),
        types=piece_types(texts, with_named_specials(texts, types)),
        scores=tuple(scores.tolist()),
        add_prefix=add_prefix,
        drop_prefix=add_prefix,
        added_first=True,
    )
    bos = ids["bos_token_id"] if fields.boolean("add_bos_token", True) else None
    return PieceTokenizer(pieces, bos=bos, backend=COMPILED)


def with_named_specials(texts: Sequence[str], types: Sequence[int]) -> list[int]:
    """The types, where tokens whose name marks the end of an answer are special."""
    return [
        PieceType.CONTROL if text in END_OF_GENERATION else type
        for text, type in zip(texts, types, strict=True)
    ]


def per_token(fields: Fields, key: str, texts: Sequence[str], of: str) -> Sequence[Any] | None:
    """A list with a value for every token, or None if the file has none."""
    values = fields.items(key, None, of=of)
    if values is not None and len(values) != len(texts):
        raise TokenizerError(
            f"tokenizer.ggml: {key} has {len(values)} values for {len(texts)} tokens"
        )
    return values


def token_id(fields: Fields, key: str, default: int | None = None) -> int | None:
    """An id that the file names, or None: files write 2^32 - 1 or -1 for no id."""
    value = fields.values.get(key)
    if is_integer(value) and value in (-1, NO_ID):
        return None
    return fields.integer(key, default, minimum=0)


def named_id(
    fields: Fields, key: str, size: int, default: int | None, notes: list[str]
) -> int | None:
    """An id that the file names. One of `size` or more becomes the default, with a note."""
    default = default if default is not None and default < size else None
    id = token_id(fields, key, default)
    if id is None or id < size:
        return id
    notes.append(f"tokenizer.ggml: {key} is {id}, beyond the {size} tokens: not used")
    return default


def template_tokens_from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of `bos_token` and `eos_token` in a chat template, if the file names them."""
    fields = gguf_fields(metadata)
    tokens = fields.items("tokens", of="text")
    ids = {name: token_id(fields, f"{name}_id") for name in TEMPLATE_TOKENS}
    return {n: str(tokens[id]) for n, id in ids.items() if id is not None and id < len(tokens)}
