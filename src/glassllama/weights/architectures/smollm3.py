"""SmolLM3: a Llama without positional encoding in every fourth layer.

Source: SmolLM3 (Hugging Face, 2025); RoPE to NoPE and Back Again (Yang et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from glassllama.base.config import DecoderConfig
from glassllama.base.errors import ConfigError
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import ModelPlan, attention_plan, decoder_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import FULL, HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved

INTERVAL = 4  # every fourth layer has no RoPE


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(DecoderConfig):
    """The configuration of a SmolLM3. `rope_layers` says which layers have RoPE."""

    rope_layers: tuple[bool, ...]
    architecture: ClassVar[str] = "smollm3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rope_layers) != self.n_layers:
            raise ConfigError(
                f"rope_layers: {len(self.rope_layers)} entries for {self.n_layers} layers"
            )


def smollm3_plan(config: SmolLM3Config) -> ModelPlan:
    attention = attention_plan(config)
    layers = [attention if has_rope else replace(attention, rope=None)
              for has_rope in config.rope_layers]  # fmt: skip
    return decoder_plan(config, layers)


def rope_layers(layers: int, interval: int) -> tuple[bool, ...]:
    return tuple((n + 1) % interval != 0 for n in range(layers))


def keys(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """`no_rope_layers` has 1 for a layer with RoPE and 0 for one without."""
    get.boolean("use_sliding_window", False)
    if any(decoder.layer_types(get, fields["n_layers"], ())):
        get.refuse("layer_types", f"{FULL} everywhere: windows are not supported in a SmolLM3")
    given = get.items("no_rope_layers", None, of="integer")
    by_default = rope_layers(fields["n_layers"], get.integer("no_rope_layer_interval", INTERVAL))
    return {"rope_layers": by_default if given is None else tuple(map(bool, given))}


HF_KEYS = HFKeys(
    n_kv_heads=4, context=32_768, rope_theta=2e6, tied=True,
    neutral={
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "use_sliding_window": False,
    },
)  # fmt: skip


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    unused = ("sliding_window", "max_window_layers")
    return decoder.config_from_hf(values, SmolLM3Config, HF_KEYS, keys, unused)


def config_to_hf(config: SmolLM3Config) -> dict[str, Any]:
    has_rope = [int(has) for has in config.rope_layers]
    name = "SmolLM3ForCausalLM"
    return hf_values(
        config, "smollm3", name, hidden_act="silu", no_rope_layers=has_rope, pad_token_id=None
    )


def config_from_gguf(file: TensorFile) -> Resolved:
    def layers(_get: decoder.GGUFFields, fields: dict[str, Any]) -> dict[str, Any]:
        return {"rope_layers": rope_layers(fields["n_layers"], INTERVAL)}

    return decoder.config_from_gguf(file, "smollm3", SmolLM3Config, "interleaved", layers)


SMOLLM3 = Architecture(
    name="smollm3",
    title="SmolLM3",
    hf_classes={"smollm3": "SmolLM3ForCausalLM"},
    gguf_names=("smollm3",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    rules=decoder.decoder_rules(),
    extras=decoder.EXTRAS,
    model="glassllama.models.smollm3:SmolLM3",
    layer_plan=smollm3_plan,
)
