"""Gemma 1, 2 and 3 (text).

Embeddings are multiplied by √dim, the feed-forward network is gated by GELU, and Hugging Face's
files store the weights of norms as w for 1 + w. Gemma 2 has norms also after attention and
feed-forward network, soft caps, and a window in every second layer. Gemma 3 has a norm of every
query and key head instead of the soft caps, and two kinds of layers with a RoPE each. Sources:
Gemma (2024), Gemma 2 (2024), Gemma 3 Technical Report (2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from glassllama.base.config import DecoderConfig, WindowedConfig, require_positive
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import (
    NORM_NAMES,
    ModelPlan,
    attention_plan,
    decoder_plan,
    rope_plan,
)
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import FULL, SLIDING, HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved
from glassllama.weights.architectures.rope import rope_from_hf

LOCAL_THETA = 10_000.0  # Gemma 3's base of RoPE in layers with a window
PATTERN = 6  # Gemma 3: every sixth layer has no window
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # whose scale of the scores is 1/√(dim / n_heads)


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    """The configuration of a Gemma 1."""

    architecture: ClassVar[str] = "gemma"

    @property
    def embedding_multiplier(self) -> float:
        return math.sqrt(self.dim)


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(WindowedConfig, GemmaConfig):
    """The configuration of a Gemma 2. Scores are divided by √`query_scale`."""

    query_scale: float
    score_cap: float | None = None
    logit_cap: float | None = None
    architecture: ClassVar[str] = "gemma2"

    def __post_init__(self) -> None:
        super().__post_init__()
        caps = [cap for cap in ("score_cap", "logit_cap") if getattr(self, cap) is not None]
        require_positive(self, "query_scale", *caps)


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """The configuration of a Gemma 3 (text). Layers with a window use `local_theta`, unscaled."""

    local_theta: float = LOCAL_THETA
    architecture: ClassVar[str] = "gemma3"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "local_theta")

    @property
    def local(self) -> Gemma3Config:
        """The configuration with the RoPE of the layers with a window."""
        return replace(self, rope_theta=self.local_theta, rope_scaling=None)


def gemma_plan(config: GemmaConfig) -> ModelPlan:
    return decoder_plan(
        config, [attention_plan(config)] * config.n_layers, activation="gelu_tanh",
        embedding_multiplier=config.embedding_multiplier,
    )  # fmt: skip


def gemma2_plan(config: Gemma2Config) -> ModelPlan:
    is_gemma3 = isinstance(config, Gemma3Config)
    attention = attention_plan(
        config, scale=config.query_scale**-0.5, softcap=config.score_cap,
        qk_norm="per_head" if is_gemma3 else "none",
    )  # fmt: skip
    local = rope_plan(config.local) if isinstance(config, Gemma3Config) else attention.rope
    layers = [
        replace(attention, window=window, rope=local if window else attention.rope)
        for window in map(config.window, range(config.n_layers))
    ]
    return decoder_plan(
        config, layers, activation="gelu_tanh", norms=NORM_NAMES,
        embedding_multiplier=config.embedding_multiplier, logit_softcap=config.logit_cap,
    )  # fmt: skip


# --- config.json ----------------------------------------------------------------------------

GELU = "gelu_pytorch_tanh"
NEUTRAL = {"attention_bias": False, "use_bidirectional_attention": False}
HF_KEYS = HFKeys(n_kv_heads=16, head_dim=256, context=8192, tied=True, neutral=NEUTRAL)
CAPS = {"score_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}


def activation(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Old files of Gemma 1 say gelu and mean the approximation by tanh, as all Gemmas have."""
    for key in ("hidden_act", "hidden_activation"):
        if get.text(key, GELU) not in (GELU, "gelu"):
            get.refuse(key, GELU)
    return {}


