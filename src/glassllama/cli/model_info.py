"""What `show` says about a checkpoint, as plain values; no tensor is read."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glassllama.base.errors import GlassError, TokenizerError

if TYPE_CHECKING:
    from glassllama.base.config import LlamaConfig
    from glassllama.weights.open import Checkpoint

FIRST_CONTEXT, CONTEXT_STEP = 2048, 4  # rows of the memory table: 2,048 8,192 … the longest
CHAT_FORMATS = {
    "TemplateChat": "the model's own template",
    "ChatML": "ChatML",
    "Llama3Chat": "Llama 3",
}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that is shown: the object of `show --json`."""
    from glassllama.base.machine import available_memory

    infos = [checkpoint.info(name) for name in checkpoint.names]
    return {
        "path": str(checkpoint.path),
        "family": checkpoint.file_format,
        "parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "architecture": checkpoint.architecture,
        "config": config_facts(checkpoint),
        "stored_as": stored_as(checkpoint),
        "tokenizer": tokenizer_facts(checkpoint),
        "memory": memory_needs(checkpoint),
        "memory_free": available_memory(),
        "notes": checkpoint.notes,
    }


def config_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    facts = asdict(checkpoint.model_config)
    return facts if checkpoint.torch_only else facts | {"rope_scaling": scaling(checkpoint.config)}


def scaling(config: LlamaConfig) -> dict[str, Any] | None:
    """How the rotations are slowed for long contexts, with the name of the rule."""
    rule = config.rope_scaling
    return None if rule is None else {"rule": type(rule).__name__} | asdict(rule)


def stored_as(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The quantisation mix: for every stored type its tensors, numbers, bytes; largest first."""
    mix: dict[str, dict[str, Any]] = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        kind = mix.setdefault(
            info.dtype, {"type": info.dtype, "tensors": 0, "numbers": 0, "bytes": 0}
        )
        kind["tensors"] += 1
        kind["numbers"] += math.prod(info.shape)
        kind["bytes"] += info.nbytes
    return sorted(mix.values(), key=lambda kind: -int(kind["bytes"]))


def tokenizer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Vocabulary, special ids and chat format; or the reason why there is no tokenizer."""
    from glassllama.tokenizers.chat import choose_chat_format

    try:
        tokenizer = checkpoint.tokenizer
    except GlassError as error:
        return {"error": str(error)}
    try:
        chat = type(choose_chat_format(checkpoint.chat_template, tokenizer)).__name__
    except TokenizerError:
        chat = None  # a base model
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos,
        "stop_ids": sorted(tokenizer.stop_ids),
        "control_tokens": len(tokenizer.specials),
        "chat_format": chat and CHAT_FORMATS[chat],
    }


def memory_needs(checkpoint: Checkpoint) -> list[dict[str, int]]:
    """Bytes that the engine takes for one conversation of various lengths, up to the longest.

    Nothing for models that the engine does not run.
    """
    from glassllama.base.config import kv_bytes
    from glassllama.base.interfaces import CACHE_NUMBER, CACHE_SCALE

    if checkpoint.torch_only:
        return []
    c = checkpoint.config
    per_token = kv_bytes(c, CACHE_NUMBER["int16"], CACHE_SCALE)
    weights = sum(packed_weights(checkpoint).values())
    contexts = [min(FIRST_CONTEXT, c.max_seq_len)]
    while contexts[-1] < c.max_seq_len:
        contexts.append(min(contexts[-1] * CONTEXT_STEP, c.max_seq_len))
    return [{"context": n, "weights": weights, "cache": n * per_token} for n in contexts]


def packed_weights(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each matrix as the engine keeps it, by our names."""
    from glassllama.native.engine.layout import packed_bytes
    from glassllama.weights.quantization import matrix_names, packed_type

    return {
        name: packed_bytes(packed_type(checkpoint, name), *checkpoint.info(name).shape)
        for name in matrix_names(checkpoint.config)
    }
