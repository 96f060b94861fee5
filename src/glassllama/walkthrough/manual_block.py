"""A layer unrolled: each line calls a function of `nn/` on weights read from the file.

models/llama.py and nn/attention.py say the same with modules. The walkthrough compares every field
with what the running model had at that place.

Shapes: B batch, T tokens, S visible tokens, C model width, H query heads, K kv heads, D head width,
F ffn width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.base.config import LlamaConfig
from glassllama.nn.attention import (
    attention_scores,
    attention_weights,
    causal_mask,
    fused_attention,
    join_heads,
    split_heads,
    weighted_sum,
)
from glassllama.nn.norm import rms_norm
from glassllama.nn.rope import ROTATE, RopeTable

Weights = Callable[[str], Tensor]  # "attention.wq" -> the layer's matrix (out, in)


@dataclass(frozen=True, kw_only=True)
class LayerByHand:
    """Everything that one layer computes; `output` is the residual stream behind it."""

    attention_norm: Tensor  # (B, T, C)
    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, K, T, D)
    v: Tensor  # (B, K, T, D)
    q_rope: Tensor
    k_rope: Tensor
    scores: Tensor  # (B, H, T, S)
    weights: Tensor  # (B, H, T, S)
    heads: Tensor  # (B, H, T, D)
    wo: Tensor  # (B, T, C)
    after_attention: Tensor  # (B, T, C)
    ffn_norm: Tensor  # (B, T, C)
    gate: Tensor  # (B, T, F)
    up: Tensor  # (B, T, F)
    gated: Tensor  # (B, T, F)
    down: Tensor  # (B, T, C)
    output: Tensor  # (B, T, C)


# Field -> where the running model shows the same numbers, below `layers.N.`; `output` is the layer.
PLACES = {
    "attention_norm": "attention_norm",
    **{name: f"attention.{name}" for name in ("q", "k", "v", "q_rope", "k_rope")},
    **{name: f"attention.{name}" for name in ("scores", "weights", "heads", "wo")},
    "after_attention": "after_attention",
    "ffn_norm": "ffn_norm",
    **{name: f"feed_forward.{name}" for name in ("gate", "up", "gated", "down")},
}


def layer_by_hand(
    weight: Weights,
    x: Tensor,
    rope: RopeTable,
    config: LlamaConfig,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    formula: bool = True,
) -> LayerByHand:
    """One layer on its input (B, T, C). `past` are keys and values (B, K, P, D) already made.

    Without `formula` attention is the fused kernel's, and scores and weights are empty.
    """
    c, eps = config, config.norm_eps
    normed = rms_norm(x, eps) * weight("attention_norm")  # (B, T, C)
    q = split_heads(F.linear(normed, weight("attention.wq")), c.n_heads)  # (B, H, T, D)
    k = split_heads(F.linear(normed, weight("attention.wk")), c.n_kv_heads)  # (B, K, T, D)
    v = split_heads(F.linear(normed, weight("attention.wv")), c.n_kv_heads)  # (B, K, T, D)
    q_rope, k_rope = place(q, rope, c), place(k, rope, c)
    keys = k_rope if past is None else torch.cat((past[0], k_rope), dim=2)  # (B, K, S, D)
    values = v if past is None else torch.cat((past[1], v), dim=2)  # (B, K, S, D)
    scores, weights, heads = attend(q_rope, keys, values, formula)
    wo = F.linear(join_heads(heads), weight("attention.wo"))  # (B, T, C)
    after_attention = x + wo
    ffn_normed = rms_norm(after_attention, eps) * weight("ffn_norm")  # (B, T, C)
    gate = F.linear(ffn_normed, weight("feed_forward.gate"))  # (B, T, F)
    up = F.linear(ffn_normed, weight("feed_forward.up"))  # (B, T, F)
    gated = F.silu(gate) * up
    down = F.linear(gated, weight("feed_forward.down"))  # (B, T, C)
    return LayerByHand(
        attention_norm=normed, q=q, k=k, v=v, q_rope=q_rope, k_rope=k_rope,
        scores=scores, weights=weights, heads=heads, wo=wo, after_attention=after_attention,
        ffn_norm=ffn_normed, gate=gate, up=up, gated=gated, down=down,
        output=after_attention + down,
    )  # fmt: skip


def place(x: Tensor, rope: RopeTable, config: LlamaConfig) -> Tensor:
    """A head turned by its position, and with `qk_norm` made of length one."""
    turned = ROTATE[config.rope_layout](x, rope)
    return rms_norm(turned, config.norm_eps) if config.qk_norm else turned


def attend(q: Tensor, k: Tensor, v: Tensor, formula: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and weights (B, H, T, S), and what the heads take home (B, H, T, D)."""
    new, visible = q.shape[2], k.shape[2]
    if not formula:
        mask = None if new == visible else causal_mask(later(q, visible), visible)
        return q.new_empty(0), q.new_empty(0), fused_attention(q, k, v, mask)
    scores = attention_scores(q, k)
    weights = attention_weights(scores, causal_mask(later(q, visible), visible))
    return scores, weights, weighted_sum(weights, v)


def later(q: Tensor, visible: int) -> Tensor:
    """Positions (1, T) of the new tokens: the last ones of those visible."""
    return torch.arange(visible - q.shape[2], visible)[None]
