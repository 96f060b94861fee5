"""Llama: embeddings, blocks of attention and feed-forward, logits.

Source: LLaMA (Touvron et al., 2023), Llama 2 (2023), The Llama 3 Herd of Models (2024). Its
configuration is base/config.py; to understand a forward pass read this file, nn/attention.py and
nn/rope.py.

Shapes: B batch, T new tokens, S visible tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glassllama.base.config import LlamaConfig, attention_factor, rope_frequencies
from glassllama.models.language_model import LanguageModel
from glassllama.nn.attention import Attention as GroupedAttention
from glassllama.nn.attention import ForwardContext, positions_and_mask
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.hooks import HookPoint
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.norm import RMSNorm, rms_norm
from glassllama.nn.rope import rope_angles, rope_table


class Attention(GroupedAttention):
    """Grouped-query attention; with `qk_norm`, RMSNorm without weights of q and k after RoPE."""

    config: LlamaConfig

    def encode_positions(
        self, q: Tensor, k: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        q, k = super().encode_positions(q, k, context)  # (B, H, T, D), (B, K, T, D)
        if self.config.qk_norm:
            return rms_norm(q, self.config.norm_eps), rms_norm(k, self.config.norm_eps)
        return q, k


class Block(nn.Module):
    """Pre-norm transformer block: x = x + attention(norm(x)); x = x + feed_forward(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.after_attention = HookPoint()
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = self.after_attention(x + self.attention(self.attention_norm(x), context))  # (B, T, C)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, T, C)


class Llama(LanguageModel):
    """Embeddings, blocks, norm, output matrix."""

    takes_embeddings = True
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        # Not a buffer: it must have data even while the weights are on the meta device.
        self.frequencies = torch.tensor(rope_frequencies(config).tolist(), device="cpu")

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
        angles = rope_angles(positions, self.frequencies.to(ids.device))  # (B, T, D/2)
        rope = rope_table(angles, attention_factor(self.config))

        x = self.tok_embeddings(ids) if embeddings is None else embeddings  # (B, T, C)
        context = ForwardContext(rope, mask, cache, new, prefix)
        for layer in self.layers:
            x = layer(x, context)  # (B, T, C)
        if cache is not None:
            cache.advance(new)
        return self.norm(x)  # (B, T, C)
