"""Mistral: a Llama with a sliding window.

Source: Mistral 7B (Jiang et al., 2023). Its configuration is in weights/architectures/mistral.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from glassllama.models.decoder import Block, Decoder, with_window
from glassllama.nn.attention import Attention, ForwardContext

if TYPE_CHECKING:
    from glassllama.weights.architectures.mistral import MistralConfig


class Mistral(Decoder):
    """Every layer has the window."""

    config: MistralConfig

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config, lambda n: Block(config, Attention(config, n)))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        return with_window(context, positions, self.config.window(layer))
