"""Layer plan: what every block of a model computes, as data.

The engine, the memory planner and the walkthrough read a plan instead of a configuration, so they
depend on operations and not on names of architectures. The default of each field is that of Llama;
other architectures set a few fields. A block computes the following, where N are the norms listed
in `BlockPlan.norms` (others are omitted), m the residual multiplier, F the feed-forward network:

    x = x + m · N_post_attention(attention(N_pre_attention(x)))
    x = x + m · N_post_ffn(F(N_pre_ffn(x)))

All norms are RMSNorm with a weight per channel. A plan does not describe formats: weights stored as
w for 1 + w, and fused or transposed matrices, are converted when a checkpoint is read.

Letters: C model width, H query heads, K KV heads, D head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from glassllama.base.config import (
    DecoderConfig,
    LlamaConfig,
    RopeLayout,
    attention_factor,
    require_choice,
    require_positive,
    require_sizes,
    rope_frequencies,
)
from glassllama.base.errors import ConfigError
from glassllama.base.fields import is_number

Norm = Literal["pre_attention", "post_attention", "pre_ffn", "post_ffn"]
# Norm of queries and keys. "per_head": RMSNorm of each head with a weight of D numbers;
# "full_width": RMSNorm of all heads together, H·D and K·D numbers; "unweighted": RMSNorm of each
# head without a weight.
QKNorm = Literal["none", "per_head", "full_width", "unweighted"]
Activation = Literal["silu", "gelu_tanh"]
Projection = Literal["q", "k", "v", "o"]

# A norm of a block -> the name of its parameters.
NORM_NAMES: dict[Norm, str] = {
    "pre_attention": "attention_norm",
    "post_attention": "post_attention_norm",
    "pre_ffn": "ffn_norm",
    "post_ffn": "post_ffn_norm",
}


@dataclass(frozen=True, kw_only=True)
class RopePlan:
    """Rotary positional encoding of a block's queries and keys.

    The first `rotary_dim` = 2 · len(frequencies) coordinates of each head are rotated, the others
    are left as they are. `layout` says which coordinates form a pair: "interleaved" (0, 1), (2, 3),
    …; "half" (0, R/2), (1, R/2 + 1), … with R the rotary width.
    """

    frequencies: tuple[float, ...]  # radians per position, scaling included
    layout: RopeLayout
    attention_factor: float = 1.0  # cos and sin are multiplied by it (YaRN, long-RoPE)

    def __post_init__(self) -> None:
        if not self.frequencies or not all(is_number(f) and f >= 0 for f in self.frequencies):
            raise ConfigError("rope: frequencies must be a non-empty list of finite numbers >= 0")
        require_choice(self, "layout", get_args(RopeLayout), "rope: ")
        require_positive(self, "attention_factor", part="rope: ")

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.frequencies)

    @property
    def base(self) -> float | None:
        """θ, to six digits, if the frequencies are c · θ^(-2i/R) with any c; None if not."""
        first, last, pairs = self.frequencies[0], self.frequencies[-1], len(self.frequencies)
        if pairs == 1 or not last:
            return None
        base = (first / last) ** (pairs / (pairs - 1))
        series = first * np.float64(base) ** -(np.arange(pairs) / pairs)
        if not np.allclose(series, self.frequencies, rtol=1e-5, atol=0):
            return None
        return float(f"{base:.6g}")


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Attention of a block: sizes, positions, mask and scores.

    scores = softcap(scale · f(p) · q·k), where softcap(s) = softcap · tanh(s / softcap), p is the
    position of the query and f(p) = 1 + temperature_scale · ln(1 + ⌊p / temperature_length⌋). The
    QK-norm is applied before RoPE, or after it if `qk_norm_after_rope`.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float  # usually 1/√D
    rope: RopePlan | None  # None: no positional encoding (NoPE)
    window: int | None = None  # tokens that a query sees, its own included; None: all before it
    softcap: float | None = None
    qk_norm: QKNorm = "none"
    qk_norm_after_rope: bool = False
    temperature_scale: float = 0.0
    temperature_length: int = 1
    biases: frozenset[Projection] = frozenset()  # the projections that add a bias

    def __post_init__(self) -> None:
        part = "attention: "
        require_sizes(self, "n_heads", "n_kv_heads", "head_dim", part=part)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"attention: n_heads must be a multiple of n_kv_heads, got {self.n_heads} and "
                f"{self.n_kv_heads}"
            )
        if self.rope is not None and self.rope.rotary_dim > self.head_dim:
            raise ConfigError(
                f"attention: {self.rope.rotary_dim} rotary dimensions in heads of {self.head_dim}"
            )
        require_positive(self, "scale", part=part)
        if self.window is not None:
            require_sizes(self, "window", part=part)
        if self.softcap is not None:
            require_positive(self, "softcap", part=part)
        if self.temperature_scale != 0:
            require_positive(self, "temperature_scale", part=part)
        require_sizes(self, "temperature_length", part=part)
        require_choice(self, "qk_norm", get_args(QKNorm), part)
        require_choice(self, "biases", get_args(Projection), part)

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def has_usual_scale(self) -> bool:
        """Whether the scale is 1/√D, in float32 or float64."""
        return math.isclose(self.scale, usual_scale(self.head_dim), rel_tol=1e-6)

    def kv_bytes(self, number: int, scale: int = 0) -> int:
        """Bytes of one token's keys and values: `number` for each number, `scale` for each head."""
        return 2 * self.n_kv_heads * (self.head_dim * number + scale)


