"""What the decoders beside Llama share: embeddings, a loop over blocks, the last norm, logits.

The file of a family (qwen.py, gemma.py, …) has what is its own: a step of attention, the order of
the norms, or what a layer is given (`context_of`). Read llama.py first.

Shapes: B batch, T new tokens, S visible tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from glassllama.base.config import DecoderConfig, attention_factor, rope_frequencies
from glassllama.models.language_model import LanguageModel
from glassllama.nn.attention import Attention, ForwardContext, positions_and_mask, window_mask
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.hooks import HookPoint
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.norm import RMSNorm
from glassllama.nn.rope import RopeTable, rope_angles, rope_table


class Block(nn.Module):
    """Pre-norm transformer block: x = x + attention(norm(x)); x = x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = attention
        self.after_attention = HookPoint()
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = self.after_attention(x + self.attention(self.attention_norm(x), context))  # (B, T, C)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, T, C)


class Decoder(LanguageModel):
    """Embeddings, blocks, norm, output matrix."""

    takes_embeddings = True
    config: DecoderConfig

    def __init__(self, config: DecoderConfig, block: Callable[[int], nn.Module]) -> None:
        """`block` makes the block of a layer."""
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.embeddings = HookPoint()  # the input of the first layer
        self.layers = nn.ModuleList(block(n) for n in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.frequencies = frequencies_of(config)

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        """What a layer is given: RoPE and mask. Here the same for all."""
        return context

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
        embeddings: Tensor | None = None,
        prefix: bool = False,
    ) -> Tensor:
        """(B, T) ids -> (B, T, C); see LanguageModel.hidden.

        `embeddings` (B, T, C) are used instead of those of the ids, such as rows of images. With
        `prefix` the new tokens are the beginning of their texts and all see each other: PaliGemma
        (Beyer et al., 2024), section 3.1.
        """
        new = [ids.shape[1]] * ids.shape[0] if lengths is None else lengths
        positions, mask = positions_and_mask(ids, cache, new, segments, prefix)  # (B, T), mask
        rope = table_of(self.config, self.frequencies, positions)
        context = ForwardContext(rope, mask, cache, new, prefix)
        x = self.embeddings(self.embed(ids) if embeddings is None else embeddings)  # (B, T, C)
        for n, layer in enumerate(self.layers):
            x = layer(x, self.context_of(n, context, positions))  # (B, T, C)
        if cache is not None:
            cache.advance(new)
        return self.norm(x)  # (B, T, C)


def frequencies_of(config: DecoderConfig) -> Tensor:
    """(R/2,) radians per position. No buffer: it has data while weights are on the meta device."""
    return torch.tensor(rope_frequencies(config).tolist(), device="cpu")


def table_of(config: DecoderConfig, frequencies: Tensor, positions: Tensor) -> RopeTable:
    """Cosines and sines at (B, T) positions: (B, 1, T, R/2)."""
    angles = rope_angles(positions, frequencies.to(positions.device))  # (B, T, R/2)
    return rope_table(angles, attention_factor(config))


def with_window(context: ForwardContext, positions: Tensor, window: int | None) -> ForwardContext:
    """The context of a layer with a sliding window of so many tokens; None: no window.

    The tokens of a prefix see each other, however long it is.
    """
    if window is None or context.prefix:
        return context
    return replace(context, mask=window_mask(positions, context.mask, window))
