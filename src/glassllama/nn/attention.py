"""Grouped-query attention with RoPE and a KV cache.

Source: Attention Is All You Need (Vaswani et al., 2017), section 3.2; grouped queries: GQA (Ainslie
et al., 2023). There are two implementations, the explicit formula and PyTorch's fused kernel; a
test compares them. The model uses the formula if its scores or weights have a hook.

Shapes: B batch, T new tokens, S visible tokens, C model width, H query heads, K KV heads, D head
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.base.config import DecoderConfig
from glassllama.nn.hooks import HookPoint
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.rope import RopeTable, rotate_part


@dataclass(frozen=True)
class ForwardContext:
    """Values that all blocks share in one forward pass."""

    rope: RopeTable | None  # None: no positional encoding
    mask: Tensor | None  # (B or 1, 1, T, S), True if visible; None: causal, without past tokens
    cache: KVCache | None
    new: Sequence[int]  # real new tokens per row; the rest of T is padding on the right
    prefix: bool = False  # whether the new tokens all see each other, whatever the window


def causal_mask(positions: Tensor, visible: int) -> Tensor:
    """(B, T) positions, S -> (B, 1, T, S), True where s ≤ position: later tokens are hidden."""
    return torch.arange(visible, device=positions.device) <= positions[:, None, :, None]


def same_segment(segments: Tensor) -> Tensor:
    """True where two tokens are in the same packed document: (B, T) numbers -> (B, 1, T, T)."""
    return (segments[:, :, None] == segments[:, None, :]).unsqueeze(1)


def positions_in_segments(segments: Tensor) -> Tensor:
    """Positions that restart at 0 in each packed document: (B, T) document numbers -> (B, T)."""
    where = torch.arange(segments.shape[1], device=segments.device)  # (T,)
    begins = segments != segments.roll(1, dims=1)  # (B, T); the first column wraps around
    begins[:, 0] = True
    return where - (where * begins).cummax(dim=1).values  # (B, T)


def positions_and_mask(
    ids: Tensor, cache: KVCache | None, new: Sequence[int], segments: Tensor | None,
    prefix: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Positions of the new tokens, (B, T), and the mask as in `ForwardContext`.

    `new` are the numbers of real tokens per row, for which the cache reserves memory. With `prefix`
    the new tokens are the beginning of the text and all see each other. Raises GenerationError if
    the cache is full.
    """
    if segments is not None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)  # (B, T)
        mask = causal_mask(positions, ids.shape[1]) & same_segment(segments)  # (B, 1, T, T)
        return positions_in_segments(segments), mask
    past = [0] * ids.shape[0] if cache is None else cache.lengths
    visible = ids.shape[1] if cache is None else cache.reserve(new)
    offsets = torch.tensor(past, device=ids.device)[:, None]  # (B, 1)
    positions = offsets + torch.arange(ids.shape[1], device=ids.device)  # (B, T)
    if prefix:
        ends = torch.tensor(new, device=ids.device)[:, None, None, None]
        visible_to_all = torch.arange(visible, device=ids.device) < ends  # (B, 1, 1, S)
        return positions, visible_to_all.expand(-1, 1, ids.shape[1], -1)  # (B, 1, T, S)
    return positions, causal_mask(positions, visible) if any(past) else None  # (B, 1, T, S)


def split_heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)  # (B, T, n·D) -> (B, n, T, D)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H·D)


def window_mask(positions: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """The mask of a sliding window: (B, T) positions, mask as in ForwardContext -> (B, 1, T, S).

    A query sees itself and the `window` - 1 tokens before it. In packed rows positions restart, but
    so do the visible tokens: there a token's place in the row is the last one that it sees.
    """
    if mask is None:
        mask = causal_mask(positions, positions.shape[1])
    where = torch.arange(mask.shape[-1], device=mask.device)  # (S,)
    last = (mask * where).amax(-1, keepdim=True)  # (B, 1, T, 1), the query itself
    return mask & (where > last - window)


def attention_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """q·k·scale for every pair of positions, float32; query head h uses KV head h // (H/K).

    The usual scale is 1/√D.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, K, S, D) -> (B, H, S, D)
    scaled = q.float() / math.sqrt(q.shape[-1]) if scale is None else q.float() * scale
    return scaled @ k.float().mT  # (B, H, T, S)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): as x near zero, never beyond ± cap (Gemma 2, 2024, section 2)."""
    return torch.tanh(x / cap) * cap


def attention_weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the visible positions: each row of (B, H, T, S) sums to one."""
    # One addition of -∞ for all heads takes a fifth of the time of masked_fill on the scores.
    hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    return (scores + hidden).softmax(-1)  # (B, H, T, S)


def weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted sum of values: (B, H, T, S), (B, K, S, D) -> (B, H, T, D), in v's dtype."""
    v = v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)  # (B, H, S, D)
    return (weights @ v.float()).type_as(v)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """The same three steps in one kernel; no mask means causal, with T = S. -> (B, H, T, D)."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=scale
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: HookPoint, weights: HookPoint,
    *, scale: float | None = None, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """The fused kernel, or the formula. -> (B, H, T, D).

    The formula is used if `scores` or `weights` has a hook, or if the scores have a soft cap.
    """
    if not (scores.is_hooked or weights.is_hooked or cap):
        return fused_attention(q, k, v, mask, scale)
    if mask is None:
        mask = causal_mask(torch.arange(q.shape[2], device=q.device)[None], k.shape[2])
    found = attention_scores(q, k, scale)
    found = soft_cap(found, cap) if cap else found
    return weighted_sum(weights(attention_weights(scores(found), mask)), v)


class Attention(nn.Module):
    """Project to heads, apply RoPE, attend, project back. Families change single steps of it."""

    def __init__(self, config: DecoderConfig, layer: int, *, bias: bool = False) -> None:
        """`bias`: q, k and v have biases."""
        super().__init__()
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.config, self.layer, self.rope_layout = config, layer, config.rope_layout
        self.scale: float | None = None  # of the scores, if not 1/√D
        self.cap: float | None = None  # soft cap of the scores
        self.wq = nn.Linear(config.dim, queries, bias=bias)
        self.wk = nn.Linear(config.dim, keys, bias=bias)
        self.wv = nn.Linear(config.dim, keys, bias=bias)
        self.wo = nn.Linear(queries, config.dim, bias=False)
        self.q, self.k, self.v = HookPoint(), HookPoint(), HookPoint()  # per head, before RoPE
        self.q_rope, self.k_rope = HookPoint(), HookPoint()  # after RoPE and QK-norm
        self.scores, self.weights, self.heads = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        q = self.q(split_heads(self.wq(x), self.config.n_heads))  # (B, H, T, D)
        k = self.k(split_heads(self.wk(x), self.config.n_kv_heads))  # (B, K, T, D)
        v = self.v(split_heads(self.wv(x), self.config.n_kv_heads))  # (B, K, T, D)
        q, k = self.encode_positions(q, k, context)
        q, k = self.q_rope(q), self.k_rope(k)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v, context.new)  # (B, K, S, D)
        heads = self.heads(self.attend(q, k, v, context.mask))  # (B, H, T, D)
        return self.wo(join_heads(heads))  # (B, T, C)

    def encode_positions(
        self, q: Tensor, k: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """Apply RoPE to queries and keys. (B, H, T, D), (B, K, T, D) -> same."""
        rope, layout = context.rope, self.rope_layout
        if rope is None:
            return q, k
        q, k = rotate_part(q, rope, layout), rotate_part(k, rope, layout)
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(
            q, k, v, mask, self.scores, self.weights, scale=self.scale, cap=self.cap
        )  # (B, H, T, D)
