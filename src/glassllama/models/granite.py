"""Granite 3: a Llama with multipliers of embeddings, residuals, scores and logits.

Its configuration is in weights/architectures/granite.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from glassllama.models.decoder import Block, Decoder
from glassllama.nn.attention import Attention, ForwardContext

if TYPE_CHECKING:
    from glassllama.weights.architectures.granite import GraniteConfig


class GraniteBlock(Block):
    """x = x + m · attention(norm(x)); x = x + m · feed_forward(norm(x))."""

    def __init__(self, config: GraniteConfig, layer: int) -> None:
        super().__init__(config, Attention(config, layer))
        self.attention.scale = config.score_scale
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        attended = self.attention(self.attention_norm(x), context)  # (B, T, C)
        x = self.after_attention(x + self.multiplier * attended)  # (B, T, C)
        return x + self.multiplier * self.feed_forward(self.ffn_norm(x))  # (B, T, C)


class Granite(Decoder):
    """The logits are divided by a number of the configuration."""

    config: GraniteConfig

    def __init__(self, config: GraniteConfig) -> None:
        super().__init__(config, lambda n: GraniteBlock(config, n))

    def embed(self, ids: Tensor) -> Tensor:
        return self.tok_embeddings(ids) * self.config.embedding_multiplier  # (B, T, C)

    def cap_logits(self, logits: Tensor) -> Tensor:
        return logits / self.config.logit_divisor  # (…, V)
