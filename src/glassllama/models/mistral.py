"""Mistral: a Llama with a sliding window. Ministral 3: its queries grow with the position.

Source: Mistral 7B (Jiang et al., 2023). Its configuration is in weights/architectures/mistral.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glassllama.models.decoder import Block, Decoder, with_window
from glassllama.nn.attention import Attention, ForwardContext

if TYPE_CHECKING:
    from glassllama.weights.architectures.mistral import MistralConfig


@dataclass(frozen=True, kw_only=True)
class MistralContext(ForwardContext):
    query_factors: Tensor  # (B, 1, T, 1), of each position


class MistralAttention(Attention):
    """Queries are multiplied by a factor of their position, after RoPE."""

    def encode_positions(
        self, q: Tensor, k: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        q, k = super().encode_positions(q, k, context)
        assert isinstance(context, MistralContext)
        return q * context.query_factors, k  # (B, H, T, D), (B, K, T, D)


class Mistral(Decoder):
    """Layers may have a window."""

    config: MistralConfig

    def __init__(self, config: MistralConfig) -> None:
        attention = MistralAttention if config.temperature_scale else Attention
        super().__init__(config, lambda n: Block(config, attention(config, n)))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        context = with_window(context, positions, self.config.window(layer))
        if not self.config.temperature_scale:
            return context
        factors = query_factors(self.config, positions)
        return MistralContext(**vars(context), query_factors=factors)


def query_factors(config: MistralConfig, positions: Tensor) -> Tensor:
    """1 + s·ln(1 + ⌊p / N⌋) for positions p (B, T) and the original context N: (B, 1, T, 1)."""
    parts = positions[:, None, :, None] // config.original_max_seq_len
    return 1 + config.temperature_scale * torch.log(1.0 + parts)
