"""Elementwise operations on one row between two matrices: RMSNorm, SwiGLU, quantization.

Plain loops that LLVM vectorizes on any processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glassllama.native.engine.quantize_activations import (
    CORRECTION_BYTES,
    SCALE_BYTES,
    quantize_block,
    squares,
)
from glassllama.native.jit.compile import compiled, inlined
from glassllama.native.jit.intrinsics import float_from_bits

F32 = np.float32
I32 = np.int32
BLOCK = 32

LOG2_E = F32(1.4426950408889634)
LN2_UPPER = F32(0.693359375)  # few bits: its product with a whole number is exact
LN2_LOWER = F32(-2.12194440e-4)
LOWEST, HIGHEST = F32(-87.3), F32(88.3)  # e^x beyond these is no normal float32


@inlined
def exponential(x: Any) -> Any:
    """e^x to 2 units in the last place, without a call, so that loops over it vectorize.

    x = n·ln 2 + r with |r| ≤ ln(2)/2; e^r by its Taylor polynomial of degree 7 (remainder 5e-9).
    NaN stays NaN: comparisons below let it pass.
    """
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_UPPER) - n * LN2_LOWER
    p = F32(1 / 5040)
    p = p * r + F32(1 / 720)
    p = p * r + F32(1 / 120)
    p = p * r + F32(1 / 24)
    p = p * r + F32(1 / 6)
    p = p * r + F32(1 / 2)
    p = p * r + F32(1)
    p = p * r + F32(1)
    return p * float_from_bits(I32((I32(n) + I32(127)) << I32(23)))


@compiled
def inverse_rms(x: Any, eps: float) -> Any:
    """1 / √(mean of squares + eps) of a row. Source: Zhang & Sennrich, 2019."""
    whole, total = len(x) // 16, F32(0)
    if whole > 0:
        total = squares(x.ctypes.data, whole)
    for i in range(16 * whole, len(x)):
        total += x[i] * x[i]
    return F32(1) / np.sqrt(total / F32(len(x)) + F32(eps))


@compiled
def normalize(x: Any, weight: Any, eps: float, out: Any) -> None:
    """RMSNorm: (C,) scaled to a root mean square of one, times its learned weight."""
    scale = inverse_rms(x, eps)
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@compiled
def quantize_blocks(x: Any, first: int, last: int, codes: Any, scales: Any) -> None:
    """Quantize blocks first … last-1 of a row to int8 -> codes (C,), scales (blocks, FACTORS)."""
    corrections = scales.ctypes.data + len(scales) * SCALE_BYTES
    for b in range(first, last):
        quantize_block(
            x.ctypes.data + b * BLOCK * 4,
            codes.ctypes.data + b * BLOCK,
            scales.ctypes.data + b * SCALE_BYTES,
            corrections + b * CORRECTION_BYTES,
        )


@compiled
def swiglu(gates: Any, ups: Any, first: int, last: int, out: Any) -> None:
    """SwiGLU of columns first … last-1: silu(gate) · up -> out. Source: Shazeer, 2020."""
    for i in range(first, last):
        out[i] = gates[i] / (F32(1) + exponential(-gates[i])) * ups[i]


@compiled
def add_to(x: Any, y: Any) -> None:
    """x += y."""
    for i in range(len(x)):
        x[i] += y[i]
