"""Mistral, Mistral Nemo, Ministral 3: a Llama with a window, or with a head width of its own.

Source: Mistral 7B (Jiang et al., 2023). GGUF files of Mistrals have the architecture `llama`, those
of Mistral Small 3.1 and Ministral 3 `mistral3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from glassllama.base.config import WindowedConfig
from glassllama.base.errors import ConfigError, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import ModelPlan, attention_plan, decoder_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved, hf_class
from glassllama.weights.architectures.rope import ORIGINAL

HF_CLASSES = {
    "mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
}  # fmt: skip
BETA = "llama_4_scaling_beta"  # temperature_scale in Hugging Face's files


@dataclass(frozen=True, kw_only=True)
class MistralConfig(WindowedConfig):
    """The configuration of a Mistral.

    `temperature_scale` s of Ministral 3: queries at position p are multiplied by
    1 + s·ln(1 + ⌊p / N⌋), where N is the original context of YaRN.
    """

    temperature_scale: float = 0.0
    architecture: ClassVar[str] = "mistral"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature_scale and not self.original_max_seq_len:
            raise ConfigError(
                "temperature_scale: needs a RoPE scaling with an original context, got "
                f"{quoted(self.rope_scaling)}"
            )

    @property
    def original_max_seq_len(self) -> int:
        """The context before RoPE was scaled; 0 if it is not."""
        return getattr(self.rope_scaling, "original_max_seq_len", 0)


def mistral_plan(config: MistralConfig) -> ModelPlan:
    attention = attention_plan(
        config, temperature_scale=config.temperature_scale,
        temperature_length=config.original_max_seq_len or 1,
    )  # fmt: skip
    layers = range(config.n_layers)
    return decoder_plan(config, [replace(attention, window=config.window(n)) for n in layers])


def windows(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Every layer has the window, unless `layer_types` says which; keys of Qwen have no effect."""
    missing = "sliding_window" not in get.values
    window = get.integer("sliding_window", 4096 if missing else None)
    chosen = decoder.layer_types(get, fields["n_layers"], (True,) * fields["n_layers"])
    if window is None or not any(chosen):
        return {}
    return {"sliding_window": window, "window_layers": chosen}


def ministral3(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Queries grow beyond the original context; there is no `layer_types`."""
    rope, layers = get.object("rope_parameters"), fields["n_layers"]
    window = get.integer("sliding_window", None)
    used = {} if window is None else {"sliding_window": window, "window_layers": (True,) * layers}
    rope.integer(ORIGINAL)
    return used | {"temperature_scale": rope.number(BETA, minimum=0.0)}


HF_KEYS = HFKeys(
    n_kv_heads=8, context=131_072,
    neutral={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)  # fmt: skip


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    if hf_class(values, HF_CLASSES) == HF_CLASSES["ministral3"]:
        keys = replace(
            HF_KEYS, head_dim=128, context=262_144, norm_eps=1e-5, rope_theta=1e6,
            rope_keys=(BETA,),
        )  # fmt: skip
        return decoder.config_from_hf(values, MistralConfig, keys, ministral3)
    return decoder.config_from_hf(values, MistralConfig, HF_KEYS, windows)


def config_to_hf(config: MistralConfig) -> dict[str, Any]:
    window, more = config.sliding_window, dict[str, Any]()
    if not all(config.window_layers):
        more["layer_types"] = decoder.layer_types_to_hf(config.window_layers)
    more |= {"hidden_act": "silu", "sliding_window": window if any(config.window_layers) else None}
    if not config.temperature_scale:
        return hf_values(config, "mistral", "MistralForCausalLM", **more)
    values = hf_values(config, "ministral3", "Ministral3ForCausalLM", **more)
    values["rope_parameters"] = {
        **values.pop("rope_scaling"), "rope_theta": values.pop("rope_theta"),
        BETA: config.temperature_scale,
    }  # fmt: skip
    return values


def config_from_gguf(file: TensorFile) -> Resolved:
    def keys(get: decoder.GGUFFields, fields: dict[str, Any]) -> dict[str, Any]:
        return {"temperature_scale": get.number("attention.temperature_scale", 0.0, minimum=0.0)}

    neutral = {"attention.sliding_window": 0}
    return decoder.config_from_gguf(
        file, "mistral3", MistralConfig, "interleaved", keys, neutral=neutral
    )


MISTRAL = Architecture(
    name="mistral",
    title="Mistral",
    hf_classes=HF_CLASSES,
    gguf_names=("mistral3",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    rules=decoder.decoder_rules(),
    extras=decoder.EXTRAS,
    model="glassllama.models.mistral:Mistral",
    layer_plan=mistral_plan,
)
