"""Gemma 1, 2 and 3: scaled embeddings, GELU, norms after the sublayers, soft caps, windows.

Our weights of norms are 1 + w of Hugging Face's files. The configurations are in
weights/architectures/gemma.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.models.decoder import Block, Decoder, frequencies_of, table_of, with_window
from glassllama.models.qwen import NormedAttention
from glassllama.nn.attention import Attention, ForwardContext, soft_cap
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.hooks import HookPoint
from glassllama.nn.norm import RMSNorm

if TYPE_CHECKING:
    from glassllama.weights.architectures.gemma import Gemma2Config, Gemma3Config, GemmaConfig

gelu = partial(F.gelu, approximate="tanh")


class GemmaBlock(Block):
    """Llama's block with GELU."""

    def __init__(self, config: GemmaConfig, layer: int) -> None:
        super().__init__(config, Attention(config, layer))
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, gelu)


class Gemma(Decoder):
    """Gemma 1."""

    config: GemmaConfig

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config, partial(GemmaBlock, config))

    def embed(self, ids: Tensor) -> Tensor:
        return self.tok_embeddings(ids) * self.config.embedding_multiplier  # (B, T, C)


class FourNormsBlock(nn.Module):
    """x = x + norm(attention(norm(x))); x = x + norm(feed_forward(norm(x)))."""

    def __init__(self, config: Gemma2Config, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = attention
        self.attention.scale, self.attention.cap = config.query_scale**-0.5, config.score_cap
        self.post_attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.after_attention = HookPoint()
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, gelu)
        self.post_ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        attended = self.attention(self.attention_norm(x), context)  # (B, T, C)
        x = self.after_attention(x + self.post_attention_norm(attended))  # (B, T, C)
        return x + self.post_ffn_norm(self.feed_forward(self.ffn_norm(x)))  # (B, T, C)


class Gemma2(Gemma):
    """Four norms in a block, soft caps of scores and logits, windows in some layers."""

    config: Gemma2Config

    def __init__(self, config: Gemma2Config) -> None:
        Decoder.__init__(self, config, lambda n: FourNormsBlock(config, Attention(config, n)))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        return with_window(context, positions, self.config.window(layer))

    def cap_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_cap
        return logits if cap is None else soft_cap(logits, cap)  # (…, V)


class Gemma3(Gemma2):
    """A norm of every query and key head; layers with a window have a RoPE of their own."""

    config: Gemma3Config

    def __init__(self, config: Gemma3Config) -> None:
        Decoder.__init__(self, config, lambda n: FourNormsBlock(config, NormedAttention(config, n)))
        self.local_frequencies = frequencies_of(config.local)

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        window = self.config.window(layer)
        if window is None:
            return context
        rope = table_of(self.config.local, self.local_frequencies, positions)
        return with_window(replace(context, rope=rope), positions, window)