def gemma2_keys(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    activation(get, fields)
    layers = fields["n_layers"]
    by_default = [n % 2 == 0 for n in range(layers)]
    defaults = {"score_cap": 50.0, "logit_cap": 30.0}
    missing = {ours: theirs for ours, theirs in CAPS.items() if theirs not in get.values}
    return {
        "query_scale": get.number("query_pre_attn_scalar", 256.0),
        "sliding_window": get.integer("sliding_window", 4096),
        "window_layers": decoder.layer_types(get, layers, by_default),
        **{
            ours: defaults[ours] if ours in missing else get.number(theirs, None)
            for ours, theirs in CAPS.items()
        },
    }


def gemma3_keys(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    activation(get, fields)
    layers, pattern = fields["n_layers"], get.integer("sliding_window_pattern", PATTERN)
    by_default = [(n + 1) % pattern != 0 for n in range(layers)]
    context = get.integer("max_position_embeddings", 131_072)
    rope = rope_from_hf(get, context, 1e6, part=FULL)
    rope.require_whole_heads()
    old = get.number("rope_local_base_freq", LOCAL_THETA)
    parameters = get.object("rope_parameters", None)
    is_nested = parameters is not None and SLIDING in parameters.values
    local = rope_from_hf(get, context, old, part=SLIDING) if is_nested else None
    if local is not None and local.scaling is not None:
        get.refuse("rope_parameters", "no scaling in the layers with a window")
    return {
        "rope_theta": rope.theta, "rope_scaling": rope.scaling, "max_seq_len": rope.context,
        "local_theta": old if local is None else local.theta, "notes": rope.notes,
        "query_scale": get.number("query_pre_attn_scalar", 256.0),
        "sliding_window": get.integer("sliding_window", 4096),
        "window_layers": decoder.layer_types(get, layers, by_default),
        **{ours: get.number(theirs, None) for ours, theirs in CAPS.items() if ours == "logit_cap"},
    }  # fmt: skip


def gemma_from_hf(values: Mapping[str, Any]) -> Resolved:
    return decoder.config_from_hf(values, GemmaConfig, HF_KEYS, activation)


def gemma2_from_hf(values: Mapping[str, Any]) -> Resolved:
    keys = replace(HF_KEYS, n_kv_heads=4)
    return decoder.config_from_hf(values, Gemma2Config, keys, gemma2_keys)


def gemma3_from_hf(values: Mapping[str, Any]) -> Resolved:
    neutral = {**NEUTRAL, "attn_logit_softcapping": None}
    keys = replace(HF_KEYS, n_kv_heads=4, context=131_072, rope_theta=1e6, neutral=neutral)
    return decoder.config_from_hf(values, Gemma3Config, keys, gemma3_keys, own_rope=True)


def gemma_to_hf(config: GemmaConfig) -> dict[str, Any]:
    return hf_values(config, "gemma", "GemmaForCausalLM", hidden_act=GELU)


def gemma2_to_hf(config: Gemma2Config) -> dict[str, Any]:
    return hf_values(
        config, "gemma2", "Gemma2ForCausalLM", hidden_activation=GELU, **windows_to_hf(config),
        attn_logit_softcapping=config.score_cap,
    )  # fmt: skip


def gemma3_to_hf(config: Gemma3Config) -> dict[str, Any]:
    values = hf_values(
        config, "gemma3_text", "Gemma3ForCausalLM", hidden_activation=GELU, **windows_to_hf(config)
    )
    scaling = values.pop("rope_scaling") or {"rope_type": "default"}
    values["rope_parameters"] = {
        FULL: {**scaling, "rope_theta": values.pop("rope_theta")},
        SLIDING: {"rope_type": "default", "rope_theta": config.local_theta},
    }
    return values


def whole_if_possible(number: float) -> float:
    """transformers wants a whole number here."""
    return int(number) if number == int(number) else number


def windows_to_hf(config: Gemma2Config) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": whole_if_possible(config.query_scale),
        "sliding_window": config.sliding_window,
        "layer_types": decoder.layer_types_to_hf(config.window_layers),
        "final_logit_softcapping": config.logit_cap,
    }


# --- GGUF -----------------------------------------------------------------------------------


def query_scale(get: decoder.GGUFFields, fields: dict[str, Any]) -> float:
    """llama.cpp's rule: the file does not say."""
    is_27b = fields["n_layers"] == LAYERS_OF_27B[get.name]
    return float(fields["dim"] / fields["n_heads"] if is_27b else fields["head_dim"])


def gemma2_gguf(get: decoder.GGUFFields, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "query_scale": query_scale(get, fields),
        "sliding_window": get.integer("attention.sliding_window", 4096),
        "window_layers": tuple(n % 2 == 0 for n in range(fields["n_layers"])),
        "score_cap": get.number("attn_logit_softcapping", 50.0),
        "logit_cap": get.number("final_logit_softcapping", 30.0),
    }


def gemma3_gguf(get: decoder.GGUFFields, fields: dict[str, Any]) -> dict[str, Any]:
    pattern = get.integer("attention.sliding_window_pattern", PATTERN)
    return {
        "query_scale": query_scale(get, fields),
        "sliding_window": get.integer("attention.sliding_window"),
        "window_layers": tuple((n + 1) % pattern != 0 for n in range(fields["n_layers"])),
        "local_theta": get.number("rope.freq_base_swa", LOCAL_THETA),
        "rope_theta": get.number("rope.freq_base", 1e6),
        "logit_cap": get.number("final_logit_softcapping", None),
    }


def gemma_from_gguf(file: TensorFile) -> Resolved:
    return decoder.config_from_gguf(file, "gemma", GemmaConfig, "half")


def gemma2_from_gguf(file: TensorFile) -> Resolved:
    return decoder.config_from_gguf(file, "gemma2", Gemma2Config, "half", gemma2_gguf)


def gemma3_from_gguf(file: TensorFile) -> Resolved:
    return decoder.config_from_gguf(file, "gemma3", Gemma3Config, "half", gemma3_gguf)


GEMMA = Architecture(
    name="gemma",
    title="Gemma",
    hf_classes={"gemma": "GemmaForCausalLM"},
    gguf_names=("gemma",),
    config_from_hf=gemma_from_hf,
    config_to_hf=gemma_to_hf,
    config_from_gguf=gemma_from_gguf,
    rules=decoder.decoder_rules(less_one=True),
    extras=decoder.EXTRAS,
    model="glassllama.models.gemma:Gemma",
    layer_plan=gemma_plan,
)
GEMMA2 = Architecture(
    name="gemma2",
    title="Gemma 2",
    hf_classes={"gemma2": "Gemma2ForCausalLM"},
    gguf_names=("gemma2",),
    config_from_hf=gemma2_from_hf,
    config_to_hf=gemma2_to_hf,
    config_from_gguf=gemma2_from_gguf,
    rules=decoder.decoder_rules(norms=decoder.FOUR_NORMS, less_one=True),
    extras=decoder.EXTRAS,
    model="glassllama.models.gemma:Gemma2",
    layer_plan=gemma2_plan,
)
GEMMA3 = Architecture(
    name="gemma3",
    title="Gemma 3",
    hf_classes={"gemma3_text": "Gemma3ForCausalLM"},
    gguf_names=("gemma3",),
    config_from_hf=gemma3_from_hf,
    config_to_hf=gemma3_to_hf,
    config_from_gguf=gemma3_from_gguf,
    rules=decoder.decoder_rules(norms=decoder.FOUR_NORMS, qk_norm=("D", "D"), less_one=True),
    extras=decoder.EXTRAS,
    model="glassllama.models.gemma:Gemma3",
    layer_plan=gemma2_plan,
)
