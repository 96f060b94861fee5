"""Fused loops between a Llama's matrix products, forward and backward, each one pass over memory.

In PyTorch each of these is several operations that read and write whole tensors; on a CPU they take
longer than the matrix products. Here a thread processes some rows, and a row stays in the core's
cache. Inputs and outputs of matrix products have the product dtype that train/model.py chooses:
bfloat16, stored as the upper 16 bits of a float32, or float32. Everything in between is float32.
Each kernel is compiled for both ("product" below).

Shapes: N = B·T rows, C model width, H query heads, K kv heads, D head width, F ffn width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from glassllama.native.engine.elementwise import exponential
from glassllama.native.jit.compile import LOOSE, inlined, native
from glassllama.native.jit.intrinsics import bfloat_from_float, float_from_bfloat

F32 = np.float32


def load(number: Any) -> Any:
    """An element of a product array as float32."""
    raise TypeError("only compiled code may call this")


def store(number: Any, array: Any) -> Any:
    """A float32 as an element of `array`: unchanged, or rounded to bfloat16."""
    raise TypeError("only compiled code may call this")


@overload(load, inline="always")
def _load(number: Any) -> Any:
    def of_bfloat(number: Any) -> Any:
        return float_from_bfloat(number)

    def of_float(number: Any) -> Any:
        return number

    return of_bfloat if isinstance(number, types.Integer) else of_float


@overload(store, inline="always")
def _store(number: Any, array: Any) -> Any:
    def to_bfloat(number: Any, array: Any) -> Any:
        return bfloat_from_float(number)

    def to_float(number: Any, array: Any) -> Any:
        return number

    return to_bfloat if isinstance(array.dtype, types.Integer) else to_float


def kernel(function: Any) -> Any:
    """Compiled, called from Python without the GIL; sums may be reordered."""
    return native(function, LOOSE)


@kernel
def add_norm(x: Any, branch: Any, total: Any, normed: Any, scale: Any, eps: float) -> None:
    """total = x + branch; normed = total · scale with scale = 1 / √(mean of total² + eps).

    (N, C) float32, (N, C) product -> (N, C) float32, (N, C) product, (N,) float32.
    """
    for n in range(x.shape[0]):
        squares = F32(0)
        for c in range(x.shape[1]):
            y = x[n, c] + load(branch[n, c])
            total[n, c] = y
            squares += y * y
        scale[n] = F32(1) / np.sqrt(squares / F32(x.shape[1]) + F32(eps))
        for c in range(x.shape[1]):
            normed[n, c] = store(total[n, c] * scale[n], normed)


@kernel
def add_norm_backward(
    total: Any, scale: Any, d_total: Any, d_normed: Any, d_x: Any, d_branch: Any
) -> None:
    """Gradients of both results -> those of x (float32) and of the branch (the same, product)."""
    width = F32(total.shape[1])
    for n in range(total.shape[0]):
        along = F32(0)
        for c in range(total.shape[1]):
            along += load(d_normed[n, c]) * total[n, c]
        along *= scale[n] * scale[n] / width
        for c in range(total.shape[1]):
            d = (load(d_normed[n, c]) - along * total[n, c]) * scale[n] + d_total[n, c]
            d_x[n, c] = d
            d_branch[n, c] = store(d, d_branch)


@kernel
def rope_norm(qkv: Any, cos: Any, sin: Any, out: Any, scale: Any, eps: float) -> None:
    """RoPE of queries and keys, normalized to RMS 1 unless `eps` is negative (QK-norm).

    (N, H+K+K, D) product, (N, D/2) cosines and sines of the angles -> (N, H+K+K, D) float32, values
    unchanged, and the factor of each normalized head, (N, H+K).
    """
    half = qkv.shape[2] // 2
    for n in range(qkv.shape[0]):
        for h in range(scale.shape[1]):
            factor = F32(1)
            if eps >= 0:
                squares = F32(0)
                for d in range(2 * half):
                    squares += load(qkv[n, h, d]) * load(qkv[n, h, d])
                factor = F32(1) / np.sqrt(squares / F32(2 * half) + F32(eps))
            scale[n, h] = factor
            for d in range(half):
                a, b = load(qkv[n, h, d]) * factor, load(qkv[n, h, d + half]) * factor
                out[n, h, d] = a * cos[n, d] - b * sin[n, d]
                out[n, h, d + half] = a * sin[n, d] + b * cos[n, d]
        for h in range(scale.shape[1], qkv.shape[1]):
            for d in range(2 * half):
                out[n, h, d] = load(qkv[n, h, d])


@kernel
def rope_norm_backward(
    out: Any, cos: Any, sin: Any, scale: Any, d_q: Any, d_k: Any, d_v: Any, d_qkv: Any,
    normed: bool,
) -> None:  # fmt: skip
    """Gradients (N, H, D), (N, K, D), (N, K, D) float32 -> (N, H+K+K, D) product."""
    queries = d_q.shape[1]
    for n in range(out.shape[0]):
        for h in range(queries):
            head_backward(out[n, h], d_q[n, h], cos[n], sin[n], scale[n, h], normed, d_qkv[n, h])
        for k in range(d_k.shape[1]):
            h = queries + k
            head_backward(out[n, h], d_k[n, k], cos[n], sin[n], scale[n, h], normed, d_qkv[n, h])
            for d in range(d_v.shape[2]):
                d_qkv[n, h + d_k.shape[1], d] = store(d_v[n, k, d], d_qkv)


@inlined
def head_backward(
    out: Any, d_out: Any, cos: Any, sin: Any, factor: Any, normed: Any, d_head: Any
) -> None:
    """One head: through the norm, whose gradient is orthogonal to the head, then through RoPE."""
    half = len(cos)
    along = F32(0)
    if normed:
        for d in range(2 * half):
            along += d_out[d] * out[d]
        along /= F32(2 * half)
    for d in range(half):
        a = (d_out[d] - along * out[d]) * factor
        b = (d_out[d + half] - along * out[d + half]) * factor
        d_head[d] = store(a * cos[d] + b * sin[d], d_head)
        d_head[d + half] = store(b * cos[d] - a * sin[d], d_head)


@kernel
def swiglu(both: Any, out: Any) -> None:
    """silu(gate) · up: (N, 2F) product, gates first -> (N, F) product."""
    width = out.shape[1]
    for n in range(out.shape[0]):
        for f in range(width):
            g = load(both[n, f])
            out[n, f] = store(g / (F32(1) + exponential(-g)) * load(both[n, width + f]), out)


@kernel
def swiglu_backward(both: Any, d_out: Any, d_both: Any) -> None:
    """silu'(g) = σ(g) · (1 + g · (1 - σ(g))), σ(g) = 1 / (1 + e⁻ᵍ)."""
    width = d_out.shape[1]
    for n in range(d_out.shape[0]):
        for f in range(width):
            g, up, d = load(both[n, f]), load(both[n, width + f]), load(d_out[n, f])
            share = F32(1) / (F32(1) + exponential(-g))
            d_both[n, f] = store(d * up * share * (F32(1) + g * (F32(1) - share)), d_both)
            d_both[n, width + f] = store(d * g * share, d_both)
