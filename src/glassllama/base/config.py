"""Configurations of decoders, and the RoPE frequencies that follow from them.

`DecoderConfig` has the fields that all decoders with RoPE and RMSNorm share. `LlamaConfig` is here;
the configurations of other families are in weights/architectures.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import ConfigError, quoted
from glassllama.base.fields import MAX_INTEGER, MAX_NUMBER, is_integer, is_number

RopeLayout = Literal["interleaved", "half"]
Floats = NDArray[np.float64]
Pairs = NDArray[np.int64]  # numbers of pairs of coordinates, which RoPE rotates


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """RoPE scaling of Llama 3.1: low frequencies are divided by `factor`, high ones unchanged.

    Source: The Llama 3 Herd of Models (2024); the rule is in Meta's `apply_scaling`.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.factor <= 0:
            raise ConfigError(f"rope_scaling: need 0 < low < high and factor > 0, got {self}")

    def divisors(self, frequencies: Floats, pairs: Pairs, config: DecoderConfig) -> Floats:
        """The divisor of each frequency (radians per token) of these pairs: 1 … factor."""
        rotations = self.original_max_seq_len * frequencies / (2 * math.pi)  # in the old context
        share = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)  # 1: unchanged, 0: divided by the factor
        return 1.0 / (share + (1.0 - share) / self.factor)


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: all frequencies are divided by a factor (Chen et al., 2023)."""

    factor: float

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ConfigError(f"rope_scaling: factor must be positive, got {quoted(self.factor)}")

    def divisors(self, frequencies: Floats, pairs: Pairs, config: DecoderConfig) -> Floats:
        return np.full_like(frequencies, self.factor)


@dataclass(frozen=True, kw_only=True)
class GivenDivisors:
    """A divisor for each frequency: `rope_freqs.weight` in GGUF files of Llama 3.1."""

    values: tuple[float, ...]  # as many as there are frequencies

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v > 0 for v in self.values):
            raise ConfigError("rope_scaling: divisors must be finite and positive")

    def divisors(self, frequencies: Floats, pairs: Pairs, config: DecoderConfig) -> Floats:
        return np.array(self.values)[pairs]


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """Dynamic NTK: a larger base of RoPE for contexts longer than the original one.

    The base follows from the context that the model was opened with, so that the keys of a text do
    not depend on how long it becomes. Source: transformers' rule of this name.
    """

    factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        require_positive(self, "factor", part="rope_scaling: ")
        require_sizes(self, "original_max_seq_len", part="rope_scaling: ")

    @property
    def longest_seq_len(self) -> int:
        return max(1, min(int(self.factor * self.original_max_seq_len), MAX_INTEGER))

    def divisors(self, frequencies: Floats, pairs: Pairs, config: DecoderConfig) -> Floats:
        longer = max(1.0, config.max_seq_len / self.original_max_seq_len)
        ratio = self.factor * longer - (self.factor - 1)
        divisors: Floats = np.float64(ratio) ** (2 * pairs / max(1, config.rotary_dim - 2))
        return divisors


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al., 2023), section 3.2: high frequencies unchanged, low ones divided.

    Between those that turn `beta_fast` and `beta_slow` times within the original context, the
    divisor changes from 1 to `factor`. Cosines and sines are multiplied by `attention_factor`.
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # whether the limits are whole numbers of pairs
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        fields = ("factor", "beta_fast", "beta_slow", "attention_factor")
        require_positive(self, *fields, part="rope_scaling: ")
        require_sizes(self, "original_max_seq_len", part="rope_scaling: ")

    def divisors(self, frequencies: Floats, pairs: Pairs, config: DecoderConfig) -> Floats:
        dim, theta = config.rotary_dim, config.rope_theta
        if theta == 1:
            raise ConfigError("rope_scaling: YaRN needs a rope_theta other than 1")

        def pair_that_turns(times: float) -> float:
            ratio = self.original_max_seq_len / (times * 2 * math.pi)
            return dim * math.log(ratio) / (2 * math.log(theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 * (low == high)
        share = np.clip((pairs - low) / (high - low), 0.0, 1.0)  # 1: divided by the factor
        divisors: Floats = 1.0 / (share / self.factor + (1.0 - share))
        return divisors


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., 2024): a divisor for each frequency, from one of two lists.

    `long` is used if the model was opened with more than the original context, so that the keys of
    a text do not depend on how long it becomes. Cosines and sines are multiplied by
    `attention_factor`. `longest_seq_len`: the context that `long` was made for.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_seq_len: int
    longest_seq_len: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "attention_factor", part="rope_scaling: ")
        require_sizes(self, "original_max_seq_len", "longest_seq_len", part="rope_scaling: ")
        if len(self.short) != len(self.long):
            raise ConfigError(
                f"rope_scaling: {len(self.short)} short and {len(self.long)} long divisors"
            )
        GivenDivisors(values=(*self.short, *self.long))

    @property
    def values(self) -> tuple[float, ...]:
        return self.short

    def divisors(self, frequencies: Floats, pairs: Pairs, config: DecoderConfig) -> Floats:
        is_long = config.max_seq_len > self.original_max_seq_len
        return np.array(self.long if is_long else self.short)[pairs]


RopeScaling = (
    Llama3Scaling | LinearScaling | GivenDivisors | DynamicScaling | YarnScaling | LongRopeScaling
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The fields that all families share; sizes in elements.

    `rope_layout` says which coordinates of a head RoPE rotates as a pair: "interleaved" (0,1),
    (2,3), … in Meta and some GGUF files, "half" (0, D/2), (1, D/2+1), … in Hugging Face files. The
    q and k rows of a file are never permuted to another layout.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rope_layout: RopeLayout = "half"
    tie_embeddings: bool = False
    architecture: ClassVar[str]  # its name in weights/architectures
    unbounded: ClassVar[bool] = False  # True: the next id depends on the last id only

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        require_sizes(self, *sizes, "max_seq_len")
        require_positive(self, "norm_eps", "rope_theta")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and "
                f"{self.n_kv_heads}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(f"head_dim must be even to be rotated, got {self.rotary_dim}")
        require_choice(self, "rope_layout", get_args(RopeLayout))
        require_finite_angles(self)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def rotary_dim(self) -> int:
        """The first coordinates of a head, which are rotated; the others are left as they are."""
        return self.head_dim

    @property
    def longest_context(self) -> int:
        """The tokens of the longest context that `with_context` allows."""
        return max(self.max_seq_len, getattr(self.rope_scaling, "longest_seq_len", 0))


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The configuration of a Llama.

    `qk_norm`: RMSNorm without weights of q and k after RoPE, as in Llama 4.
    """

    qk_norm: bool = False
    architecture: ClassVar[str] = "llama"


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(DecoderConfig):
    """A configuration in which some layers have a sliding window.

    `sliding_window` is the number of tokens that a query sees there, its own included.
    `window_layers` says for every layer whether it has the window; empty: none has.
    """

    sliding_window: int | None = None
    window_layers: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_layers and len(self.window_layers) != self.n_layers:
            raise ConfigError(
                f"window_layers: {len(self.window_layers)} entries for {self.n_layers} layers"
            )
        if any(self.window_layers):
            require_sizes(self, "sliding_window")

    def window(self, layer: int) -> int | None:
        """The window of a layer, or None."""
        return self.sliding_window if self.window_layers and self.window_layers[layer] else None


