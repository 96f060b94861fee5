"""The bigram's folder: our own form, because nobody else has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glassllama.base.fields import Fields
from glassllama.weights.configs import BIGRAM, Resolved, unused_keys
from glassllama.weights.rows import Opened, RemappedFile, Row

if TYPE_CHECKING:
    from glassllama.base.interfaces import TensorFile
    from glassllama.models.bigram import BigramConfig

USED = frozenset(("vocab_size", "max_position_embeddings"))


def config_from_bigram(values: Mapping[str, Any]) -> Resolved:
    """config.json of a bigram. Raises ConfigError naming the field; needs PyTorch."""
    from glassllama.models.bigram import BigramConfig

    get = Fields("config.json", values)
    config = BigramConfig(
        vocab_size=get.whole("vocab_size"), max_seq_len=get.whole("max_position_embeddings")
    )
    return Resolved(config, unused_keys(values, USED))


def config_to_bigram(config: BigramConfig) -> dict[str, Any]:
    return {
        "architectures": [BIGRAM],
        "model_type": "glass_bigram",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
    }


def bigram_rows(config: BigramConfig) -> list[Row]:
    """One table; row i holds the logits of what follows token i."""
    shape = (config.vocab_size, config.vocab_size)
    return [Row("tok_embeddings.weight", "tok_embeddings.weight", shape)]


def open_bigram(file: TensorFile, config: BigramConfig) -> Opened:
    return Opened(RemappedFile(file, bigram_rows(config)), config, [])
