"""Fused blocks of a Llama, for training on a CPU, with matrix products in bfloat16 or float32.

They compute what models/llama.py states (a test compares them) with fewer and larger matrix
products, and with everything between these fused (kernels.py). The weight of a norm is multiplied
into the matrix after it; queries, keys and values are one product, and so are gate and up. Weights,
their gradients and the residual stream stay float32.

Shapes: B rows, T tokens, N = B·T, C model width, H query heads, K kv heads, D head width, F ffn
width.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glassllama.base.layer_plan import (
    AttentionPlan,
    BlockPlan,
    FeedForwardPlan,
    ModelPlan,
    RopePlan,
    usual_scale,
)
from glassllama.models.llama import Block, Llama
from glassllama.native.training import kernels
from glassllama.nn.attention import ForwardContext, fused_attention

BF16 = torch.bfloat16
NO_NORM = -1.0  # instead of epsilon: no QK-norm


def fuse_blocks(model: Llama, dropout: float = 0.0, dtype: torch.dtype = BF16) -> None:
    """Let the model's blocks compute this way; its weights stay as they are.

    `dtype` is that of matrix products. `dropout` is applied here, because the modules to which
    nn/init.py adds it are not called.
    """
    for layer in model.layers:
        layer.__class__ = FusedBlock
        assert isinstance(layer, FusedBlock)
        layer.dropout, layer.dtype = dropout, dtype


def can_fuse(plan: ModelPlan) -> bool:
    """Whether fused blocks compute all that the plan says.

    A block must be equal to one that is made from the fields which the fused code reads.
    """
    for block in plan.blocks:
        a, ffn = block.attention, block.feed_forward
        if a.rope is None or a.qk_norm not in ("none", "unweighted"):
            return False
        rope = RopePlan(frequencies=a.rope.frequencies, layout="half")
        attention = AttentionPlan(
            n_heads=a.n_heads, n_kv_heads=a.n_kv_heads, head_dim=a.head_dim,
            scale=usual_scale(a.head_dim), rope=rope, qk_norm=a.qk_norm, qk_norm_after_rope=True,
        )  # fmt: skip
        same = BlockPlan(attention=attention, feed_forward=FeedForwardPlan(ffn_dim=ffn.ffn_dim))
        if block != same or rope.rotary_dim != a.head_dim:
            return False
    return True


class FusedBlock(Block):
    """Replaces models.llama.Block wherever there is no KV cache."""

    dropout: float
    dtype: torch.dtype

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        if context.cache is not None:
            return super().forward(x, context)
        a, f, eps = self.attention, self.feed_forward, self.attention_norm.eps
        x, normed = AddNorm.apply(x, None, eps, self.dtype)  # (B, T, C) float32, dtype
        qkv = product(normed, self.attention_norm.weight, a.wq, a.wk, a.wv)  # (B, T, (H+K+K)·D)
        heads = attend(qkv, context, a.config)  # (B, T, H·D)
        branch = self.drop(product(heads, None, a.wo))  # (B, T, C)
        x, normed = AddNorm.apply(x, branch, eps, self.dtype)
        both = product(normed, self.ffn_norm.weight, f.gate, f.up)  # (B, T, 2F)
        return x + self.drop(product(SwiGLU.apply(both), None, f.down))  # (B, T, C)

    def drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training)


def product(x: Tensor, scale: Tensor | None, *linears: torch.nn.Linear) -> Tensor:
    """Linear maps of the same input as one product; `scale` is multiplied to its channels."""
    weight = torch.cat([m.weight for m in linears]) if len(linears) > 1 else linears[0].weight
    return F.linear(x, (weight if scale is None else weight * scale).to(x.dtype))


def attend(qkv: Tensor, context: ForwardContext, config: Any) -> Tensor:
    """RoPE and attention in float32. (B, T, (H+K+K)·D) -> (B, T, H·D), both in the dtype."""
    heads = qkv.unflatten(-1, (-1, config.head_dim))  # (B, T, H+K+K, D)
    assert context.rope is not None
    angles = [each.expand(len(qkv), -1, -1, -1).flatten(0, 2) for each in context.rope]  # (N, D/2)
    eps = config.norm_eps if config.qk_norm else NO_NORM
    q, k, v = RopeNorm.apply(heads, *angles, (config.n_heads, config.n_kv_heads), eps)
    out = fused_attention(q, k, v, context.mask)  # (B, H, T, D)
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)


class AddNorm(torch.autograd.Function):
    """x + branch, and its RMS norm without weight in the dtype of the product after it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)  # (N, C)
        total, normed = torch.empty_like(rows), torch.empty_like(rows, dtype=dtype)
        scale = torch.empty(len(rows))
        added = torch.zeros_like(normed) if branch is None else branch.flatten(0, -2)
        run(kernels.add_norm, (rows, added, total, normed, scale), eps)
        ctx.save_for_backward(total, scale)
        ctx.no_branch = branch is None
        return total.view_as(x), normed.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        total, scale = ctx.saved_tensors
        d_x, d_branch = torch.empty_like(total), torch.empty_like(total, dtype=d_normed.dtype)
        given = [d.reshape(total.shape).contiguous() for d in (d_total, d_normed)]  # (N, C) each
        run(kernels.add_norm_backward, (total, scale, *given, d_x, d_branch))
        shape = d_total.shape
        return d_x.view(shape), None if ctx.no_branch else d_branch.view(shape), None, None