def with_context(config: Any, tokens: int) -> Any:
    """The configuration with a context of so many tokens, shorter or longer than its own.

    RoPE of dynamic NTK and LongRoPE follows from it. Raises ConfigError outside 1 … the longest
    context, and for models whose context is fixed (learned positions, bigrams).
    """
    if not isinstance(config, DecoderConfig):
        raise ConfigError("context_size: the context of this model is fixed")
    if type(tokens) is not int or not 0 < tokens <= config.longest_context:
        raise ConfigError(
            f"context_size must be 1 to {config.longest_context} tokens for this model, got "
            f"{quoted(tokens)}"
        )
    return replace(config, max_seq_len=tokens)


def require_sizes(config: object, *fields: str, part: str = "") -> None:
    """Raise ConfigError unless each of these fields is a positive whole number of 31 bits.

    `part` precedes the name of the field in messages.
    """
    for field in fields:
        value = getattr(config, field)
        if type(value) is not int or not 0 < value <= MAX_INTEGER:
            limit = f" up to {MAX_INTEGER}" if is_integer(value) and value > 0 else ""
            raise ConfigError(
                f"{part}{field} must be a positive whole number{limit}, got {quoted(value)}"
            )


def require_positive(config: object, *fields: str, part: str = "") -> None:
    """Raise ConfigError unless each of these fields is a positive number, finite in float32."""
    for field in fields:
        value = getattr(config, field)
        if not (is_number(value) and value > 0):
            raise ConfigError(f"{part}{field} must be positive and finite, got {quoted(value)}")


