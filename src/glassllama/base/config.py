"""The configuration of a Llama, and the RoPE frequencies that follow from it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import ConfigError, quoted
from glassllama.base.fields import MAX_INTEGER, MAX_NUMBER, is_integer, is_number

RopeLayout = Literal["interleaved", "half"]
Floats = NDArray[np.float64]


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

    def divisors(self, frequencies: Floats) -> Floats:
        """The divisor of each frequency (radians per token): 1 … factor, same shape."""
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

    def divisors(self, frequencies: Floats) -> Floats:
        return np.full_like(frequencies, self.factor)


@dataclass(frozen=True, kw_only=True)
class GivenDivisors:
    """A divisor for each frequency: `rope_freqs.weight` in GGUF files of Llama 3.1."""

    values: tuple[float, ...]  # as many as there are frequencies

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v > 0 for v in self.values):
            raise ConfigError("rope_scaling: divisors must be finite and positive")

    def divisors(self, frequencies: Floats) -> Floats:
        return np.array(self.values)


RopeScaling = Llama3Scaling | LinearScaling | GivenDivisors


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The configuration of a Llama; sizes in elements.

    `rope_layout` says which coordinates of a head RoPE rotates as a pair: "interleaved" (0,1),
    (2,3), … in Meta and GGUF files, "half" (0, D/2), (1, D/2+1), … in Hugging Face files. The q and
    k rows of a file are never permuted to another layout. `qk_norm`: RMSNorm without weights of q
    and k after RoPE, as in Llama 4.
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
    qk_norm: bool = False
    architecture: ClassVar[str] = "llama"  # its name in weights/architectures
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
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even to be rotated, got {self.head_dim}")
        require_choice(self, "rope_layout", get_args(RopeLayout))
        require_finite_angles(self)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads


def kv_bytes(config: LlamaConfig, number: int, scale: int = 0) -> int:
    """Bytes of one token's keys and values in all layers: `number` per number, `scale` per head."""
    return 2 * config.n_layers * config.n_kv_heads * (config.head_dim * number + scale)


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


def require_finite_angles(config: LlamaConfig) -> None:
    """Raise ConfigError where an angle at the end of the context would not be finite in float32.

    `head_dim` has not yet been compared with the tensors of the file, so no array of that size is
    allocated: with a scaling rule, only the fastest and the slowest rotation are computed.
    """
    count, scaling = config.head_dim // 2, config.rope_scaling
    if isinstance(scaling, GivenDivisors):
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


def scaled_frequencies(config: LlamaConfig, pairs: NDArray[np.int64]) -> Floats:
    """Radians per token of the rotations with these numbers, float64, scaling applied."""
    frequencies = np.float64(config.rope_theta) ** -(2 * pairs / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    return frequencies / config.rope_scaling.divisors(frequencies)


def rope_frequencies(config: LlamaConfig) -> NDArray[np.float32]:
    """Radians per token of each of the D/2 rotations, (D/2,) float32, scaling applied.

    Source: RoFormer (Su et al., 2021), section 3.2.2. Computed in float64 and rounded once;
    executors multiply by the position in float32, as Meta's and Hugging Face's code do, so that
    far positions agree with them too.
    """
    return scaled_frequencies(config, np.arange(config.head_dim // 2)).astype(np.float32)
