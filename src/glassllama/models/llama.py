"""Llama, whole: embeddings, layers of attention and feed-forward, logits.

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
    Step,
    causal_mask,
    positions_in_segments,
    same_segment,
)
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.hooks import Watch
from glassllama.nn.init import initialise
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.norm import RMSNorm
from glassllama.nn.rope import rope_angles, rotation


class Layer(nn.Module):
    """Two additions to the residual stream: what was seen, and what follows from it."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.after_attention = Watch()
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = self.after_attention(x + self.attention(self.attention_norm(x), step))  # (B, T, C)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, T, C)


class Llama(nn.Module):
    """Ids to logits. Holds weights and nothing else: what was said before is in the cache."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.last_logits = Watch()
        # No buffer: it must hold numbers even while the weights are still on the meta device.
        self.frequencies = torch.tensor(rope_frequencies(config).tolist(), device="cpu")

    def initialise(self, generator: torch.Generator) -> None:
        """Begin anew with small random weights (nn/init.py), the same for the same generator."""
        initialise(self, generator, self.config.n_layers)

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
        """(B, T) ids -> (B, T, C), what the layers make of them, after the last norm.

        With a cache the ids follow what it holds, and are added to it. `lengths` are the real ids
        per row where rows are padded on the right; what comes out beyond them means nothing.
        `segments` (B, T) numbers the documents of packed rows (without a cache): a token sees its
        own document only. Raises GenerationError where the cache has no room.
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
        turn = rotation(rope_angles(positions, self.frequencies.to(ids.device)))

        x = self.tok_embeddings(ids)  # (B, T, C)
        step = Step(turn, mask, cache, new)
        for layer in self.layers:
            x = layer(x, step)  # (B, T, C)
        if cache is not None:
            cache.advance(new)
        return self.norm(x)  # (B, T, C)

    def logits(self, h: Tensor) -> Tensor:
        """(…, C) -> (…, V) float32: how well each token of the vocabulary would follow."""
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
