"""Qwen 2 and 3: biases of q, k and v, or an RMSNorm of every query and key head before RoPE.

Their configurations are in weights/architectures/qwen.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from glassllama.models.decoder import Block, Decoder, with_window
from glassllama.nn.attention import Attention, ForwardContext
from glassllama.nn.norm import RMSNorm

if TYPE_CHECKING:
    from glassllama.base.config import DecoderConfig
    from glassllama.weights.architectures.qwen import Qwen2Config, Qwen3Config


class NormedAttention(Attention):
    """Attention with an RMSNorm of every query and key head before RoPE."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def encode_positions(
        self, q: Tensor, k: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        return super().encode_positions(self.q_norm(q), self.k_norm(k), context)


class Qwen2(Decoder):
    """q, k and v have biases."""

    config: Qwen2Config

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config, lambda n: Block(config, Attention(config, n, bias=True)))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        return with_window(context, positions, self.config.window(layer))


class Qwen3(Decoder):
    """Queries and keys are normalized."""

    config: Qwen3Config

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config, lambda n: Block(config, NormedAttention(config, n)))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        return with_window(context, positions, self.config.window(layer))
