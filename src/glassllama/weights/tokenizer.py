"""A checkpoint's vocabulary → a `Tokenizer`: from GGUF metadata, or from the files of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.bpe import BytePairTokenizer, Vocabulary
from glassllama.tokenizers.byte_level import byte_level_vocabulary
from glassllama.tokenizers.char_json import chars_from_document, is_char_document
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.tokenizers.ends import END_OF_ANSWER, end_ids
from glassllama.tokenizers.hf_json import first_token, read_json, vocabulary_from_json
from glassllama.tokenizers.meta import looks_like_ranks, read_meta_tokenizer
from glassllama.tokenizers.sentencepiece import (
    SentencePieceTokenizer,
    read_sentencepiece,
    sentencepiece_from_gguf,
    sentencepiece_from_hf_json,
)
from glassllama.tokenizers.split import SPLITS

Found = BytePairTokenizer | SentencePieceTokenizer | CharTokenizer

# `tokenizer.ggml.pre` → name of a split. Converters wrote several names for the same pattern.
PRE_TOKENIZERS = {
    "llama-bpe": "llama3", "llama3": "llama3", "llama-v3": "llama3",
    "smollm": "smollm",
    "gpt-2": "gpt2",
    "qwen2": "qwen2", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

# A tokenizer beside weights: the vocabulary in one of two forms, and what goes with it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    "chat_template.jinja",
)

# `tokenizer.ggml.token_type` (GGUF specification, "tokenizer").
KINDS = NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. TokenizerError: names the key that is missing or unknown."""
    model = metadata.get("tokenizer.ggml.model")
    if model == "llama":
        return sentencepiece_from_gguf(metadata)
    if model != "gpt2":
        raise TokenizerError(
            f"tokenizer.ggml.model: {model!r} is not supported, only 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece) are"
        )
    vocabulary = gguf_vocabulary(metadata)
    texts = map(str, gguf_list(metadata, "tokens"))
    stop_ids = end_ids({text: id for id, text in enumerate(texts) if text in END_OF_ANSWER})
    stop_ids |= {id for key in STOP_KEYS if (id := gguf_id(metadata, key)) is not None}
    bos = gguf_id(metadata, "bos_token_id")
    # llama.cpp's rule where the file is silent: Llama 3 begins with a token, others do not.
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", vocabulary.split == SPLITS["llama3"])
    return BytePairTokenizer(vocabulary, bos=bos if adds_bos else None, stop_ids=stop_ids)


def gguf_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    split = gguf_split(metadata)
    texts = [*map(str, gguf_list(metadata, "tokens"))]
    kinds = token_kinds(metadata, len(texts))
    return byte_level_vocabulary(
        written=of_kind(NORMAL, texts, kinds),
        merges=gguf_list(metadata, "merges"),
        controls=by_text(of_kind(CONTROL, texts, kinds)),
        added=by_text(of_kind(USER_DEFINED, texts, kinds)),
        unused=of_kind(UNUSED, texts, kinds) | of_kind(UNKNOWN, texts, kinds),
        split=SPLITS[split],
        whole_words=split == "llama3",
    )


def token_kinds(metadata: Mapping[str, Any], count: int) -> list[int]:
    """The type of every token; files without types hold normal ones only."""
    if "tokenizer.ggml.token_type" not in metadata:
        return [NORMAL] * count
    kinds = list(gguf_list(metadata, "token_type"))
    if len(kinds) != count:
        raise TokenizerError(f"tokenizer.ggml.token_type: {len(kinds)} for {count} tokens")
    if strange := [kind for kind in kinds if kind not in KINDS]:
        raise TokenizerError(
            f"tokenizer.ggml.token_type: {strange[0]!r} has no place in a byte-level vocabulary"
        )
    return kinds


def of_kind(wanted: int, texts: list[str], kinds: list[int]) -> dict[int, str]:
    return {id: texts[id] for id, kind in enumerate(kinds) if kind == wanted}


def by_text(texts: Mapping[int, str]) -> dict[str, int]:
    ids = {text: id for id, text in texts.items()}
    if len(ids) < len(texts):
        twice = next(text for id, text in texts.items() if ids[text] != id)
        raise TokenizerError(f"tokenizer.ggml.tokens: {twice!r} is given twice")
    return ids


def gguf_split(metadata: Mapping[str, Any]) -> str:
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        came = "is missing" if pre is None else f"is {pre!r}, which is not supported"
        raise TokenizerError(
            f"tokenizer.ggml.pre {came}; known are {', '.join(PRE_TOKENIZERS)}. Another pattern "
            "would split words wrongly: convert the model again, or set the key"
        )
    return PRE_TOKENIZERS[pre]


