"""Phi-3: a Llama whose heads are rotated in part, with LongRoPE and a window.

Files store q, k and v as one matrix, and gate and up as one. The configuration is in
weights/architectures/phi3.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from glassllama.models.decoder import Block, Decoder, with_window
from glassllama.nn.attention import Attention, ForwardContext

if TYPE_CHECKING:
    from glassllama.weights.architectures.phi3 import Phi3Config


class Phi3(Decoder):
    """The RoPE table has fewer angles than a head has pairs."""

    config: Phi3Config

    def __init__(self, config: Phi3Config) -> None:
        super().__init__(config, lambda n: Block(config, Attention(config, n)))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        return with_window(context, positions, self.config.window(layer))
