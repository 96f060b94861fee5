"""Qwen 2, Qwen 2.5 and Qwen 3 (dense).

Qwen 2 has biases of q, k and v. Qwen 3 has instead an RMSNorm of every query and key head before
RoPE. Sources: Qwen2 Technical Report (2024); Qwen3 Technical Report (2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from glassllama.base.config import WindowedConfig
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import ModelPlan, attention_plan, decoder_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(WindowedConfig):
    """The configuration of a Qwen 2 or 2.5."""

    architecture: ClassVar[str] = "qwen2"


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(WindowedConfig):
    """The configuration of a dense Qwen 3."""

    architecture: ClassVar[str] = "qwen3"


def qwen2_plan(config: Qwen2Config) -> ModelPlan:
    attention = attention_plan(config, biases=frozenset("qkv"))
    layers = range(config.n_layers)
    return decoder_plan(config, [replace(attention, window=config.window(n)) for n in layers])


def qwen3_plan(config: Qwen3Config) -> ModelPlan:
    attention = attention_plan(config, qk_norm="per_head")
    layers = range(config.n_layers)
    return decoder_plan(config, [replace(attention, window=config.window(n)) for n in layers])


HF_KEYS = HFKeys(
    n_kv_heads=32, context=32_768, neutral={"hidden_act": "silu", "attention_bias": False}
)


def windows(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Windows are used only with `use_sliding_window`, from layer `max_window_layers` on."""
    used, layers = get.boolean("use_sliding_window", False), fields["n_layers"]
    window = get.integer("sliding_window", 4096)
    first = get.integer("max_window_layers", 28, minimum=0)
    by_default = [n >= first for n in range(layers)] if used else [False] * layers
    chosen = decoder.layer_types(get, layers, by_default)
    if not used or not any(chosen):
        return {}
    return {"sliding_window": window, "window_layers": chosen}


def config_to_hf(config: WindowedConfig, model_type: str, name: str) -> dict[str, Any]:
    more: dict[str, Any] = {"use_sliding_window": False}
    if any(config.window_layers):
        more = {
            "use_sliding_window": True, "sliding_window": config.sliding_window,
            "layer_types": decoder.layer_types_to_hf(config.window_layers),
        }  # fmt: skip
    return hf_values(config, model_type, name, hidden_act="silu", **more)


def qwen2_from_hf(values: Mapping[str, Any]) -> Resolved:
    return decoder.config_from_hf(values, Qwen2Config, HF_KEYS, windows)


def qwen3_from_hf(values: Mapping[str, Any]) -> Resolved:
    return decoder.config_from_hf(values, Qwen3Config, replace(HF_KEYS, head_dim=128), windows)


def qwen2_from_gguf(file: TensorFile) -> Resolved:
    return decoder.config_from_gguf(file, "qwen2", Qwen2Config, "half")


def qwen3_from_gguf(file: TensorFile) -> Resolved:
    return decoder.config_from_gguf(file, "qwen3", Qwen3Config, "half")


QWEN2 = Architecture(
    name="qwen2",
    title="Qwen 2",
    hf_classes={"qwen2": "Qwen2ForCausalLM"},
    gguf_names=("qwen2",),
    config_from_hf=qwen2_from_hf,
    config_to_hf=lambda config: config_to_hf(config, "qwen2", "Qwen2ForCausalLM"),
    config_from_gguf=qwen2_from_gguf,
    rules=decoder.decoder_rules(qkv_bias=True),
    extras=decoder.EXTRAS,
    model="glassllama.models.qwen:Qwen2",
    layer_plan=qwen2_plan,
)
QWEN3 = Architecture(
    name="qwen3",
    title="Qwen 3",
    hf_classes={"qwen3": "Qwen3ForCausalLM"},
    gguf_names=("qwen3",),
    config_from_hf=qwen3_from_hf,
    config_to_hf=lambda config: config_to_hf(config, "qwen3", "Qwen3ForCausalLM"),
    config_from_gguf=qwen3_from_gguf,
    rules=decoder.decoder_rules(qk_norm=("D", "D")),
    extras=decoder.EXTRAS,
    model="glassllama.models.qwen:Qwen3",
    layer_plan=qwen3_plan,
)
