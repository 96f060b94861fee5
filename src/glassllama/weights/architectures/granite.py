"""Granite 3 (dense): a Llama with multipliers of embeddings, residuals, scores and logits.

Source: Granite 3.0 Language Models (IBM, 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from glassllama.base.config import DecoderConfig, require_positive
from glassllama.base.fields import REQUIRED, Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import ModelPlan, attention_plan, decoder_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved

# Ours -> Hugging Face's, GGUF's.
MULTIPLIERS = {
    "embedding_multiplier": ("embedding_multiplier", "embedding_scale"),
    "residual_multiplier": ("residual_multiplier", "residual_scale"),
    "score_scale": ("attention_multiplier", "attention.scale"),
    "logit_divisor": ("logits_scaling", "logit_scale"),
}


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(DecoderConfig):
    """The configuration of a dense Granite 3."""

    embedding_multiplier: float
    residual_multiplier: float
    score_scale: float  # of q·k, instead of 1/√D
    logit_divisor: float
    architecture: ClassVar[str] = "granite"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, *MULTIPLIERS)


def granite_plan(config: GraniteConfig) -> ModelPlan:
    attention = attention_plan(config, scale=config.score_scale)
    return decoder_plan(
        config, [attention] * config.n_layers, residual_multiplier=config.residual_multiplier,
        embedding_multiplier=config.embedding_multiplier,
        logit_multiplier=1 / config.logit_divisor,
    )  # fmt: skip


def multipliers(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    return {ours: get.number(theirs, 1.0) for ours, (theirs, _) in MULTIPLIERS.items()}


HF_KEYS = HFKeys(neutral={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    return decoder.config_from_hf(values, GraniteConfig, HF_KEYS, multipliers)


def config_to_hf(config: GraniteConfig) -> dict[str, Any]:
    own = {theirs: getattr(config, ours) for ours, (theirs, _) in MULTIPLIERS.items()}
    return hf_values(config, "granite", "GraniteForCausalLM", hidden_act="silu", **own)


def config_from_gguf(file: TensorFile) -> Resolved:
    def keys(get: decoder.GGUFFields, fields: dict[str, Any]) -> dict[str, Any]:
        usual = {"score_scale": fields["head_dim"] ** -0.5, "logit_divisor": REQUIRED}
        return {
            ours: get.number(theirs, usual.get(ours, 1.0))
            for ours, (_, theirs) in MULTIPLIERS.items()
        }

    return decoder.config_from_gguf(file, "granite", GraniteConfig, "interleaved", keys)


GRANITE = Architecture(
    name="granite",
    title="Granite",
    hf_classes={"granite": "GraniteForCausalLM"},
    gguf_names=("granite",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    rules=decoder.decoder_rules(),
    extras=decoder.EXTRAS,
    model="glassllama.models.granite:Granite",
    layer_plan=granite_plan,
)