@dataclass(frozen=True, kw_only=True)
class FeedForwardPlan:
    """Gated feed-forward network F: down(activation(gate(x)) · up(x))."""

    ffn_dim: int
    activation: Activation = "silu"
    bias: bool = False  # of gate, up and down

    def __post_init__(self) -> None:
        require_sizes(self, "ffn_dim", part="feed_forward: ")
        require_choice(self, "activation", get_args(Activation), "feed_forward: ")


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """One transformer block; the formula is at the top of this file."""

    attention: AttentionPlan
    feed_forward: FeedForwardPlan
    norms: frozenset[Norm] = frozenset({"pre_attention", "pre_ffn"})
    residual_multiplier: float = 1.0

    def __post_init__(self) -> None:
        require_choice(self, "norms", get_args(Norm))
        require_positive(self, "residual_multiplier")

    def matrices(self, dim: int) -> dict[str, tuple[int, int]]:
        """Names of the block's matrices, in the order of use -> (rows, columns)."""
        a, ffn_dim = self.attention, self.feed_forward.ffn_dim
        queries, keys = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        return {
            "attention.wq": (queries, dim),
            "attention.wk": (keys, dim),
            "attention.wv": (keys, dim),
            "attention.wo": (dim, queries),
            "feed_forward.gate": (ffn_dim, dim),
            "feed_forward.up": (ffn_dim, dim),
            "feed_forward.down": (dim, ffn_dim),
        }

    def norm_names(self) -> list[str]:
        """Names of the block's norms, in the order of use."""
        return [name for norm, name in NORM_NAMES.items() if norm in self.norms]


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Everything that the engine needs besides the packed weights.

    x = embedding_multiplier · embeddings; after the blocks and the last norm,
    logits = softcap(logit_multiplier · output(norm(x))), softcap as in `AttentionPlan`.
    """

    dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    blocks: tuple[BlockPlan, ...]
    tie_embeddings: bool  # the output matrix is the embeddings
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        require_sizes(self, "dim", "vocab_size", "max_seq_len")
        require_positive(self, "norm_eps", "embedding_multiplier", "logit_multiplier")
        if self.logit_softcap is not None:
            require_positive(self, "logit_softcap")
        if not self.blocks:
            raise ConfigError("blocks: a model has at least one")

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def windows(self) -> list[int]:
        """The sliding window of each block; 0 for none, also if it is as long as the context."""
        windows = (block.attention.window or 0 for block in self.blocks)
        return [window if window < self.max_seq_len else 0 for window in windows]

    def kv_bytes(self, number: int, scale: int = 0, tokens: int = 1) -> int:
        """Bytes of the keys and values of a text in all blocks, as in `AttentionPlan.kv_bytes`.

        Blocks with a window keep only those of its last tokens.
        """
        return sum(
            min(tokens, window or tokens) * block.attention.kv_bytes(number, scale)
            for window, block in zip(self.windows(), self.blocks, strict=True)
        )

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Parameter names of all matrices -> (rows, columns), in the order of use.

        Embeddings come first; tied ones last, because they are the output matrix, too.
        """
        table = (self.vocab_size, self.dim)
        embeddings, output = {"tok_embeddings.weight": table}, {"output.weight": table}
        layers = {
            f"layers.{n}.{name}.weight": shape
            for n, block in enumerate(self.blocks)
            for name, shape in block.matrices(self.dim).items()
        }
        return layers | embeddings if self.tie_embeddings else embeddings | layers | output

    def norms(self) -> list[str]:
        """Parameter names of all norms of the residual stream, in the order of use."""
        layers = [
            f"layers.{n}.{name}.weight"
            for n, block in enumerate(self.blocks)
            for name in block.norm_names()
        ]
        return [*layers, "norm.weight"]


def usual_scale(head_dim: int) -> float:
    """1/√D, computed in float32."""
    return float(np.float32(1) / np.sqrt(np.float32(head_dim)))


def rope_plan(config: DecoderConfig) -> RopePlan:
    """The RoPE of a configuration."""
    return RopePlan(
        frequencies=tuple(rope_frequencies(config).tolist()),
        layout=config.rope_layout,
        attention_factor=attention_factor(config),
    )


def attention_plan(config: DecoderConfig, **changes: Any) -> AttentionPlan:
    """The attention of a Llama with these sizes, with changes to its fields."""
    plan: dict[str, Any] = {
        "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "scale": usual_scale(config.head_dim),
    }  # fmt: skip
    if "rope" not in changes:
        plan["rope"] = rope_plan(config)
    return AttentionPlan(**plan | changes)


def decoder_plan(
    config: DecoderConfig, attention: Sequence[AttentionPlan], *,
    activation: Activation = "silu", norms: Collection[Norm] = ("pre_attention", "pre_ffn"),
    residual_multiplier: float = 1.0, **model: Any,
) -> ModelPlan:  # fmt: skip
    """A model of blocks that differ in their attention only; `model` are fields of ModelPlan."""
    feed_forward = FeedForwardPlan(ffn_dim=config.ffn_dim, activation=activation)
    blocks = (
        BlockPlan(
            attention=one, feed_forward=feed_forward, norms=frozenset(norms),
            residual_multiplier=residual_multiplier,
        )
        for one in attention
    )  # fmt: skip
    return ModelPlan(
        dim=config.dim, vocab_size=config.vocab_size, max_seq_len=config.max_seq_len,
        norm_eps=config.norm_eps, blocks=tuple(blocks), tie_embeddings=config.tie_embeddings,
        **model,
    )  # fmt: skip


def llama_plan(config: LlamaConfig) -> ModelPlan:
    """The plan of a Llama, whose blocks are all the same."""
    qk_norm: QKNorm = "unweighted" if config.qk_norm else "none"
    attention = attention_plan(config, qk_norm=qk_norm, qk_norm_after_rope=True)
    return decoder_plan(config, [attention] * config.n_layers)
