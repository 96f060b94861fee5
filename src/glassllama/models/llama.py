"""Llama: embeddings, blocks of attention and feed-forward, logits.

Source: LLaMA (Touvron et al., 2023), Llama 2 (2023), The Llama 3 Herd of Models (2024). Its
configuration is base/config.py; to understand a forward pass read this file, nn/attention.py and
nn/rope.py.

Shapes: B batch, T new tokens, S visible tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.base.config import LlamaConfig, rope_frequencies
from glassllama.nn.attention import (
    Attention,
    ForwardContext,
    causal_mask,
    positions_in_segments,
    same_segment,
)
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.hooks import HookPoint
from glassllama.nn.init import initialize
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.norm import RMSNorm
from glassllama.nn.rope import rope_angles, rope_table


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


class Llama(nn.Module):
    """Ids to logits. It holds weights only; past tokens are in the cache, an argument."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.last_logits = HookPoint()
        # Not a buffer: it must have data even while the weights are on the meta device.
        self.frequencies = torch.tensor(rope_frequencies(config).tolist(), device="cpu")

    def initialize(self, generator: torch.Generator) -> None:
        """Fill with small random weights (nn/init.py), the same for the same generator."""
        initialize(self, generator, self.config.n_layers)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache on the weights' device, in their dtype."""
        c, weight = self.config, self.tok_embeddings.weight
        return KVCache(
            n_layers=c.n_layers,
            batch=batch,
            n_kv_heads=c.n_kv_heads,
            max_len=max_len,
            head_dim=c.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, C), the hidden states after the last norm.

        With a cache the ids follow the tokens in it, and are added to it. `lengths` are the numbers
        of real ids if rows are padded on the right; outputs of padding have no meaning. `segments`
        (B, T) numbers the documents of packed rows (without a cache): a token sees its own document
        only. Raises GenerationError if the cache is full.
        """
        batch, count = ids.shape
        new = [count] * batch if lengths is None else lengths
        past = [0] * batch if cache is None else cache.lengths
        offsets = torch.tensor(past, device=ids.device)[:, None]  # (B, 1)
        positions = offsets + torch.arange(count, device=ids.device)  # (B, T)
        visible = count if cache is None else cache.reserve(new)
        mask = causal_mask(positions, visible) if any(past) else None  # (B, 1, T, S)
        if segments is not None:
            mask = causal_mask(positions, count) & same_segment(segments)  # (B, 1, T, T)
            positions = positions_in_segments(segments)  # (B, T)
        rope = rope_table(rope_angles(positions, self.frequencies.to(ids.device)))

        x = self.tok_embeddings(ids)  # (B, T, C)
        context = ForwardContext(rope, mask, cache, new)
        for layer in self.layers:
            x = layer(x, context)  # (B, T, C)
        if cache is not None:
            cache.advance(new)
        return self.norm(x)  # (B, T, C)

    def logits(self, h: Tensor) -> Tensor:
        """(…, C) -> (…, V) float32: the logits of the next token."""
        if self.config.tie_embeddings:
            logits = F.linear(h, self.tok_embeddings.weight)
        else:
            logits = self.output(h)
        return self.last_logits(logits.float())  # (…, V)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; arguments as in `hidden`."""
        return self.logits(self.hidden(ids, cache, lengths=lengths, segments=segments))
