"""The tokenizer of a GGUF file, from its metadata `tokenizer.ggml.*`.

Where keys are missing, the rules of llama.cpp apply. Sources: GGUF specification, "tokenizer";
llama.cpp, src/llama-vocab.cpp (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields, is_whole
from glassllama.base.interfaces import Tokenizer
from glassllama.native.tokenizers import COMPILED
from glassllama.tokenizers.bpe import (
    BYTE_CHARACTERS,
    BytePairTokenizer,
    byte_level_vocabulary,
    is_byte_level,
    with_merges,
)
from glassllama.tokenizers.pretokenizer import OTHER_SPLITS, SPLITS
from glassllama.tokenizers.sentencepiece import (
    BYTE_PIECE,
    Pieces,
    PieceType,
    SentencePieceTokenizer,
    piece_types,
    stop_ids_of,
)
from glassllama.tokenizers.vocabulary import END_OF_GENERATION, AddedToken, Vocabulary, is_special

# `tokenizer.ggml.pre` → name of a split. Converters wrote several names for the same pattern.
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), "llama3"),
    **dict.fromkeys(("pixtral", "midm-2.0", "lfm2", "smaug-bpe", "dbrx"), "llama3"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "smollm"),
    **dict.fromkeys(("exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum"), "gpt2"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("gpt-4o", "llama4"), "gpt-4o"),
    **{name: name for name in ("tekken", "falcon", "default", "viking")},
    **{name: name for name in ("deepseek-llm", "deepseek-coder", "deepseek-v3")},
}
# With these llama.cpp merges pretokens that are tokens, and starts texts without bos.
NOT_LIKE_LLAMA3 = ("smaug-bpe", "dbrx")
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# What llama.cpp uses for SentencePiece where a file names no id, or one that it does not have.
DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": None, "eom_token_id": None}
NO_ID = 2**32 - 1  # -1 as an unsigned number
BYTE_LEVEL_TYPES = {*PieceType} - {PieceType.BYTE}
TEMPLATE_TOKENS = ("bos_token", "eos_token")  # names in chat templates


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. TokenizerError: names the key that is missing or unknown."""
    fields = gguf_fields(metadata)
    model = fields.text("model")
    if model == "llama":
        return sentencepiece_from_gguf(metadata)
    if model != "gpt2":
        fields.refuse("model", "'gpt2' (byte-level BPE) or 'llama' (SentencePiece)")
    texts = [str(text) for text in fields.items("tokens", of="text")]
    pre = pre_tokenizer_name(fields)
    # llama.cpp's rule where the file is silent: Llama 3 and Tekken start with bos.
    like_llama3 = PRE_TOKENIZERS[pre] in ("llama3", "tekken") and pre not in NOT_LIKE_LLAMA3
    vocabulary = gguf_vocabulary(fields, texts, PRE_TOKENIZERS[pre], ignore_merges=like_llama3)
    ids, notes = named_ids(fields, len(texts), dict.fromkeys(DEFAULT_IDS))
    tokenizer = BytePairTokenizer(
        vocabulary,
        bos=ids["bos_token_id"] if fields.boolean("add_bos_token", like_llama3) else None,
        stop_ids=gguf_stop_ids(texts, ids),
        backend=COMPILED,
    )
    tokenizer.notes += notes
    return tokenizer


def gguf_fields(metadata: Mapping[str, Any]) -> Fields:
    """The values of `tokenizer.ggml.*`, without this prefix."""
    prefix = "tokenizer.ggml."
    named = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return Fields("tokenizer.ggml", named, TokenizerError)


def gguf_vocabulary(
    fields: Fields, texts: list[str], split: str, *, ignore_merges: bool
) -> Vocabulary:
    """The byte-level vocabulary; of equal texts the last id is used, as in llama.cpp."""
    values = per_token(fields, "token_type", texts, "whole")
    types = [PieceType.NORMAL] * len(texts) if values is None else [int(type) for type in values]
    if strange := {*types} - BYTE_LEVEL_TYPES:
        raise TokenizerError(
            f"tokenizer.ggml: token_type: {min(strange)} has no place in a byte-level vocabulary"
        )
    types = with_named_specials(texts, types)

    def of_type(type: PieceType) -> dict[str, int]:
        return {text: id for id, text in enumerate(texts) if types[id] == type and text}

    normal = {t: id for t, id in of_type(PieceType.NORMAL).items() if is_byte_level(t)}
    added = [
        AddedToken(id=id, text=text, is_special=type == PieceType.CONTROL or is_special(text))
        for type in (PieceType.CONTROL, PieceType.USER_DEFINED)
        for text, id in of_type(type).items()
    ]
    used = {*normal.values(), *(token.id for token in added)}
    if not normal.keys() & BYTE_CHARACTERS:
        raise TokenizerError("tokenizer.ggml: tokens: no byte has one: no byte-level vocabulary")
    vocabulary = byte_level_vocabulary(
        tokens={id: text for text, id in normal.items()},
        merges=(),
        added_tokens=added,
        unused={id: text for id, text in enumerate(texts) if id not in used},
        split={**SPLITS, **OTHER_SPLITS}[split],
        ignore_merges=ignore_merges,
    )
    return with_merges(vocabulary, fields.items("merges", of="text"))


