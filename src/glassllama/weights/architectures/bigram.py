"""The bigram, in a format of our own: no other program has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glassllama.base.fields import Fields
from glassllama.weights.architectures.description import (
    Architecture,
    ReadKeys,
    Resolved,
    TensorRule,
    unused_note,
)

if TYPE_CHECKING:
    from glassllama.models.bigram import BigramConfig

MODEL_TYPE, MODEL_CLASS = "glass_bigram", "GlassBigramForCausalLM"


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    """config.json of a bigram. Raises ConfigError naming the field; needs PyTorch."""
    from glassllama.models.bigram import BigramConfig

    get = Fields("config.json", values := ReadKeys(values))
    config = BigramConfig(
        vocab_size=get.integer("vocab_size"), max_seq_len=get.integer("max_position_embeddings")
    )
    return Resolved(config, unused_note(values.unused()))


def config_to_hf(config: BigramConfig) -> dict[str, Any]:
    return {
        "architectures": [MODEL_CLASS],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
    }


BIGRAM = Architecture(
    name="bigram",
    title="bigram",
    hf_classes={MODEL_TYPE: MODEL_CLASS},
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    # One table: row i holds the logits of the token after token i.
    rules=(TensorRule(ours="tok_embeddings.weight", shape=("V", "V"), hf="tok_embeddings.weight"),),
    extras={},
    model="glassllama.models.bigram:Bigram",
    layer_plan=None,
)
