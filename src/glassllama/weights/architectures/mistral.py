"""Mistral and Mistral Nemo: a Llama with a sliding window, or with a head width of its own.

Source: Mistral 7B (Jiang et al., 2023). GGUF files of Mistrals have the architecture `llama`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from glassllama.base.config import WindowedConfig
from glassllama.base.fields import Fields
from glassllama.base.layer_plan import ModelPlan, attention_plan, decoder_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved


@dataclass(frozen=True, kw_only=True)
class MistralConfig(WindowedConfig):
    """The configuration of a Mistral."""

    architecture: ClassVar[str] = "mistral"


def mistral_plan(config: MistralConfig) -> ModelPlan:
    attention, layers = attention_plan(config), range(config.n_layers)
    return decoder_plan(config, [replace(attention, window=config.window(n)) for n in layers])


def windows(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Every layer has the window, unless `layer_types` says which; keys of Qwen have no effect."""
    missing = "sliding_window" not in get.values
    window = get.integer("sliding_window", 4096 if missing else None)
    chosen = decoder.layer_types(get, fields["n_layers"], (True,) * fields["n_layers"])
    if window is None or not any(chosen):
        return {}
    return {"sliding_window": window, "window_layers": chosen}


HF_KEYS = HFKeys(
    n_kv_heads=8, context=131_072,
    neutral={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)  # fmt: skip


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    return decoder.config_from_hf(values, MistralConfig, HF_KEYS, windows)


def config_to_hf(config: MistralConfig) -> dict[str, Any]:
    window, more = config.sliding_window, dict[str, Any]()
    if not all(config.window_layers):
        more["layer_types"] = decoder.layer_types_to_hf(config.window_layers)
    return hf_values(
        config, "mistral", "MistralForCausalLM", hidden_act="silu",
        sliding_window=window if any(config.window_layers) else None, **more,
    )  # fmt: skip


MISTRAL = Architecture(
    name="mistral",
    title="Mistral",
    hf_classes={"mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM"},
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    rules=decoder.decoder_rules(),
    extras=decoder.EXTRAS,
    model="glassllama.models.mistral:Mistral",
    layer_plan=mistral_plan,
)
