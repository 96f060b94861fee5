"""OLMo 2: norms after attention and feed-forward network, and one norm for all heads of q and of k.

Its configuration is in weights/architectures/olmo2.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from glassllama.models.decoder import Decoder
from glassllama.nn.attention import Attention, ForwardContext, join_heads, split_heads
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.hooks import HookPoint
from glassllama.nn.norm import RMSNorm

if TYPE_CHECKING:
    from glassllama.weights.architectures.olmo2 import Olmo2Config


class WideNormAttention(Attention):
    """Attention with one RMSNorm over all query heads, and one over all key heads."""

    def __init__(self, config: Olmo2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.n_heads * config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.n_kv_heads * config.head_dim, config.norm_eps)

    def encode_positions(
        self, q: Tensor, k: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        q = split_heads(self.q_norm(join_heads(q)), q.shape[1])  # (B, H, T, D)
        k = split_heads(self.k_norm(join_heads(k)), k.shape[1])  # (B, K, T, D)
        return super().encode_positions(q, k, context)


class PostNormBlock(nn.Module):
    """x = x + norm(attention(x)); x = x + norm(feed_forward(x))."""

    def __init__(self, config: Olmo2Config, layer: int) -> None:
        super().__init__()
        self.attention = WideNormAttention(config, layer)
        self.post_attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.after_attention = HookPoint()
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.post_ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        attended = self.post_attention_norm(self.attention(x, context))  # (B, T, C)
        x = self.after_attention(x + attended)  # (B, T, C)
        return x + self.post_ffn_norm(self.feed_forward(x))  # (B, T, C)


class Olmo2(Decoder):
    """A decoder of post-norm blocks."""

    config: Olmo2Config

    def __init__(self, config: Olmo2Config) -> None:
        super().__init__(config, lambda n: PostNormBlock(config, n))
