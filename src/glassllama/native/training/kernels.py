"""The small sums between a Llama's matrices, forward and backward, each as one pass over memory.

In PyTorch each of these is a row of operations that write and read whole tensors; on a CPU they
take longer than the matrices themselves. Here a thread takes some rows, and what belongs to a row
stays in its nearest cache. Matrices take and give what train/precision.py chooses: bfloat16, kept
as the upper 16 bits of a float32, or float32; everything in between is float32. Below, "narrow"
stands for that type: each kernel is compiled for both.

Shapes: N = B·T rows, C model width, H heads of queries, K of keys, D head width, F ffn width.
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


def wide(number: Any) -> Any:
    """A number of a narrow array as float32."""
    raise TypeError("only compiled code may call this")


def narrow(number: Any, array: Any) -> Any:
    """A float32 as the array holds numbers: unchanged, or rounded to bfloat16."""
    raise TypeError("only compiled code may call this")


@overload(wide, inline="always")
def _wide(number: Any) -> Any:
    def of_bfloat(number: Any) -> Any:
        return float_from_bfloat(number)

    def of_float(number: Any) -> Any:
        return number

    return of_bfloat if isinstance(number, types.Integer) else of_float


@overload(narrow, inline="always")
def _narrow(number: Any, array: Any) -> Any:
    def to_bfloat(number: Any, array: Any) -> Any:
        return bfloat_from_float(number)

    def to_float(number: Any, array: Any) -> Any:
        return number

    return to_bfloat if isinstance(array.dtype, types.Integer) else to_float


def loop(function: Any) -> Any:
    """Compiled, called from Python without the GIL; sums may be taken in any order."""
    return native(function, LOOSE)


@loop
def add_norm(x: Any, branch: Any, total: Any, normed: Any, scale: Any, eps: float) -> None:
    """total = x + branch; normed = total · scale with scale = 1 / √(mean of total² + eps).

    (N, C) float32, (N, C) narrow -> (N, C) float32, (N, C) narrow, (N,) float32.
    """
    for n in range(x.shape[0]):
        squares = F32(0)
        for c in range(x.shape[1]):
            y = x[n, c] + wide(branch[n, c])
            total[n, c] = y
            squares += y * y
        scale[n] = F32(1) / np.sqrt(squares / F32(x.shape[1]) + F32(eps))
        for c in range(x.shape[1]):
            normed[n, c] = narrow(total[n, c] * scale[n], normed)


@loop
def add_norm_back(
    total: Any, scale: Any, d_total: Any, d_normed: Any, d_x: Any, d_branch: Any
) -> None:
    """Gradients of both results -> those of x, and of the branch, which is the same, narrowed."""
    width = F32(total.shape[1])
    for n in range(total.shape[0]):
        along = F32(0)
        for c in range(total.shape[1]):
            along += wide(d_normed[n, c]) * total[n, c]
        along *= scale[n] * scale[n] / width
        for c in range(total.shape[1]):
            d = (wide(d_normed[n, c]) - along * total[n, c]) * scale[n] + d_total[n, c]
            d_x[n, c] = d
            d_branch[n, c] = narrow(d, d_branch)


@loop
def place(qkv: Any, cos: Any, sin: Any, out: Any, scale: Any, eps: float) -> None:
    """Turn queries and keys by their positions; give them length one, unless `eps` is negative.

    (N, H+K+K, D) narrow, (N, D/2) cosines and sines of the angles -> (N, H+K+K, D) float32,
    values widened only, and by what the others were multiplied, (N, H+K).
    """
    half = qkv.shape[2] // 2
    for n in range(qkv.shape[0]):
        for h in range(scale.shape[1]):
            factor = F32(1)
            if eps >= 0:
                squares = F32(0)
                for d in range(2 * half):
                    squares += wide(qkv[n, h, d]) * wide(qkv[n, h, d])
                factor = F32(1) / np.sqrt(squares / F32(2 * half) + F32(eps))
            scale[n, h] = factor
            for d in range(half):
                a, b = wide(qkv[n, h, d]) * factor, wide(qkv[n, h, d + half]) * factor
                out[n, h, d] = a * cos[n, d] - b * sin[n, d]
                out[n, h, d + half] = a * sin[n, d] + b * cos[n, d]
        for h in range(scale.shape[1], qkv.shape[1]):
            for d in range(2 * half):
                out[n, h, d] = wide(qkv[n, h, d])


@loop
def unplace(
    placed: Any, cos: Any, sin: Any, scale: Any, d_q: Any, d_k: Any, d_v: Any, d_qkv: Any,
    normed: bool,
) -> None:  # fmt: skip
    """The way back: gradients (N, H, D), (N, K, D), (N, K, D) -> (N, H+K+K, D) narrow."""
    queries = d_q.shape[1]
    for n in range(placed.shape[0]):
        for h in range(queries):
            turn_back(placed[n, h], d_q[n, h], cos[n], sin[n], scale[n, h], normed, d_qkv[n, h])
        for k in range(d_k.shape[1]):
            h = queries + k
            turn_back(placed[n, h], d_k[n, k], cos[n], sin[n], scale[n, h], normed, d_qkv[n, h])
            for d in range(d_v.shape[2]):
                d_qkv[n, h + d_k.shape[1], d] = narrow(d_v[n, k, d], d_qkv)


@inlined
def turn_back(
    placed: Any, d_placed: Any, cos: Any, sin: Any, factor: Any, normed: Any, out: Any
) -> None:
    """One head: out of the norm, whose gradient has no part along the head, then turned back."""
    half = len(cos)
    along = F32(0)
    if normed:
        for d in range(2 * half):
            along += d_placed[d] * placed[d]
        along /= F32(2 * half)
    for d in range(half):
        a = (d_placed[d] - along * placed[d]) * factor
        b = (d_placed[d + half] - along * placed[d + half]) * factor
        out[d] = narrow(a * cos[d] + b * sin[d], out)
        out[d + half] = narrow(b * cos[d] - a * sin[d], out)


@loop
def gate(both: Any, out: Any) -> None:
    """silu(gate) · up: (N, 2F) narrow, gates first -> (N, F) narrow."""
    width = out.shape[1]
    for n in range(out.shape[0]):
        for f in range(width):
            g = wide(both[n, f])
            out[n, f] = narrow(g / (F32(1) + exponential(-g)) * wide(both[n, width + f]), out)


@loop
def ungate(both: Any, d_out: Any, d_both: Any) -> None:
    """The way back: silu'(g) = σ(g) · (1 + g · (1 - σ(g))), σ(g) = 1 / (1 + e⁻ᵍ)."""
    width = d_out.shape[1]
    for n in range(d_out.shape[0]):
        for f in range(width):
            g, up, d = wide(both[n, f]), wide(both[n, width + f]), wide(d_out[n, f])
            share = F32(1) / (F32(1) + exponential(-g))
            d_both[n, f] = narrow(d * up * share * (F32(1) + g * (F32(1) - share)), d_both)
            d_both[n, width + f] = narrow(d * g * share, d_both)
