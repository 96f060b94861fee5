"""A checkpoint's vocabulary → a `Tokenizer`: from GGUF metadata, or from the files of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.bpe import BytePairTokenizer, Vocabulary
from glassllama.tokenizers.byte_level import byte_level_vocabulary
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
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


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
    stop_ids |= {id for key in STOP_KEYS if (id := token_id(metadata, key)) is not None}
    # llama.cpp's rule where the file is silent: Llama 3 begins with a token, others do not.
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", vocabulary.split == SPLITS["llama3"])
    bos = token_id(metadata, "bos_token_id") if adds_bos else None
    return BytePairTokenizer(vocabulary, bos=bos, stop_ids=stop_ids)


def gguf_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    texts = [str(text) for text in required(metadata, "tokens")]
    kinds = [int(kind) for kind in metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(texts))]
    if len(kinds) != len(texts):
        raise TokenizerError(f"tokenizer.ggml.token_type: {len(kinds)} for {len(texts)} tokens")
    of_kind = {
        kind: {id: texts[id] for id, k in enumerate(kinds) if k == kind} for kind in {*kinds}
    }
    if unknown := of_kind.keys() - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}:
        raise TokenizerError(
            f"tokenizer.ggml.token_type: {sorted(unknown)} have no place in a byte-level vocabulary"
        )
    controls, added = (of_kind.get(kind, {}) for kind in (CONTROL, USER_DEFINED))
    split = pre_tokenizer(metadata)
    return byte_level_vocabulary(
        size=len(texts),
        written=of_kind.get(NORMAL, {}),
        merges=[split_merge(str(merge)) for merge in required(metadata, "merges")],
        texts={id: texts[id] for id, kind in enumerate(kinds) if kind != NORMAL},
        controls={text: id for id, text in controls.items()},
        added={text: id for id, text in added.items()},
        split=SPLITS[split],
        whole_words=split == "llama3",
    )


def pre_tokenizer(metadata: Mapping[str, Any]) -> str:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        came = "is missing" if pre is None else f"is {pre!r}, which is not supported"
        raise TokenizerError(
            f"tokenizer.ggml.pre {came}; known are {', '.join(PRE_TOKENIZERS)}. Another pattern "
            "would split words wrongly: convert the model again, or set the key"
        )
    return PRE_TOKENIZERS[pre]


def required(metadata: Mapping[str, Any], name: str) -> Any:
    if (values := metadata.get(f"tokenizer.ggml.{name}")) is None:
        raise TokenizerError(f"tokenizer.ggml.{name} is missing: the file has no whole vocabulary")
    return values


def token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    id = metadata.get(f"tokenizer.ggml.{name}")
    return None if id is None else int(id)


def split_merge(written: str) -> tuple[str, str]:
    left, blank, right = written.partition(" ")
    if not (left and blank and right):
        raise TokenizerError(f"merges: {written!r} must be two tokens with a blank between")
    return left, right


def end_ids(controls: Mapping[str, int]) -> set[int]:
    return {controls[text] for text in END_OF_ANSWER if text in controls}