class RopeNorm(torch.autograd.Function):
    """RoPE of queries and keys, and QK-norm; values as float32.

    A norm without weights commutes with a rotation, so the kernel applies it before RoPE.

    (B, T, H+K+K, D) product -> (B, H, T, D), (B, K, T, D), (B, K, T, D) float32.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, counts: tuple[int, int], eps: float
    ) -> tuple[Tensor, ...]:
        rows = heads.flatten(0, 1)  # (N, H+K+K, D)
        out = torch.empty(rows.shape)
        scale = torch.empty(len(rows), sum(counts))
        run(kernels.rope_norm, (rows, cos, sin, out, scale), eps)
        ctx.save_for_backward(out, cos, sin, scale)
        ctx.normed, ctx.counts, ctx.dtype = eps >= 0, (*counts, counts[1]), rows.dtype
        return tuple(
            part.transpose(1, 2) for part in out.view(heads.shape).split(ctx.counts, dim=2)
        )

    @staticmethod
    def backward(ctx: Any, *d_parts: Tensor) -> tuple[Tensor | None, ...]:
        out, cos, sin, scale = ctx.saved_tensors
        d_rows = torch.empty_like(out, dtype=ctx.dtype)
        given = [d.transpose(1, 2).flatten(0, 1).contiguous() for d in d_parts]  # (N, n, D) each
        run(kernels.rope_norm_backward, (out, cos, sin, scale, *given, d_rows), ctx.normed)
        batch, tokens = d_parts[0].shape[0], d_parts[0].shape[2]
        return d_rows.unflatten(0, (batch, tokens)), None, None, None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up: (B, T, 2F) -> (B, T, F), both in the product dtype."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        rows = both.flatten(0, -2)  # (N, 2F)
        out = torch.empty(len(rows), rows.shape[1] // 2, dtype=rows.dtype)
        run(kernels.swiglu, (rows, out))
        ctx.save_for_backward(both)
        return out.view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        rows, d_both = both.flatten(0, -2), torch.empty_like(both.flatten(0, -2))
        run(kernels.swiglu_backward, (rows, d_out.flatten(0, -2).contiguous(), d_both))
        return d_both.view(both.shape)


# --- kernels over rows, by several threads --------------------------------------------------


def run(kernel: Callable[..., None], tensors: tuple[Tensor, ...], *more: float) -> None:
    """Call a kernel on all rows of these tensors, each thread on a share of them."""
    arrays = [as_array(tensor) for tensor in tensors]
    shares = torch.get_num_threads()
    edges = [len(arrays[0]) * share // shares for share in range(shares + 1)]
    first, *others = [[array[a:b] for array in arrays] for a, b in pairwise(edges)]
    waiting = [thread_pool(shares).submit(kernel, *share, *more) for share in others]
    kernel(*first, *more)
    for share in waiting:
        share.result()


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory for a kernel; bfloat16 as its 16 bits, because NumPy has no bfloat16."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == BF16 else tensor).numpy()


@lru_cache(maxsize=1)
def thread_pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rows")
