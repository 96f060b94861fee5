"""OLMo 2: norms after attention and feed-forward network only, and a norm of q and of k as a whole.

Source: 2 OLMo 2 Furious (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from glassllama.base.config import DecoderConfig
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import ModelPlan, attention_plan, decoder_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    """The configuration of an OLMo 2."""

    architecture: ClassVar[str] = "olmo2"


def olmo2_plan(config: Olmo2Config) -> ModelPlan:
    attention = attention_plan(config, qk_norm="full_width")
    return decoder_plan(config, [attention] * config.n_layers, norms=("post_attention", "post_ffn"))


HF_KEYS = HFKeys(norm_eps=1e-5, neutral={"hidden_act": "silu", "attention_bias": False})


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    return decoder.config_from_hf(values, Olmo2Config, HF_KEYS)


def config_to_hf(config: Olmo2Config) -> dict[str, Any]:
    return hf_values(config, "olmo2", "Olmo2ForCausalLM", hidden_act="silu")


def config_from_gguf(file: TensorFile) -> Resolved:
    neutral = {"attention.sliding_window": 0}  # OLMo 3
    return decoder.config_from_gguf(file, "olmo2", Olmo2Config, "half", neutral=neutral)


OLMO2 = Architecture(
    name="olmo2",
    title="OLMo 2",
    hf_classes={"olmo2": "Olmo2ForCausalLM"},
    gguf_names=("olmo2",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    rules=decoder.decoder_rules(norms=decoder.POST_NORMS, qk_norm=("H*D", "K*D")),
    extras=decoder.EXTRAS,
    model="glassllama.models.olmo2:Olmo2",
    layer_plan=olmo2_plan,
)
