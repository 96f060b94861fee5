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

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weight(f"{name}.weight"))

    t: Tensors = {}
    t["attention_norm"] = rms_norm(x, config.norm_eps) * weight("attention_norm.weight")
    for name, heads in (("q", config.n_heads), ("k", config.n_kv_heads), ("v", config.n_kv_heads)):
        projected = linear(t["attention_norm"], f"attention.w{name}")  # (B, T, H·D or K·D)
        t[f"attention.{name}"] = split_heads(projected, heads)  # (B, H or K, T, D)
    for name in ("q", "k"):
        t[f"attention.{name}_rope"] = apply_rope(t[f"attention.{name}"], rope, config)
    t |= attend(t["attention.q_rope"], t["attention.k_rope"], t["attention.v"], past, fused)
    t["attention.wo"] = linear(join_heads(t["attention.heads"]), "attention.wo")  # (B, T, C)
    t["after_attention"] = x + t["attention.wo"]
    t["ffn_norm"] = rms_norm(t["after_attention"], config.norm_eps) * weight("ffn_norm.weight")
    t["feed_forward.gate"] = linear(t["ffn_norm"], "feed_forward.gate")  # (B, T, F)
    t["feed_forward.up"] = linear(t["ffn_norm"], "feed_forward.up")  # (B, T, F)
    t["feed_forward.gated"] = F.silu(t["feed_forward.gate"]) * t["feed_forward.up"]
    t["feed_forward.down"] = linear(t["feed_forward.gated"], "feed_forward.down")  # (B, T, C)
    return t | {"output": t["after_attention"] + t["feed_forward.down"]}


def gpt_block(
    weight: Weights, x: Tensor, config: gpt.GPTConfig, rope: None, past: Past, fused: bool
) -> Tensors:
    """A block of models/gpt.py on its input (B, T, C). There is no RoPE."""

    def parameters(name: str) -> tuple[Tensor, Tensor | None]:
        return weight(f"{name}.weight"), weight(f"{name}.bias") if config.bias else None

    t: Tensors = {}
    t["attention_norm"] = layer_norm(x, *parameters("attention_norm"), config.norm_eps)
    for name in ("q", "k", "v"):
        projected = F.linear(t["attention_norm"], *parameters(f"attention.w{name}"))  # (B, T, C)
        t[f"attention.{name}"] = split_heads(projected, config.n_heads)  # (B, H, T, D)
    t |= attend(t["attention.q"], t["attention.k"], t["attention.v"], past, fused)
    t["attention.wo"] = F.linear(join_heads(t["attention.heads"]), *parameters("attention.wo"))
    t["after_attention"] = x + t["attention.wo"]  # (B, T, C)
    t["ffn_norm"] = layer_norm(t["after_attention"], *parameters("ffn_norm"), config.norm_eps)
    t["feed_forward.up"] = F.linear(t["ffn_norm"], *parameters("feed_forward.up"))  # (B, T, F)
    t["feed_forward.activated"] = gpt.ACTIVATIONS[config.activation](t["feed_forward.up"])
    t["feed_forward.down"] = F.linear(t["feed_forward.activated"], *parameters("feed_forward.down"))
    return t | {"output": t["after_attention"] + t["feed_forward.down"]}  # (B, T, C)


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
