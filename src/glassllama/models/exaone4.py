"""EXAONE 4.0: norms after attention and feed-forward network, and of every query and key head.

In the large model three of four layers have a sliding window and RoPE; every fourth sees the whole
text and has no positional encoding. In the small one all layers have RoPE and no window. Its
configuration is in weights/architectures/exaone4.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from glassllama.models.decoder import Decoder, with_window
from glassllama.nn.attention import Attention, ForwardContext
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.hooks import HookPoint
from glassllama.nn.norm import RMSNorm

if TYPE_CHECKING:
    from glassllama.weights.architectures.exaone4 import Exaone4Config


class Exaone4Attention(Attention):
    """Attention with an RMSNorm of every query and key head before RoPE."""

    def __init__(self, config: Exaone4Config, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def encode_positions(
        self, q: Tensor, k: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        return super().encode_positions(self.q_norm(q), self.k_norm(k), context)


class Exaone4Block(nn.Module):
    """x = x + norm(attention(x)); x = x + norm(feed_forward(x))."""

    def __init__(self, config: Exaone4Config, layer: int) -> None:
        super().__init__()
        self.attention = Exaone4Attention(config, layer)
        self.post_attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.after_attention = HookPoint()
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.post_ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        attended = self.post_attention_norm(self.attention(x, context))  # (B, T, C)
        x = self.after_attention(x + attended)  # (B, T, C)
        return x + self.post_ffn_norm(self.feed_forward(x))  # (B, T, C)


class Exaone4(Decoder):
    """A decoder of these blocks; layers with and without a window."""

    config: Exaone4Config

    def __init__(self, config: Exaone4Config) -> None:
        super().__init__(config, lambda n: Exaone4Block(config, n))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        if not self.config.has_rope(layer):
            context = replace(context, rope=None)
        return with_window(context, positions, self.config.window(layer))
