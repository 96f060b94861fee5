"""The variants between a GPT and a Llama: each class changes one thing of the class before it.

They are built from the parts of nn/, without a KV cache, because they are only trained. Tests prove
that, with the same weights, the first variant computes the same as models/gpt.py and the last ones
the same as models/llama.py.

Shapes: B batch, T tokens, C model width, H query heads, K kv heads, D head width, F ffn width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.nn.attention import (
    causal_mask,
    fused_attention,
    join_heads,
    positions_in_segments,
    same_segment,
    split_heads,
)
from glassllama.nn.feed_forward import FeedForward as SwiGLU
from glassllama.nn.init import initialize
from glassllama.nn.norm import RMSNorm, rms_norm
from glassllama.nn.rope import RopeTable, rope_angles, rope_table, rotate_half


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a variant. A GPT has as many kv heads as query heads."""

    vocab_size: int
    max_seq_len: int
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    ffn_dim: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def frequencies(self) -> Tensor:
        """Radians per token of each rotation, (D/2,): RoFormer (Su et al., 2021), section 3.2.2."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        return (self.rope_theta**-exponents).float()


class ForwardContext(NamedTuple):
    """What all blocks share in one forward pass."""

    rope: RopeTable
    mask: Tensor | None  # (B, 1, T, T), True where visible; None: causal


# --- the parts that are replaced -----------------------------------------------------------


def layer_norm(dim: int, eps: float) -> nn.Module:
    """A GPT's norm: subtract the mean, divide by the deviation."""
    return nn.LayerNorm(dim, eps, bias=False)


class GELU(nn.Module):
    """A GPT's feed-forward part: down(gelu(up(x)))."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # (B, T, C)


class Attention(nn.Module):
    """A GPT's attention: positions were already added to the embeddings."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, keys = sizes, sizes.n_kv_heads * sizes.head_dim
        self.wq = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.wk = nn.Linear(sizes.dim, keys, bias=False)
        self.wv = nn.Linear(sizes.dim, keys, bias=False)
        self.wo = nn.Linear(sizes.dim, sizes.dim, bias=False)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        q = split_heads(self.wq(x), self.sizes.n_heads)  # (B, H, T, D)
        k = split_heads(self.wk(x), self.sizes.n_kv_heads)  # (B, K, T, D)
        v = split_heads(self.wv(x), self.sizes.n_kv_heads)  # (B, K, T, D)
        q, k = self.apply_rope(q, context.rope), self.apply_rope(k, context.rope)
        return self.wo(join_heads(fused_attention(q, k, v, context.mask)))  # (B, T, C)

    def apply_rope(self, x: Tensor, rope: RopeTable) -> Tensor:
        return x


class RoPEAttention(Attention):
    """With RoPE of queries and keys."""

    def apply_rope(self, x: Tensor, rope: RopeTable) -> Tensor:
        return rotate_half(x, rope)


class QKNormAttention(RoPEAttention):
    """With QK-norm after RoPE: scores depend only on the directions of queries and keys."""

    def apply_rope(self, x: Tensor, rope: RopeTable) -> Tensor:
        return rms_norm(super().apply_rope(x, rope), self.sizes.norm_eps)


# --- the variants ---------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block, made of the variant's parts."""

    def __init__(self, variant: GPT, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = variant.Norm(sizes.dim, sizes.norm_eps)
        self.attention = variant.Attention(sizes)
        self.ffn_norm = variant.Norm(sizes.dim, sizes.norm_eps)
        self.feed_forward = variant.FeedForward(sizes.dim, sizes.ffn_dim)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = x + self.attention(self.attention_norm(x), context)  # (B, T, C)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, T, C)


class GPT(nn.Module):
    """Learned positions, LayerNorm, GELU, one key/value head per query head: models/gpt.py."""

    Norm: Callable[[int, float], nn.Module] = staticmethod(layer_norm)
    Attention: type[Attention] = Attention
    FeedForward: type[nn.Module] = GELU

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.config = sizes
        self.tok_embeddings = nn.Embedding(sizes.vocab_size, sizes.dim)
        self.pos_embeddings = nn.Embedding(sizes.max_seq_len, sizes.dim)
        self.layers = nn.ModuleList(Block(self, sizes) for _ in range(sizes.n_layers))
        self.norm = self.Norm(sizes.dim, sizes.norm_eps)

    def initialize(self, generator: torch.Generator) -> None:
        initialize(self, generator, self.config.n_layers)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embeddings(ids) + self.pos_embeddings(positions)  # (B, T, C)

    def hidden(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C); `segments` as in models/llama.py."""
        positions = torch.arange(ids.shape[1])[None]  # (1, T)
        mask = None
        if segments is not None:
            mask = causal_mask(positions, ids.shape[1]) & same_segment(segments)  # (B, 1, T, T)
            positions = positions_in_segments(segments)  # (B, T)
        context = ForwardContext(rope_table(rope_angles(positions, self.config.frequencies)), mask)
        x = self.embed(ids, positions)
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)

    def logits(self, h: Tensor) -> Tensor:
        """(…, C) -> (…, V), with tied embeddings."""
        return F.linear(h, self.tok_embeddings.weight).float()


class WithRMSNorm(GPT):
    """RMSNorm instead of LayerNorm: no mean is subtracted."""

    Norm = RMSNorm


class WithRoPE(WithRMSNorm):
    """RoPE instead of a table of positions."""

    Attention = RoPEAttention

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        del self.pos_embeddings

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embeddings(ids)  # (B, T, C)


class WithSwiGLU(WithRoPE):
    """SwiGLU instead of GELU. With fewer kv heads this is a Llama."""

    FeedForward = SwiGLU


class WithQKNorm(WithSwiGLU):
    """QK-norm: the Llama of the preset llama-qknorm-tinyshakespeare-cpu."""

    Attention = QKNormAttention
