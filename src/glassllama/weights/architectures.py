"""The models besides Llama: only the reference in PyTorch has them, and Hugging Face's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from glassllama.base.errors import MissingExtraError
from glassllama.base.interfaces import TensorFile
from glassllama.weights.bigram import bigram_rows, config_from_bigram, config_to_bigram, open_bigram
from glassllama.weights.configs import BIGRAM, GPT2, Resolved
from glassllama.weights.gpt2 import config_from_gpt2, config_to_gpt2, gpt2_rows, open_gpt2
from glassllama.weights.rows import Opened, Row


class TorchOnly(NamedTuple):
    """How to read and write one of these architectures; `Any` is its own configuration."""

    title: str
    config_type: str
    config_from_hf: Callable[[Mapping[str, Any]], Resolved]
    config_to_hf: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], list[Row]]
    open: Callable[[TensorFile, Any], Opened]


TORCH_ONLY = {
    GPT2: TorchOnly(
        "GPT", "GPTConfig", config_from_gpt2, config_to_gpt2, gpt2_rows, open_gpt2
    ),
    BIGRAM: TorchOnly(
        "bigram", "BigramConfig", config_from_bigram, config_to_bigram, bigram_rows, open_bigram
    ),
}  # fmt: skip


def architecture_of(config: object) -> TorchOnly:
    """The architecture that a configuration belongs to."""
    name = type(config).__name__
    return next(one for one in TORCH_ONLY.values() if one.config_type == name)


def resolve_torch_only(architecture: str, values: Mapping[str, Any]) -> Resolved:
    """Its configuration from config.json. Raises ConfigError, MissingExtraError."""
    one = TORCH_ONLY[architecture]
    try:
        return one.config_from_hf(values)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError(f"a {one.title} runs on PyTorch, which", "torch") from None
