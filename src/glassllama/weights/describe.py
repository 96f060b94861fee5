"""Facts about a checkpoint for `glassllama show`: sizes, number formats, tokenizer, memory needed.

Only metadata is read, no tensor.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from glassllama.base.config import kv_bytes
from glassllama.base.errors import GlassError, TokenizerError
from glassllama.base.interfaces import CACHE_NUMBER, CACHE_SCALE
from glassllama.base.machine import available_memory
from glassllama.tokenizers.chat import choose_chat_format
from glassllama.weights.checkpoint import Checkpoint

FIRST_CONTEXT, CONTEXT_FACTOR = 2048, 4  # rows of the memory table: 2,048, 8,192, … the longest
CHAT_FORMATS = {
    "TemplateChat": "the model's own template",
    "ChatML": "ChatML",
    "Llama3Chat": "Llama 3",
}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """All facts, as `show --json` prints them. Sizes in bytes."""
    infos = [checkpoint.info(name) for name in checkpoint.names]
    return {
        "path": str(checkpoint.path),
        "family": checkpoint.file_format,
        "parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "architecture": checkpoint.architecture.title,
        "config": config_facts(checkpoint),
        "stored_as": stored_formats(checkpoint),
        "tokenizer": tokenizer_facts(checkpoint),
        "memory": memory_needed(checkpoint),
        "memory_free": available_memory(),
        "notes": checkpoint.notes,
    }


def config_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of the configuration; `rope_scaling` with the name of its rule."""
    facts = asdict(checkpoint.config)
    if facts.get("rope_scaling") is not None:
        rule = type(checkpoint.config.rope_scaling).__name__
        facts["rope_scaling"] = {"rule": rule, **facts["rope_scaling"]}
    return facts


def stored_formats(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """For every number format of the file: its tensors, numbers and bytes; the largest first."""
    formats: dict[str, dict[str, Any]] = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        row = formats.setdefault(
            info.dtype, {"type": info.dtype, "tensors": 0, "numbers": 0, "bytes": 0}
        )
        row["tensors"] += 1
        row["numbers"] += math.prod(info.shape)
        row["bytes"] += info.nbytes
    return sorted(formats.values(), key=lambda row: -int(row["bytes"]))


def tokenizer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Vocabulary, special ids and chat format; {"error": …} if there is no tokenizer."""
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


def memory_needed(checkpoint: Checkpoint) -> list[dict[str, int]]:
    """Bytes that the engine takes for one conversation, for several lengths up to the longest.

    Empty for models that the engine does not run.
    """
    from glassllama.weights.quantization import packing_plan

    if checkpoint.architecture.layer_plan is None:
        return []
    config = checkpoint.config
    weights = packing_plan(checkpoint, exact=False, quantize="none").nbytes
    per_token = kv_bytes(config, CACHE_NUMBER["int16"], CACHE_SCALE)
    contexts = [min(FIRST_CONTEXT, config.max_seq_len)]
    while contexts[-1] < config.max_seq_len:
        contexts.append(min(contexts[-1] * CONTEXT_FACTOR, config.max_seq_len))
    return [{"context": n, "weights": weights, "cache": n * per_token} for n in contexts]
