"""EXAONE 4.0: norms after each part of a block, QK-norm, windows with RoPE, global layers without.

Source: EXAONE 4.0 (LG AI Research, 2025), section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from glassllama.base.config import WindowedConfig
from glassllama.base.errors import ConfigError
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import ModelPlan, attention_plan, decoder_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved

PATTERN = 4  # every fourth layer has no window, unless the file says another number
LAYERS_OF_32B = 64  # llama.cpp gives a model of so many layers windows of 4,096 tokens


@dataclass(frozen=True, kw_only=True)
class Exaone4Config(WindowedConfig):
    """The configuration of an EXAONE 4.0."""

    architecture: ClassVar[str] = "exaone4"

    def has_rope(self, layer: int) -> bool:
        """In a model with windows only the layers with one have RoPE."""
        return self.window(layer) is not None or not any(self.window_layers)


def exaone4_plan(config: Exaone4Config) -> ModelPlan:
    attention = attention_plan(config, qk_norm="per_head")
    layers = [
        replace(attention, window=config.window(n), rope=attention.rope if has_rope else None)
        for n, has_rope in enumerate(map(config.has_rope, range(config.n_layers)))
    ]
    return decoder_plan(config, layers, norms=("post_attention", "post_ffn"))


def by_pattern(layers: int, pattern: int) -> tuple[bool, ...]:
    """Which layers have a window: all but every layer number `pattern`."""
    return tuple((n + 1) % pattern != 0 for n in range(layers))


# --- config.json ----------------------------------------------------------------------------

HF_KEYS = HFKeys(n_kv_heads=32, norm_eps=1e-5, neutral={"hidden_act": "silu"})


def hf_keys(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """`sliding_window` null means no windows; a missing one has transformers' default."""
    layers, has_none = fields["n_layers"], get.values.get("sliding_window", 0) is None
    by_default: Sequence[bool] = [False] * layers
    if not has_none and get.values.get("layer_types") is None:
        by_default = by_pattern(layers, get.integer("sliding_window_pattern", PATTERN))
    chosen = decoder.layer_types(get, layers, by_default)
    if any(chosen) == has_none:
        raise ConfigError(
            "config.json: layer_types and sliding_window contradict each other: sliding_window "
            "must be null if no layer has a window, and a number of tokens if one has"
        )
    window = None if has_none else get.integer("sliding_window", 4096)
    return {"sliding_window": window, "window_layers": chosen}


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    unused = ("sliding_window_pattern",)  # beside layer_types
    return decoder.config_from_hf(values, Exaone4Config, HF_KEYS, hf_keys, unused)


def config_to_hf(config: Exaone4Config) -> dict[str, Any]:
    return hf_values(
        config, "exaone4", "Exaone4ForCausalLM", hidden_act="silu",
        sliding_window=config.sliding_window,
        layer_types=decoder.layer_types_to_hf(config.window_layers),
    )  # fmt: skip


# --- GGUF -----------------------------------------------------------------------------------


def gguf_keys(get: decoder.GGUFFields, fields: dict[str, Any]) -> dict[str, Any]:
    """A file without the length of the windows has them if it is the model of 64 layers."""
    layers, usual = fields["n_layers"], 4096 if fields["n_layers"] == LAYERS_OF_32B else 0
    window = get.integer("attention.sliding_window", usual, minimum=0)
    chosen = by_pattern(layers, PATTERN) if window else (False,) * layers
    return {"sliding_window": window or None, "window_layers": chosen}


def config_from_gguf(file: TensorFile) -> Resolved:
    return decoder.config_from_gguf(file, "exaone4", Exaone4Config, "half", gguf_keys)


EXAONE4 = Architecture(
    name="exaone4",
    title="EXAONE 4.0",
    hf_classes={"exaone4": "Exaone4ForCausalLM"},
    gguf_names=("exaone4",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    rules=decoder.decoder_rules(norms=decoder.POST_NORMS, qk_norm=("D", "D")),
    extras=decoder.EXTRAS,
    model="glassllama.models.exaone4:Exaone4",
    layer_plan=exaone4_plan,
)
