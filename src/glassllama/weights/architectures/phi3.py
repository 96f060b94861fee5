"""Phi-3, Phi-3.5 and Phi-4-mini: fused matrices, LongRoPE, a rotary width of its own, a window.

Sources: Phi-3 Technical Report (2024), Phi-4-Mini Technical Report (2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from glassllama.base.config import LongRopeScaling, WindowedConfig
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import ModelPlan, attention_plan, decoder_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import HFKeys, hf_values
from glassllama.weights.architectures.description import Architecture, Resolved
from glassllama.weights.architectures.rope import (
    LONG,
    divisors_of,
    expected,
    long_rope_scale,
    rope_from_hf,
)

FUSED: decoder.Fused = {
    ("attention.wq", "attention.wk", "attention.wv"): ("self_attn.qkv_proj", "attn_qkv"),
    ("feed_forward.gate", "feed_forward.up"): ("mlp.gate_up_proj", "ffn_up"),
}
SHORT = "rope_factors_short.weight"
FACTOR = "rope.scaling.attn_factor"  # LongRoPE's factor of cosines and sines


@dataclass(frozen=True, kw_only=True)
class Phi3Config(WindowedConfig):
    """The configuration of a Phi-3. The first `rotary_width` coordinates of a head are rotated."""

    rotary_width: int
    architecture: ClassVar[str] = "phi3"

    @property
    def rotary_dim(self) -> int:
        return self.rotary_width


def phi3_plan(config: Phi3Config) -> ModelPlan:
    attention, layers = attention_plan(config), range(config.n_layers)
    return decoder_plan(config, [replace(attention, window=config.window(n)) for n in layers])


def windows(window: int | None, layers: int) -> dict[str, Any]:
    if window is None:
        return {}
    return {"sliding_window": window, "window_layers": (True,) * layers}


def keys(get: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    rope = rope_from_hf(get, fields["max_seq_len"])
    window = get.integer("sliding_window", None)
    return {
        "rotary_width": int(fields["head_dim"] * rope.partial),
        **windows(window, fields["n_layers"]),
    }


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    hf_keys = HFKeys(
        context=4096, norm_eps=1e-5, partial=True,
        neutral={"hidden_act": "silu", "attention_bias": False},
    )  # fmt: skip
    unused = ("embd_pdrop", "resid_pdrop")
    return decoder.config_from_hf(values, Phi3Config, hf_keys, keys, unused)


def config_to_hf(config: Phi3Config) -> dict[str, Any]:
    scaling = config.rope_scaling
    original = getattr(scaling, "original_max_seq_len", config.max_seq_len)
    return hf_values(
        config, "phi3", "Phi3ForCausalLM", hidden_act="silu", pad_token_id=None,
        sliding_window=config.sliding_window if any(config.window_layers) else None,
        partial_rotary_factor=config.rotary_width / config.head_dim,
        original_max_position_embeddings=original,
    )  # fmt: skip


def gguf_keys(get: decoder.GGUFFields, fields: dict[str, Any]) -> dict[str, Any]:
    window = get.integer("attention.sliding_window", 0, minimum=0) or None
    found = windows(window, fields["n_layers"])
    if {LONG, SHORT}.isdisjoint(get.file.names()):
        return found
    context, count = fields["max_seq_len"], fields["rotary_width"] // 2
    original = get.integer("rope.scaling.original_context_length", context)
    usual = long_rope_scale(context / original, original)
    scaling = LongRopeScaling(
        short=divisors_of(get.file, SHORT, count),
        long=divisors_of(get.file, LONG, count),
        original_max_seq_len=original,
        longest_seq_len=context,
        attention_factor=get.number(FACTOR, usual),
    )
    return found | {"rope_scaling": scaling, "max_seq_len": min(context, original)}


def config_from_gguf(file: TensorFile) -> Resolved:
    own = (FACTOR,) if LONG in file.names() else ()
    return decoder.config_from_gguf(file, "phi3", Phi3Config, "half", gguf_keys, own=own)


PHI3 = Architecture(
    name="phi3",
    title="Phi-3",
    hf_classes={"phi3": "Phi3ForCausalLM"},
    gguf_names=("phi3",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    rules=decoder.decoder_rules(fused=FUSED),
    extras={**decoder.EXTRAS, "gguf": (*decoder.EXTRAS["gguf"], expected(f"{LONG}|{SHORT}"))},
    model="glassllama.models.phi3:Phi3",
    layer_plan=phi3_plan,
)
