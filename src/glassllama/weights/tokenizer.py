"""A checkpoint's vocabulary → a `Tokenizer`: from GGUF metadata, or from the files of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.bpe import BytePairTokenizer, Vocabulary
from glassllama.tokenizers.byte_level import byte_level_vocabulary, to_bytes
from glassllama.tokenizers.hf_json import first_token, read_json, vocabulary_from_json
from glassllama.tokenizers.meta import looks_like_ranks, read_meta_tokenizer
from glassllama.tokenizers.split import SPLITS

# `tokenizer.ggml.pre` → name of a split. Converters wrote several names for the same pattern.
PRE_TOKENIZERS = {
    "llama-bpe": "llama3", "llama3": "llama3", "llama-v3": "llama3",
    "smollm": "smollm",
    "gpt-2": "gpt2",
    "qwen2": "qwen2", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip
# Control tokens that end an answer in the Llama family, besides those a file names by number.
END_OF_ANSWER = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>")
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

# `tokenizer.ggml.token_type` (GGUF specification, "tokenizer").
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. TokenizerError: names the key that is missing or unknown."""
    model = metadata.get("tokenizer.ggml.model")
    if model == "llama":
        from glassllama.tokenizers.sentencepiece import sentencepiece_from_gguf

        return sentencepiece_from_gguf(metadata)
    if model != "gpt2":
        raise TokenizerError(
            f"tokenizer.ggml.model: {model!r} is not supported, only 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece) are"
        )
    vocabulary = gguf_vocabulary(metadata)
    stop_ids = end_ids(vocabulary.controls)
    stop_ids |= {id for key in STOP_KEYS if (id := gguf_id(metadata, key)) is not None}
    # llama.cpp's rule where the file is silent: Llama 3 begins with a token, others do not.
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", vocabulary.split == SPLITS["llama3"])
    bos = gguf_id(metadata, "bos_token_id") if adds_bos else None
    return BytePairTokenizer(vocabulary, bos=bos, stop_ids=stop_ids)


def gguf_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    split = gguf_split(metadata)
    texts = [str(text) for text in gguf_list(metadata, "tokens")]
    kinds = [int(kind) for kind in metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(texts))]
    if len(kinds) != len(texts):
        raise TokenizerError(f"tokenizer.ggml.token_type: {len(kinds)} for {len(texts)} tokens")
    if unknown := {*kinds} - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}:
        raise TokenizerError(
            f"tokenizer.ggml.token_type: {sorted(unknown)} have no place in a byte-level vocabulary"
        )
    return byte_level_vocabulary(
        written={id: texts[id] for id, kind in enumerate(kinds) if kind == NORMAL},
        merges=gguf_list(metadata, "merges"),
        controls=of_kind(CONTROL, texts, kinds),
        added=of_kind(USER_DEFINED, texts, kinds),
        unused=of_kind(UNUSED, texts, kinds) | of_kind(UNKNOWN, texts, kinds),
        split=SPLITS[split],
        whole_words=split == "llama3",
    )


def of_kind(wanted: int, texts: list[str], kinds: list[int]) -> dict[str, int]:
    return {texts[id]: id for id, kind in enumerate(kinds) if kind == wanted}


def gguf_split(metadata: Mapping[str, Any]) -> str:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        came = "is missing" if pre is None else f"is {pre!r}, which is not supported"
        raise TokenizerError(
            f"tokenizer.ggml.pre {came}; known are {', '.join(PRE_TOKENIZERS)}. Another pattern "
            "would split words wrongly: convert the model again, or set the key"
        )
    return PRE_TOKENIZERS[pre]


def gguf_list(metadata: Mapping[str, Any], name: str) -> Any:
    if (values := metadata.get(f"tokenizer.ggml.{name}")) is None:
        raise TokenizerError(f"tokenizer.ggml.{name} is missing: the file has no whole vocabulary")
    return values


def gguf_id(metadata: Mapping[str, Any], name: str) -> int | None:
    id = metadata.get(f"tokenizer.ggml.{name}")
    return None if id is None else int(id)


def end_ids(controls: Mapping[str, int]) -> set[int]:
    return {controls[text] for text in END_OF_ANSWER if text in controls}


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
    if found.name == "tokenizer.json":
        return from_hf_files(found)
    if looks_like_ranks(found):
        return read_meta_tokenizer(found)
    from glassllama.tokenizers.sentencepiece import read_sentencepiece

    return read_sentencepiece(found)


def from_hf_files(path: Path) -> Tokenizer:
    """tokenizer.json, with begin and stop tokens from the files beside it."""
    document = read_json(path)
    model = document.get("model")
    if isinstance(model, dict) and model.get("byte_fallback"):
        from glassllama.tokenizers.sentencepiece import sentencepiece_from_hf_json

        return sentencepiece_from_hf_json(document)
    try:
        vocabulary = vocabulary_from_json(document)
        bos = first_token(document)
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from fault
    beside = path.with_name("tokenizer_config.json")
    settings = optional_json(beside)
    try:
        if (adds_bos := settings.get("add_bos_token")) is not None:
            bos = named_id(vocabulary, settings, "bos_token") if adds_bos else None
        eos = named_id(vocabulary, settings, "eos_token")
    except TokenizerError as fault:
        raise TokenizerError(f"{beside}: {fault}") from fault
    stop_ids = end_ids(vocabulary.controls) | generation_stops(path.parent)
    stop_ids |= set() if eos is None else {eos}
    return BytePairTokenizer(vocabulary, bos=bos, stop_ids=stop_ids)


def named_id(vocabulary: Vocabulary, settings: Mapping[str, Any], field: str) -> int | None:
    """The id of a token that tokenizer_config.json names: by its text, or an object's `content`."""
    token = settings.get(field)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    texts = {**vocabulary.added, **vocabulary.controls}
    id = texts.get(text, vocabulary.ids.get(to_bytes(text))) if isinstance(text, str) else None
    if id is None:
        raise TokenizerError(f"{field} is {text!r}, which is not in the vocabulary")
    return id


def generation_stops(folder: Path) -> set[int]:
    """`eos_token_id` of generation_config.json, or of config.json where there is none."""
    for name in ("generation_config.json", "config.json"):
        match optional_json(folder / name).get("eos_token_id"):
            case int(id):
                return {id}
            case [*ids] if all(type(id) is int for id in ids):
                return {*ids}
            case None:
                continue
            case other:
                raise TokenizerError(f"{folder / name}: eos_token_id must be ids, got {other!r}")
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
