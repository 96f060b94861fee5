"""SmolLM3: a Llama without positional encoding in every fourth layer (NoPE).

Its configuration is in weights/architectures/smollm3.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from glassllama.models.decoder import Block, Decoder
from glassllama.nn.attention import Attention, ForwardContext

if TYPE_CHECKING:
    from glassllama.weights.architectures.smollm3 import SmolLM3Config


class SmolLM3(Decoder):
    """Some layers have no RoPE."""

    config: SmolLM3Config

    def __init__(self, config: SmolLM3Config) -> None:
        super().__init__(config, lambda n: Block(config, Attention(config, n)))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        return context if self.config.rope_layers[layer] else replace(context, rope=None)