def gguf_list(metadata: Mapping[str, Any], name: str) -> Iterable[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if isinstance(values, np.ndarray):
        return list(values.tolist())
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return values
    came = "is missing" if values is None else f"must be a list, got {values!r}"
    raise TokenizerError(f"tokenizer.ggml.{name} {came}: the file has no whole vocabulary")


def gguf_id(metadata: Mapping[str, Any], name: str) -> int | None:
    id = metadata.get(f"tokenizer.ggml.{name}")
    if id is not None and not isinstance(id, int | np.integer):
        raise TokenizerError(f"tokenizer.ggml.{name} must be an id, got {id!r}")
    return None if id is None else int(id)


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer beside a checkpoint: tokenizer.json, else tokenizer.model, here or above.

    Meta's download keeps one tokenizer.model for several folders of weights, hence "above".
    TokenizerError: nothing found (says where it looked), or a file that is not understood.
    """
    wanted = [folder / "tokenizer.json"]
    wanted += [place / "tokenizer.model" for place in (folder, folder.absolute().parent)]
    found = next((path for path in wanted if path.is_file()), None)
    if found is None:
        raise TokenizerError(
            f"{folder}: no tokenizer; looked for {', '.join(map(str, wanted))}. Copy the file from "
            "where the weights came from"
        )
    return configured(read_tokenizer(found), folder)


def read_tokenizer(path: Path) -> Found:
    """One file's tokenizer; what a tokenizer.model is, its content tells."""
    if path.name == "tokenizer.model":
        return read_meta_tokenizer(path) if looks_like_ranks(path) else read_sentencepiece(path)
    document = read_json(path)
    model = document.get("model")
    try:
        if isinstance(model, dict) and model.get("byte_fallback"):
            return sentencepiece_from_hf_json(document)
        if is_char_document(document):
            return chars_from_document(document)
        vocabulary = vocabulary_from_json(document)
        ordinary = document["model"]["vocab"]
        stop_ids = end_ids({**ordinary, **vocabulary.added, **vocabulary.controls})
        return BytePairTokenizer(vocabulary, bos=first_token(document), stop_ids=stop_ids)
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from fault


def configured(tokenizer: Found, folder: Path) -> Found:
    """The tokenizer with begin and stop ids as the files beside the weights have them."""
    path = folder / "tokenizer_config.json"
    settings = optional_json(path)
    if (adds_bos := settings.get("add_bos_token")) is not None:
        tokenizer.bos = named_id(tokenizer, path, "bos_token") if adds_bos else None
    eos = named_id(tokenizer, path, "eos_token")
    tokenizer.stop_ids |= generation_stops(tokenizer, folder) | (set() if eos is None else {eos})
    return tokenizer


def named_id(tokenizer: Found, path: Path, field: str) -> int | None:
    """The id of a token that tokenizer_config.json names: by its text, or an object's `content`."""
    token = optional_json(path).get(field)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    ids = tokenizer.encode(text, specials=True) if isinstance(text, str) else []
    if len(ids) != 1:
        raise TokenizerError(f"{path}: {field} is {text!r}, which is no token of the vocabulary")
    return ids[0]


def generation_stops(tokenizer: Found, folder: Path) -> set[int]:
    """`eos_token_id` of generation_config.json, or of config.json where there is none."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        named = optional_json(path).get("eos_token_id")
        if named is None:
            continue
        ids = named if isinstance(named, list) else [named]
        if not all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in ids):
            raise TokenizerError(
                f"{path}: eos_token_id is {named!r}; expected ids from 0 to "
                f"{tokenizer.vocab_size - 1}, the vocabulary's last"
            )
        return {*ids}
    return set()


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def chat_template_from_folder(folder: Path) -> str | None:
    """The jinja text of a folder: chat_template.jinja, else tokenizer_config.json's field.

    Of several named templates the one named "default" is taken.
    """
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as fault:
            raise TokenizerError(f"{path}: is no UTF-8 text ({fault})") from fault
    path = folder / "tokenizer_config.json"
    template = optional_json(path).get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default", template)
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"{path}: chat_template must be text or hold one named 'default', got "
            f"{str(template)[:80]!r}"
        )
    return template


TEMPLATE_TOKENS = ("bos_token", "eos_token")  # what templates call the ends of a text


def template_tokens_from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts behind `bos_token` and `eos_token` in a template, where the file names them."""
    tokens = gguf_list(metadata, "tokens")
    assert isinstance(tokens, Sequence)
    ids = {name: gguf_id(metadata, f"{name}_id") for name in TEMPLATE_TOKENS}
    return {n: str(tokens[id]) for n, id in ids.items() if id is not None and id < len(tokens)}


def template_tokens_from_folder(folder: Path) -> dict[str, str]:
    """The same from tokenizer_config.json."""
    settings = optional_json(folder / "tokenizer_config.json")
    named = {name: settings.get(name) for name in TEMPLATE_TOKENS}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