def pre_tokenizer_name(fields: Fields) -> str:
    pre = fields.text("pre", "")
    if pre not in PRE_TOKENIZERS:
        came = f"is {quoted(pre)}, which is not supported" if pre else "is missing"
        raise TokenizerError(
            f"tokenizer.ggml: pre {came}; known are {', '.join(PRE_TOKENIZERS)}. Another pattern "
            "would split words wrongly: convert the model again, or set the key"
        )
    return pre


def sentencepiece_from_gguf(metadata: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer of a file whose `tokenizer.ggml.model` is "llama".

    Where keys are missing, bos and a space are put before a text, every piece is a normal one, and
    of equal scores the leftmost pair merges first.
    """
    fields = gguf_fields(metadata)
    texts = [str(text) for text in fields.items("tokens", of="text")]
    ids, notes = named_ids(fields, len(texts), DEFAULT_IDS)
    values = per_token(fields, "token_type", texts, "whole")
    types = guessed_types(texts, ids) if values is None else [int(type) for type in values]
    if PieceType.BYTE not in types:
        types = [
            PieceType.BYTE if BYTE_PIECE.fullmatch(text) else type
            for text, type in zip(texts, types, strict=True)
        ]
    scores = per_token(fields, "scores", texts, "number")
    char_map = fields.values.get("precompiled_charsmap")  # bytes, as a list of numbers or as text
    if char_map is not None and (not isinstance(char_map, Sized) or len(char_map)):
        fields.refuse("precompiled_charsmap", "none: only the identity is supported")
    add_prefix = bool(fields.boolean("add_space_prefix", True))
    tokenizer = SentencePieceTokenizer(
        Pieces(
            texts=tuple(texts),
            types=piece_types(texts, with_named_specials(texts, types)),
            scores=(0.0,) * len(texts) if scores is None else tuple(map(float, scores)),
            add_prefix=add_prefix,
            drop_prefix=add_prefix,
            added_first=True,
        ),
        bos=ids["bos_token_id"] if fields.boolean("add_bos_token", True) else None,
        stop_ids=gguf_stop_ids(texts, ids),
        backend=COMPILED,
    )
    tokenizer.notes += notes
    return tokenizer


def guessed_types(texts: Sequence[str], ids: Mapping[str, int | None]) -> list[int]:
    """The types of pieces in a file that has none: normal, except for the ends of a text."""
    ends = (ids["bos_token_id"], ids["eos_token_id"])
    return [
        PieceType.CONTROL
        if id in ends
        else PieceType.UNKNOWN
        if text == "<unk>"
        else PieceType.NORMAL
        for id, text in enumerate(texts)
    ]


def with_named_specials(texts: Sequence[str], types: Sequence[int]) -> list[int]:
    """The types, where tokens that end an answer by their name are special."""
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
    if is_whole(value) and value in (-1, NO_ID):
        return None
    return fields.whole(key, default, least=0)


def named_ids(
    fields: Fields, size: int, defaults: Mapping[str, int | None]
) -> tuple[dict[str, int | None], list[str]]:
    """The ids that the file names, and notes. An id of `size` or more becomes the default."""
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


def gguf_stop_ids(texts: Sequence[str], ids: Mapping[str, int | None]) -> set[int]:
    return stop_ids_of(texts) | {id for key in STOP_KEYS if (id := ids[key]) is not None}


def template_tokens_from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of `bos_token` and `eos_token` in a chat template, if the file names them."""
    fields = gguf_fields(metadata)
    tokens = fields.items("tokens", of="text")
    ids = {name: token_id(fields, f"{name}_id") for name in TEMPLATE_TOKENS}
    return {n: str(tokens[id]) for n, id in ids.items() if id is not None and id < len(tokens)}
