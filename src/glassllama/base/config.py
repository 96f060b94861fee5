"""The shape of a Llama, and the rotation frequencies that follow from it.

Both executors (models/llama.py in torch, engine/ without it) build from this one class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import ConfigError

RopeLayout = Literal["pairs", "halves"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the context: slow rotations are divided, fast ones left alone.

    Source: The Llama 3 Herd of Models (2024); the rule itself is in Meta's `apply_scaling`.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.factor <= 0:
            raise ConfigError(f"rope_scaling: need 0 < low < high and factor > 0, got {self}")

    def divisors(self, frequencies: Floats) -> Floats:
        """By what each frequency (radians per token) is divided: 1 … factor, same shape."""
        turns = self.original_max_seq_len * frequencies / (2 * math.pi)  # in the old context
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)  # 1: fast enough to stay, 0: slowed by the whole factor
        return 1.0 / (share + (1.0 - share) / self.factor)


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every rotation is slowed by the same factor (Chen et al., 2023)."""

    factor: float

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ConfigError(f"rope_scaling: factor must be positive, got {self.factor}")

    def divisors(self, frequencies: Floats) -> Floats:
        return np.full_like(frequencies, self.factor)


@dataclass(frozen=True, kw_only=True)
class GivenDivisors:
    """Divisors written out one by one: GGUF carries Llama 3.1's scaling as `rope_freqs.weight`."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v > 0 for v in self.values):
            raise ConfigError("rope_scaling: divisors must be finite and positive")

    def divisors(self, frequencies: Floats) -> Floats:
        if len(self.values) != len(frequencies):
            raise ConfigError(
                f"rope_scaling: {len(self.values)} divisors for {len(frequencies)} frequencies"
            )
        return np.array(self.values)


RopeScaling = Llama3Scaling | LinearScaling | GivenDivisors


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that distinguishes one Llama from another; sizes in elements, theta a base.

    `rope_layout` says which coordinates of a head turn together: "pairs" (0,1), (2,3), … in Meta
    and GGUF files, "halves" (0, D/2), (1, D/2+1), … in Hugging Face files. It is data: the q and k
    rows of a file are never permuted. `qk_norm` is the weightless RMS norm of q and k after RoPE
    that Llama 4-style models add.
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
    rope_layout: RopeLayout = "halves"
    tie_embeddings: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        for field in (*sizes, "max_seq_len"):
            value = getattr(self, field)
            if type(value) is not int or value <= 0:
                raise ConfigError(f"{field} must be a positive whole number, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and "
                f"{self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even to be rotated, got {self.head_dim}")
        for field in ("norm_eps", "rope_theta"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field} must be positive and finite, got {value!r}")
        if self.rope_layout not in ("pairs", "halves"):
            raise ConfigError(f"rope_layout must be pairs or halves, got {self.rope_layout!r}")
        rope_frequencies(self)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads


def kv_bytes(config: LlamaConfig, number: int, scale: int = 0) -> int:
    """Memory of one token's keys and values in all layers: so many bytes a number, and a head."""
    return 2 * config.n_layers * config.n_kv_heads * (config.head_dim * number + scale)


def rope_frequencies(config: LlamaConfig) -> NDArray[np.float32]:
    """Radians per token of each of the D/2 rotations, (D/2,) float32, scaling applied.

    Source: RoFormer (Su et al., 2021), section 3.2.2. Computed in float64 and rounded once;
    executors multiply by the position in float32, as Meta's and Hugging Face's code do, so that
    far positions agree with them too.
    """
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = frequencies / config.rope_scaling.divisors(frequencies)
    return frequencies.astype(np.float32)
