"""One transformer block computed line by line, from weights that are read from the file.

models/ and nn/ compute the same with modules. The walkthrough compares every tensor here with the
one that the running model has at the hook of the same name.

Shapes: B batch, T tokens, S visible tokens, C model width, H query heads, K KV heads, D head width,
F ffn width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError
from glassllama.models import gpt, llama
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

Transformer = llama.Llama | gpt.GPT
Weights = Callable[[str], Tensor]  # "attention.wq.weight" -> this parameter of the block
Tensors = dict[str, Tensor]  # by the hooks' names below `layers.N.`; "output" is that of the block
Past = tuple[Tensor, Tensor] | None  # keys and values (B, K, P, D) of the tokens before x


def llama_block(
    weight: Weights, x: Tensor, config: LlamaConfig, rope: RopeTable, past: Past, fused: bool
) -> Tensors:
    """A block of models/llama.py on its input (B, T, C)."""
    c, eps = config, config.norm_eps
    normed = rms_norm(x, eps) * weight("attention_norm.weight")  # (B, T, C)
    q = split_heads(F.linear(normed, weight("attention.wq.weight")), c.n_heads)  # (B, H, T, D)
    k = split_heads(F.linear(normed, weight("attention.wk.weight")), c.n_kv_heads)  # (B, K, T, D)
    v = split_heads(F.linear(normed, weight("attention.wv.weight")), c.n_kv_heads)  # (B, K, T, D)
    q_rope, k_rope = apply_rope(q, rope, c), apply_rope(k, rope, c)
    attention = attend(q_rope, k_rope, v, past, fused)
    wo = F.linear(join_heads(attention["attention.heads"]), weight("attention.wo.weight"))
    after_attention = x + wo  # (B, T, C)
    ffn_normed = rms_norm(after_attention, eps) * weight("ffn_norm.weight")
    gate = F.linear(ffn_normed, weight("feed_forward.gate.weight"))  # (B, T, F)
    up = F.linear(ffn_normed, weight("feed_forward.up.weight"))  # (B, T, F)
    gated = F.silu(gate) * up
    down = F.linear(gated, weight("feed_forward.down.weight"))  # (B, T, C)
    return {
        "attention_norm": normed, "attention.q": q, "attention.k": k, "attention.v": v,
        "attention.q_rope": q_rope, "attention.k_rope": k_rope, **attention, "attention.wo": wo,
        "after_attention": after_attention, "ffn_norm": ffn_normed, "feed_forward.gate": gate,
        "feed_forward.up": up, "feed_forward.gated": gated, "feed_forward.down": down,
        "output": after_attention + down,
    }  # fmt: skip


def gpt_block(
    weight: Weights, x: Tensor, config: gpt.GPTConfig, rope: None, past: Past, fused: bool
) -> Tensors:
    """A block of models/gpt.py on its input (B, T, C). There is no RoPE."""

    def linear(x: Tensor, name: str) -> Tensor:
        bias = weight(f"{name}.bias") if config.bias else None
        return F.linear(x, weight(f"{name}.weight"), bias)

    def norm(x: Tensor, name: str) -> Tensor:
        bias = weight(f"{name}.bias") if config.bias else None
        return layer_norm(x, weight(f"{name}.weight"), bias, config.norm_eps)

    normed = norm(x, "attention_norm")  # (B, T, C)
    q, k, v = (
        split_heads(linear(normed, f"attention.{name}"), config.n_heads)
        for name in ("wq", "wk", "wv")
    )  # three (B, H, T, D)
    attention = attend(q, k, v, past, fused)
    wo = linear(join_heads(attention["attention.heads"]), "attention.wo")  # (B, T, C)
    after_attention = x + wo
    ffn_normed = norm(after_attention, "ffn_norm")
    up = linear(ffn_normed, "feed_forward.up")  # (B, T, F)
    activated = gpt.ACTIVATIONS[config.activation](up)
    down = linear(activated, "feed_forward.down")  # (B, T, C)
    return {
        "attention_norm": normed, "attention.q": q, "attention.k": k, "attention.v": v,
        **attention, "attention.wo": wo, "after_attention": after_attention,
        "ffn_norm": ffn_normed, "feed_forward.up": up, "feed_forward.activated": activated,
        "feed_forward.down": down, "output": after_attention + down,
    }  # fmt: skip


MANUAL_BLOCKS: dict[type[nn.Module], Callable[..., Tensors]] = {
    llama.Block: llama_block,
    gpt.Block: gpt_block,
}


def block_function(model: nn.Module) -> Callable[..., Tensors]:
    """The function above for the blocks of this model. Raises ConfigError if there is none."""
    for base in type(model.get_submodule("layers.0")).__mro__:
        if base in MANUAL_BLOCKS:
            return MANUAL_BLOCKS[base]
    raise ConfigError(f"the walkthrough cannot compute the blocks of a {type(model).__name__} yet")


def apply_rope(x: Tensor, rope: RopeTable, config: LlamaConfig) -> Tensor:
    """Rotate by position; then RMSNorm of each head with `qk_norm`. (B, H, T, D) -> same."""
    rotated = ROTATE[config.rope_layout](x, rope)
    return rms_norm(rotated, config.norm_eps) if config.qk_norm else rotated


def attend(q: Tensor, k: Tensor, v: Tensor, past: Past, fused: bool) -> Tensors:
    """Scores and weights (B, H, T, S) and output (B, H, T, D) of the heads; if `fused`, only it."""
    if past is not None:
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)  # (B, K, S, D)
    new, visible = q.shape[2], k.shape[2]
    mask = causal_mask(torch.arange(visible - new, visible)[None], visible)  # (1, 1, T, S)
    if fused:
        return {"attention.heads": fused_attention(q, k, v, None if new == visible else mask)}
    scores = attention_scores(q, k)
    weights = attention_weights(scores, mask)
    heads = weighted_sum(weights, v)
    return {"attention.scores": scores, "attention.weights": weights, "attention.heads": heads}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (Ba et al., 2016) over the last axis, in float32, returned in x's dtype.

    The mean is subtracted, the result divided by the standard deviation; then weight and bias.
    """
    centered = x.float() - x.float().mean(-1, keepdim=True)
    normed = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    scaled = normed * weight.float()
    return (scaled if bias is None else scaled + bias.float()).type_as(x)
