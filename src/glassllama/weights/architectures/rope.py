"""RoPE in the files of decoders: base, rules of scaling, stored tables.

Sources: transformers' `modeling_rope_utils` for config.json; llama.cpp for GGUF.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import (
    DecoderConfig,
    DynamicScaling,
    GivenDivisors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    rope_frequencies,
)
from glassllama.base.errors import ConfigError, join_names, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.formats.blocks import FLOATS
from glassllama.weights.architectures.description import ExtraTensors, ReadKeys, unused_note

OLD_THETA = 10_000.0  # the original base of RoPE; files before Llama 3 leave it out
ORIGINAL = "original_max_position_embeddings"
# Keys of rope_parameters that may be there whatever the rule.
ROPE_WITHOUT_EFFECT = (ORIGINAL, "type", "rope_type", "finetuned", "max_position_embeddings")
LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
DIVISORS = "rope_freqs.weight"
LONG = "rope_factors_long.weight"


# --- Hugging Face ---


class Rope(NamedTuple):
    """The RoPE in a configuration, and the context that a model has unless another is chosen."""

    theta: float
    scaling: RopeScaling | None
    context: int
    notes: list[str]
    partial: float = 1.0  # the share of a head's coordinates that are rotated

    def require_whole_heads(self) -> None:
        if self.partial != 1:
            raise ConfigError(
                f"config.json: partial_rotary_factor is {self.partial:g}, only 1 is supported here"
            )


def context_ends_at(tokens: int) -> str:
    return f"exact up to {tokens} tokens, so the context ends there"


def rope_from_hf(
    get: Fields, context: int, theta: float = OLD_THETA, suffix: str = "", part: str = "",
    own_keys: Collection[str] = (),
) -> Rope:  # fmt: skip
    """RoPE of a config.json with this context, and this theta if the file has none.

    transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`, which
    is used if a file has both. `part`: the type of layer, if each has its own. `suffix` may follow
    the name of the rule. `own_keys` are read by the caller; a note names others without effect.
    """
    objects = {key: get.object(key, None) for key in ("rope_scaling", "rope_parameters")}
    key = next((key for key, found in objects.items() if found and found.values), "rope_parameters")
    values = found.values if (found := objects[key]) else {}
    if part and isinstance(values.get(part), Mapping):
        values, key = values[part], f"{key}: {part}"
    rope = Fields(f"config.json: {key}", read := ReadKeys(values), get.error)
    if nested := [key for key, value in values.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"{rope.source}: one per type of layer ({join_names(nested)}), only one for all is "
            "supported"
        )
    theta = rope.number("rope_theta", get.number("rope_theta", theta))
    partial = rope.number("partial_rotary_factor", get.number("partial_rotary_factor", 1.0))
    kind = rope.text("rope_type", rope.text("type", "default")).removesuffix(suffix)
    if kind == "default":
        notes = unused_note(read.unused({*ROPE_WITHOUT_EFFECT, *own_keys}), rope.source)
        return Rope(theta, None, context, notes, partial)
    original = get.integer(ORIGINAL, rope.integer(ORIGINAL, context))
    scaling, context = scaling_from_hf(rope, kind, context, original)
    notes = unused_note(read.unused({*ROPE_WITHOUT_EFFECT, *own_keys}), rope.source)
    return Rope(theta, scaling, context, notes, partial)


def scaling_from_hf(
    rope: Fields, kind: str, context: int, original: int
) -> tuple[RopeScaling | None, int]:
    """A rule of scaling and the context: the original one where RoPE follows from the context."""
    if kind == "linear":
        return LinearScaling(factor=rope.number("factor")), context
    if kind == "llama3":
        factors = {key: rope.number(key) for key in LLAMA3_FACTORS}
        return Llama3Scaling(**factors, original_max_seq_len=original), context
    if kind == "dynamic":  # transformers starts at max_position_embeddings, whatever else is there
        factor = rope.number("factor")
        return DynamicScaling(factor=factor, original_max_seq_len=context), context
    if kind == "yarn":
        yarn = yarn_from_hf(rope, context, original)
        return yarn, max(context, int(yarn.factor * original))
    if kind == "longrope":
        factor = rope.number("factor", context / original)
        usual = long_rope_scale(factor, original)
        lists = {
            name: tuple(map(float, rope.items(f"{name}_factor", of="number")))
            for name in ("short", "long")
        }
        scaling = LongRopeScaling(
            **lists,
            original_max_seq_len=original,
            longest_seq_len=context,
            attention_factor=rope.number("attention_factor", usual),
        )
        return scaling, min(context, original)
    raise ConfigError(
        f"config.json: rope type {quoted(kind)} is not supported (have default, linear, llama3, "
        "yarn, dynamic, longrope)"
    )


def yarn_from_hf(rope: Fields, context: int, original: int) -> YarnScaling:
    factor = rope.number("factor", context / original)
    scales = (
        rope.number("mscale", 0.0, minimum=0.0),
        rope.number("mscale_all_dim", 0.0, minimum=0.0),
    )
    usual = yarn_scale(factor)
    if all(scales):
        usual = yarn_scale(factor, scales[0]) / yarn_scale(factor, scales[1])
    return YarnScaling(
        factor=factor, original_max_seq_len=original,
        beta_fast=rope.number("beta_fast", 32.0), beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
        attention_factor=rope.number("attention_factor", usual),
    )  # fmt: skip


def yarn_scale(factor: float, multiplier: float = 1.0) -> float:
    """YaRN's factor of cosines and sines (Peng et al., 2023, section 3.4)."""
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0


def long_rope_scale(factor: float, original: int) -> float:
    """LongRoPE's factor of cosines and sines, for a context longer by `factor`."""
    if factor <= 1 or original <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


def rope_to_hf(scaling: RopeScaling | None, suffix: str = "") -> dict[str, Any] | None:
    """`rope_scaling` of a config.json. Raises ConfigError if it has no key for the rule."""
    if scaling is None:
        return {"rope_type": "default" + suffix} if suffix else None
    original = {ORIGINAL: getattr(scaling, "original_max_seq_len", None)}
    if isinstance(scaling, Llama3Scaling):
        factors = {key: getattr(scaling, key) for key in LLAMA3_FACTORS}
        return {"rope_type": "llama3" + suffix, **factors, **original}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear" + suffix, "factor": scaling.factor}
    if isinstance(scaling, DynamicScaling):
        return {"rope_type": "dynamic" + suffix, "factor": scaling.factor, **original}
    if isinstance(scaling, YarnScaling):
        keys = ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor")
        values = {key: getattr(scaling, key) for key in keys}
        return {"rope_type": "yarn" + suffix, **values, **original}
    if isinstance(scaling, LongRopeScaling):
        return {
            "rope_type": "longrope" + suffix,
            "short_factor": [*scaling.short], "long_factor": [*scaling.long],
            "attention_factor": scaling.attention_factor, **original,
        }  # fmt: skip
    raise ConfigError("config.json has no key for a list of RoPE divisors (of a GGUF file)")


# --- GGUF ---


def scaling_from_gguf(file: TensorFile, get: Fields, name: str, count: int) -> RopeScaling | None:
    """The divisors of the `count` frequencies: a factor for all, and `rope_freqs.weight`.

    That tensor holds what Llama 3.1's rule gives. If a file has both, both apply, as in llama.cpp.
    """
    kind = get.text("rope.scaling.type", None)
    old = get.number("rope.scale_linear", 0.0, minimum=0.0)
    factor = get.number("rope.scaling.factor", old, minimum=0.0)
    if kind == "yarn" and factor > 1:
        multiplier = get.number("rope.scaling.yarn_log_multiplier", 0.0, minimum=0.0)
        usual = yarn_scale(factor) / yarn_scale(factor, multiplier)
        return YarnScaling(
            factor=factor,
            original_max_seq_len=get.integer("rope.scaling.original_context_length"),
            beta_fast=get.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=get.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=get.number("rope.scaling.yarn_attn_factor", usual),
        )
    if kind == "longrope" and LONG not in file.names():
        raise ConfigError(f"GGUF: {name}.rope.scaling.type is 'longrope', but {LONG} is missing")
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise ConfigError(f"GGUF: {name}.rope.scaling.type {quoted(kind)} is not supported")
    factor = factor if factor and kind in (None, "linear") else 1.0  # 0 means none in llama.cpp
    if DIVISORS not in file.names():
        return None if factor == 1.0 else LinearScaling(factor=factor)
    values = divisors_of(file, DIVISORS, count)
    return GivenDivisors(values=tuple(factor * divisor for divisor in values))


def divisors_of(file: TensorFile, name: str, count: int) -> tuple[float, ...]:
    """A tensor of a GGUF with a divisor for each of `count` frequencies. Raises ConfigError."""
    if name not in file.names():
        raise ConfigError(f"GGUF: {name} is missing")
    info = file.info(name)
    if info.shape != (count,) or info.dtype != "F32":
        raise ConfigError(
            f"GGUF: {name} must be {count} numbers of type F32, got {info.dtype} {info.shape}"
        )
    return tuple(map(float, file.read(name)))


# --- stored tables ---


def is_rope_table(file: TensorFile, name: str, config: DecoderConfig) -> bool:
    """Whether stored RoPE frequencies are the configuration's, with or without its scaling."""
    tables = rope_frequencies(config), rope_frequencies(replace(config, rope_scaling=None))
    return any(is_close_to(file, name, table) for table in tables)


def is_close_to(file: TensorFile, name: str, expected: NDArray[np.float32]) -> bool:
    """Whether a stored table agrees to the precision of its type.

    It was computed in float32 as theta to the power of -2i/D: the exponent's rounding error is
    multiplied by ln theta < 16, the other steps add a few, together 32; then the type rounds once.
    """
    info = file.info(name)
    if info.shape != expected.shape or info.dtype not in FLOATS:
        return False
    stored = file.read(name).astype(np.float64)
    precision = {"F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[info.dtype]
    smallest = 2.0**-24 if info.dtype == "F16" else 0.0  # F16 has few numbers near zero
    allowed = (32 * 2.0**-24 + precision) * expected + smallest
    return bool(np.all(np.abs(stored - expected) <= allowed))


def rope_tables(pattern: str) -> ExtraTensors:
    """Tables that old writers stored beside the weights."""
    note = "not the frequencies of the configuration, ignored"
    return ExtraTensors(re.compile(pattern), is_rope_table, note)


def expected(pattern: str) -> ExtraTensors:
    """Tensors that the configuration was read from."""
    return ExtraTensors(re.compile(pattern), lambda *_: True, "")