def require_choice(config: object, field: str, choices: Collection[str], part: str = "") -> None:
    """Raise ConfigError unless the field is one of `choices`, or a set of some of them."""
    value = getattr(config, field)
    chosen = value if isinstance(value, frozenset) else {value}
    if unknown := sorted(chosen - set(choices), key=str):
        names = ", ".join(choices)
        raise ConfigError(f"{part}{field} must be one of {names}, got {quoted(unknown[0])}")


def require_finite_angles(config: DecoderConfig) -> None:
    """Raise ConfigError where an angle at the end of the context would not be finite in float32.

    `head_dim` has not yet been compared with the tensors of the file, so no array of that size is
    allocated: with a scaling rule, only the fastest and the slowest rotation are computed.
    """
    count, scaling = config.rotary_dim // 2, config.rope_scaling
    if isinstance(scaling, GivenDivisors | LongRopeScaling):
        if len(scaling.values) != count:
            raise ConfigError(
                f"rope_scaling: {len(scaling.values)} divisors for {count} frequencies"
            )
        pairs = np.arange(count)
    else:
        pairs = np.array([0, count - 1])
    with np.errstate(all="ignore"):
        fastest = float(np.max(scaled_frequencies(config, pairs)))
    if not fastest * config.max_seq_len <= MAX_NUMBER:
        raise ConfigError(
            f"rope_theta {config.rope_theta:g} and rope_scaling rotate by {fastest:g} radians per "
            f"token, too fast for a context of {config.max_seq_len}"
        )


def scaled_frequencies(config: DecoderConfig, pairs: Pairs) -> Floats:
    """Radians per token of the rotations with these numbers, float64, scaling applied."""
    frequencies = np.float64(config.rope_theta) ** -(2 * pairs / config.rotary_dim)
    if config.rope_scaling is None:
        return frequencies
    return frequencies / config.rope_scaling.divisors(frequencies, pairs, config)


def rope_frequencies(config: DecoderConfig) -> NDArray[np.float32]:
    """Radians per token of each of the R/2 rotations, (R/2,) float32, scaling applied.

    R is the rotary width, usually D. Source: RoFormer (Su et al., 2021), section 3.2.2. Computed in
    float64 and rounded once; executors multiply by the position in float32, as Meta's and Hugging
    Face's code do, so that far positions agree with them too.
    """
    return scaled_frequencies(config, np.arange(config.rotary_dim // 2)).astype(np.float32)


def attention_factor(config: DecoderConfig) -> float:
    """The number by which cosines and sines are multiplied (YaRN, LongRoPE)."""
    return float(getattr(config.rope_scaling, "attention_factor", 1.0))
