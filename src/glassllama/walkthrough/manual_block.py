"""One transformer block computed line by line, from weights that are read from the file.

models/ and nn/ compute the same with modules. The walkthrough compares every tensor here with the
one that the running model has at the hook of the same name.

Shapes: B batch, T tokens, S visible tokens, C model width, H query heads, K KV heads, D head width,
F ffn width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.base.layer_plan import (
    NORM_NAMES,
    Activation,
    AttentionPlan,
    BlockPlan,
    Norm,
    QKNorm,
    RopePlan,
    usual_scale,
)
from glassllama.models.gpt import ACTIVATIONS, GPTConfig
from glassllama.nn.attention import (
    attention_scores,
    attention_weights,
    causal_mask,
    fused_attention,
    join_heads,
    soft_cap,
    split_heads,
    weighted_sum,
)
from glassllama.nn.norm import rms_norm
from glassllama.nn.rope import ROTATE, rope_angles, rope_table

Weights = Callable[[str], Tensor]  # "attention.wq.weight" -> this parameter of the block
Tensors = dict[str, Tensor]  # by the hooks' names below `layers.N.`; "output" is that of the block
Past = tuple[Tensor, Tensor] | None  # keys and values (B, K, P, D) of the tokens before x
GATES: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def planned_block(
    weight: Weights, x: Tensor, eps: float, plan: BlockPlan, positions: range, past: Past,
    fused: bool,
) -> Tensors:  # fmt: skip
    """A block on its input (B, T, C), as its layer plan says (base/layer_plan.py)."""
    a, t = plan.attention, Tensors()

    def norm(kind: Norm, x: Tensor) -> Tensor:
        if kind not in plan.norms:
            return x
        name = NORM_NAMES[kind]
        t[name] = rms_norm(x, eps) * weight(f"{name}.weight")
        return t[name]

    def linear(x: Tensor, name: str, bias: bool) -> Tensor:
        return F.linear(x, weight(f"{name}.weight"), weight(f"{name}.bias") if bias else None)

    def normed(heads: Tensor, name: str) -> Tensor:
        heads = qk_norm(heads, a.qk_norm, weight, name, eps)
        if a.qk_norm in ("per_head", "full_width"):
            t[f"{name}_norm"] = join_heads(heads) if a.qk_norm == "full_width" else heads
        return heads

    normalized = norm("pre_attention", x)
    for letter, heads in (("q", a.n_heads), ("k", a.n_kv_heads), ("v", a.n_kv_heads)):
        projected = linear(normalized, f"attention.w{letter}", letter in a.biases)  # (B, T, H·D)
        t[f"attention.{letter}"] = split_heads(projected, heads)  # (B, H or K, T, D)
    for name in ("attention.q", "attention.k"):
        before = t[name] if a.qk_norm_after_rope else normed(t[name], name)
        rotated = apply_rope(before, a.rope, positions)
        t[f"{name}_rope"] = normed(rotated, name) if a.qk_norm_after_rope else rotated
    t["attention.q_rope"] = t["attention.q_rope"] * query_factors(a, positions)
    t |= attend(t["attention.q_rope"], t["attention.k_rope"], t["attention.v"], a, past, fused)
    t["attention.wo"] = linear(join_heads(t["attention.heads"]), "attention.wo", "o" in a.biases)
    attended = norm("post_attention", t["attention.wo"])  # (B, T, C)
    t["after_attention"] = x + plan.residual_multiplier * attended
    normalized = norm("pre_ffn", t["after_attention"])
    for name in ("feed_forward.gate", "feed_forward.up"):
        t[name] = linear(normalized, name, plan.feed_forward.bias)  # (B, T, F)
    gates = GATES[plan.feed_forward.activation](t["feed_forward.gate"])
    t["feed_forward.gated"] = gates * t["feed_forward.up"]
    t["feed_forward.down"] = linear(
        t["feed_forward.gated"], "feed_forward.down", plan.feed_forward.bias
    )
    added = norm("post_ffn", t["feed_forward.down"])  # (B, T, C)
    return t | {"output": t["after_attention"] + plan.residual_multiplier * added}


def qk_norm(heads: Tensor, kind: QKNorm, weight: Weights, name: str, eps: float) -> Tensor:
    """The norm of queries or keys. (B, heads, T, D) -> same."""
    if kind == "none":
        return heads
    wide = kind == "full_width"
    normed = rms_norm(join_heads(heads) if wide else heads, eps)
    if kind != "unweighted":
        normed = normed * weight(f"{name}_norm.weight")
    return split_heads(normed, heads.shape[1]) if wide else normed


def gpt_block(
    weight: Weights, x: Tensor, config: GPTConfig, plan: AttentionPlan, past: Past, fused: bool
) -> Tensors:
    """A block of models/gpt.py on its input (B, T, C); only its attention has a plan."""

    def parameters(name: str) -> tuple[Tensor, Tensor | None]:
        return weight(f"{name}.weight"), weight(f"{name}.bias") if config.bias else None

    t: Tensors = {}
    t["attention_norm"] = layer_norm(x, *parameters("attention_norm"), config.norm_eps)
    for name in ("q", "k", "v"):
        projected = F.linear(t["attention_norm"], *parameters(f"attention.w{name}"))  # (B, T, C)
        t[f"attention.{name}"] = split_heads(projected, config.n_heads)  # (B, H, T, D)
    t |= attend(t["attention.q"], t["attention.k"], t["attention.v"], plan, past, fused)
    t["attention.wo"] = F.linear(join_heads(t["attention.heads"]), *parameters("attention.wo"))
    t["after_attention"] = x + t["attention.wo"]  # (B, T, C)
    t["ffn_norm"] = layer_norm(t["after_attention"], *parameters("ffn_norm"), config.norm_eps)
    t["feed_forward.up"] = F.linear(t["ffn_norm"], *parameters("feed_forward.up"))  # (B, T, F)
    t["feed_forward.activated"] = ACTIVATIONS[config.activation](t["feed_forward.up"])
    t["feed_forward.down"] = F.linear(t["feed_forward.activated"], *parameters("feed_forward.down"))
    return t | {"output": t["after_attention"] + t["feed_forward.down"]}  # (B, T, C)


def query_factors(plan: AttentionPlan, positions: range) -> Tensor:
    """The factor of the queries at each position: (T, 1)."""
    parts = torch.tensor(positions)[:, None] // plan.temperature_length
    return 1 + plan.temperature_scale * torch.log(1.0 + parts)


def apply_rope(x: Tensor, rope: RopePlan | None, positions: range) -> Tensor:
    """Rotate the first coordinates of each head by position, if there is RoPE. (B, H, T, D)."""
    if rope is None:
        return x
    angles = rope_angles(torch.tensor([positions]), torch.tensor(rope.frequencies))  # (1, T, R/2)
    rotated = ROTATE[rope.layout](
        x[..., : rope.rotary_dim], rope_table(angles, rope.attention_factor)
    )
    return torch.cat((rotated, x[..., rope.rotary_dim :]), dim=-1)


def visible_mask(plan: AttentionPlan, new: int, visible: int) -> Tensor:
    """True where one of the last `new` tokens sees one of all: (1, 1, T, S)."""
    positions = torch.arange(visible - new, visible)[None]  # (1, T)
    mask = causal_mask(positions, visible)
    if plan.window is not None:
        mask &= torch.arange(visible) > positions[:, None, :, None] - plan.window
    return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, past: Past, fused: bool
) -> Tensors:
    """Scores and weights (B, H, T, S) and output (B, H, T, D) of the heads.

    With `fused`, only the output, by the fused kernel; it has no soft cap.
    """
    if past is not None:
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)  # (B, K, S, D)
    mask = visible_mask(plan, q.shape[2], k.shape[2])
    scale = None if plan.scale == usual_scale(plan.head_dim) else plan.scale  # None: q / √D
    if fused and plan.softcap is None:
        return {"attention.heads": fused_attention(q, k, v, mask, scale)}
    scores = attention_scores(q, k, scale)
    if plan.softcap is not None:
        scores = soft_cap(scores, plan.softcap)
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
