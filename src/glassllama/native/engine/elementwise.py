"""Elementwise operations on one row between two matrices: RMSNorm, SwiGLU, softmax, quantization.

Plain loops that LLVM vectorizes on any processor; and code in LLVM's generic vectors, without
instructions of one processor, where the order of a sum or the speed must not depend on LLVM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from glassllama.native.engine import layout
from glassllama.native.engine.layout import BLOCK, PAGE, SUPERBLOCK
from glassllama.native.jit.compile import compiled, inlined
from glassllama.native.jit.intrinsics import (
    F32,
    I8,
    I16,
    I32,
    Vectors,
    float_from_bits,
    instruction,
    types,
    vector,
)

FLOAT, INT = np.float32, np.int32

LOG2_E = 1.4426950408889634
LN2_UPPER = 0.693359375  # few bits: its product with a whole number is exact
LN2_LOWER = -2.12194440e-4
LOWEST, HIGHEST = -87.3, 88.3  # e^x beyond these is no normal float32
TAYLOR = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0]
TANH_END = 7.90531110763549805  # tanh is ±1 in float32 beyond
# The same numbers as float32, for compiled Python.
F_LOG2_E, F_LN2_UPPER, F_LN2_LOWER = FLOAT(LOG2_E), FLOAT(LN2_UPPER), FLOAT(LN2_LOWER)
F_LOWEST, F_HIGHEST = FLOAT(LOWEST), FLOAT(HIGHEST)


@inlined
def exponential(x: Any) -> Any:
    """e^x to 2 units in the last place, without a call, so that loops over it vectorize.

    x = n·ln 2 + r with |r| ≤ ln(2)/2; e^r by its Taylor polynomial of degree 7 (remainder 5e-9).
    NaN stays NaN: comparisons below let it pass.
    """
    x = F_LOWEST if x < F_LOWEST else x
    x = F_HIGHEST if x > F_HIGHEST else x
    n = np.rint(x * F_LOG2_E)
    r = (x - n * F_LN2_UPPER) - n * F_LN2_LOWER
    p = FLOAT(1 / 5040)
    p = p * r + FLOAT(1 / 720)
    p = p * r + FLOAT(1 / 120)
    p = p * r + FLOAT(1 / 24)
    p = p * r + FLOAT(1 / 6)
    p = p * r + FLOAT(1 / 2)
    p = p * r + FLOAT(1)
    p = p * r + FLOAT(1)
    return p * float_from_bits(INT((INT(n) + INT(127)) << INT(23)))


def vector_exponential(v: Vectors, x: Any) -> Any:
    """`exponential` in every lane."""
    b, kind = v.builder, x.type
    for bound, beyond in ((LOWEST, "<"), (HIGHEST, ">")):
        x = b.select(b.fcmp_ordered(beyond, x, v.same(kind, bound)), v.same(kind, bound), x)
    n = v.rounded(b.fmul(x, v.same(kind, LOG2_E)))
    r = v.fused(n, v.same(kind, -LN2_LOWER), v.fused(n, v.same(kind, -LN2_UPPER), x))
    p = v.same(kind, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        p = v.fused(p, r, v.same(kind, coefficient))
    whole = vector(I32, kind.count)
    exponent = b.add(b.fptosi(n, whole), v.same(whole, 127))
    return b.fmul(p, b.bitcast(b.shl(exponent, v.same(whole, 23)), kind))


@compiled
def inverse_rms(x: Any, eps: float) -> Any:
    """1 / √(mean of squares + eps) of a row. Source: Zhang & Sennrich, 2019."""
    whole, total = len(x) // 16, FLOAT(0)
    if whole > 0:
        total = squares(x.ctypes.data, whole)
    for i in range(16 * whole, len(x)):
        total += x[i] * x[i]
    return FLOAT(1) / np.sqrt(total / FLOAT(len(x)) + FLOAT(eps))


@compiled
def normalize(x: Any, weight: Any, eps: float, out: Any) -> None:
    """RMSNorm: (C,) scaled to a root mean square of one, times its learned weight."""
    scale = inverse_rms(x, eps)
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@instruction(returns=types.float32)
def squares(v: Vectors, x: Any, count: Any) -> Any:
    """The sum of the squares of 16 · `count` ≥ 16 numbers: sixteen running sums, then halving.

    The order is written out. Left to the compiler, it differs between code just compiled and the
    same code from disk, and so would every logit.
    """
    some = vector(F32, 16)

    def add(n: Any, sums: list[Any]) -> list[Any]:
        numbers = v.load(v.step(x, n, 64), some, 4)
        return [v.fused(numbers, numbers, sums[0])]

    return v.total(v.count_up(count, [v.same(some, 0.0)], add)[0])


@compiled
def swiglu(gates: Any, ups: Any, first: int, last: int, out: Any) -> None:
    """SwiGLU of columns first … last-1: silu(gate) · up -> out. Source: Shazeer, 2020."""
    for i in range(first, last):
        out[i] = gates[i] / (FLOAT(1) + exponential(-gates[i])) * ups[i]


@compiled
def geglu(gates: Any, ups: Any, first: int, last: int, out: Any) -> None:
    """GeGLU of columns first … last-1: gelu(gate) · up -> out, with GELU's tanh approximation.

    Source: Shazeer, 2020; Hendrycks & Gimpel, 2016: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
    """
    for i in range(first, last):
        x = gates[i]
        inner = FLOAT(0.7978845608028654) * (x + FLOAT(0.044715) * x * x * x)
        out[i] = FLOAT(0.5) * x * (FLOAT(1) + tanh(inner)) * ups[i]


@inlined
def tanh(x: Any) -> Any:
    """Hyperbolic tangent to 4 units in the last place, without a call; NaN stays NaN.

    A rational function of degree 13 / 6, as in Eigen and XLA, in the interval that it is made for.
    """
    x = FLOAT(-TANH_END) if x < FLOAT(-TANH_END) else x
    x = FLOAT(TANH_END) if x > FLOAT(TANH_END) else x
    square = x * x
    p = FLOAT(-2.76076847742355e-16)
    p = p * square + FLOAT(2.00018790482477e-13)
    p = p * square + FLOAT(-8.60467152213735e-11)
    p = p * square + FLOAT(5.12229709037114e-08)
    p = p * square + FLOAT(1.48572235717979e-05)
    p = p * square + FLOAT(6.37261928875436e-04)
    p = p * square + FLOAT(4.89352455891786e-03)
    q = FLOAT(1.19825839466702e-06)
    q = q * square + FLOAT(1.18534705686654e-04)
    q = q * square + FLOAT(2.26843463243900e-03)
    q = q * square + FLOAT(4.89352518554385e-03)
    return x * p / q


@compiled
def scale_and_cap(x: Any, multiplier: Any, cap: Any) -> None:
    """x *= multiplier, then x = cap · tanh(x / cap) unless the cap is 0."""
    for i in range(len(x)):
        x[i] *= multiplier
    if cap > 0:
        for i in range(len(x)):
            x[i] = cap * tanh(x[i] / cap)


@compiled
def add_to(x: Any, y: Any) -> None:
    """x += y."""
    for i in range(len(x)):
        x[i] += y[i]


@compiled
def add_scaled_to(x: Any, y: Any, multiplier: float) -> None:
    """x += multiplier · y."""
    for i in range(len(x)):
        x[i] += y[i] * multiplier


# --- quantized inputs -----------------------------------------------------------------------------


@compiled
def quantize_blocks(x: Any, first: int, last: int, codes: Any, scales: Any) -> None:
    """Quantize blocks first … last-1 of a row to int8 -> codes (C,), scales (blocks, FACTORS)."""
    negated = scales.ctypes.data + len(scales) * layout.SCALE_BYTES
    for b in range(first, last):
        quantize_block(
            x.ctypes.data + b * BLOCK * 4,
            codes.ctypes.data + b * BLOCK,
            scales.ctypes.data + b * layout.SCALE_BYTES,
            negated + b * layout.NEGATED_BYTES,
        )


def lane_numbers(start: int, count: int) -> Any:
    return ir.Constant(vector(I32, count), list(range(start, start + count)))


@instruction()
def quantize_block(v: Vectors, address: Any, codes: Any, factors: Any, negated: Any) -> None:
    """32 numbers as int8 codes, with the block's factors and negated sums.

    The largest magnitude is found on the bits, where NaN and infinity are largest too: the scale
    carries them into every product, instead of losing them among integers.
    """
    b, words = v.builder, vector(I32, BLOCK)
    x = v.load(address, vector(F32, BLOCK), 4)
    magnitudes = b.and_(b.bitcast(x, words), v.same(words, 0x7FFFFFFF))
    largest = b.bitcast(v.reduce("umax", magnitudes), F32)
    scale, inverse = scale_of(v, largest, layout.INT8_MAX)
    q = b.fptosi(v.rounded(b.fmul(x, v.splat(inverse, BLOCK))), words)
    v.store(b.trunc(q, vector(I8, BLOCK)), codes, 1)
    low, high = sums_of_halves(v, q)
    total = b.add(low, high)
    v.store(scale, v.at(factors, 4 * layout.SCALE), 4)
    v.store(b.fmul(scale, b.sitofp(total, F32)), v.at(factors, 4 * layout.TOTAL), 4)
    for n, some in enumerate((total, low, high)):  # NEGATED, NEGATED_LOW, NEGATED_HIGH
        v.store(b.neg(some), v.at(negated, 4 * n), 4)


def scale_of(v: Vectors, largest: Any, max_code: int) -> tuple[Any, Any]:
    """The scale of numbers up to `largest` with codes up to `max_code`, and its inverse."""
    b, nothing, most = v.builder, ir.Constant(F32, 0.0), ir.Constant(F32, float(max_code))
    usable = b.fcmp_ordered(">", largest, nothing)
    return b.fdiv(largest, most), b.select(usable, b.fdiv(most, largest), nothing)


def sums_of_halves(v: Vectors, q: Any) -> tuple[Any, Any]:
    """The sums of the first sixteen codes of a block, and of the others."""
    b, half = v.builder, BLOCK // 2
    low, high = (b.shuffle_vector(q, q, lane_numbers(start, half)) for start in (0, half))
    return v.reduce("add", low), v.reduce("add", high)


@instruction()
def quantize_superblock(v: Vectors, address: Any, out: Any) -> None:
    """256 numbers as hi and lo parts (format Q11), with their sums and scale."""
    b, words = v.builder, vector(I32, BLOCK)
    blocks = range(SUPERBLOCK // BLOCK)
    numbers = [v.load(v.at(address, 4 * BLOCK * n), vector(F32, BLOCK), 4) for n in blocks]
    sizes = [b.and_(b.bitcast(x, words), v.same(words, 0x7FFFFFFF)) for x in numbers]
    size = sizes[0]
    for other in sizes[1:]:
        size = b.select(b.icmp_unsigned(">", size, other), size, other)
    largest = b.bitcast(v.reduce("umax", size), F32)
    scale, inverse = scale_of(v, largest, layout.Q11_MAX)
    v.store(scale, v.at(out, layout.Q11_SCALE), 4)
    for n, x in enumerate(numbers):
        q = b.fptosi(v.rounded(b.fmul(x, v.splat(inverse, BLOCK))), words)
        hi, lo = b.ashr(q, v.same(words, 3)), b.and_(q, v.same(words, layout.LOW_STEPS - 1))
        v.store(b.trunc(hi, vector(I8, BLOCK)), v.at(out, layout.Q11_HI + BLOCK * n), 1)
        v.store(b.trunc(lo, vector(I8, BLOCK)), v.at(out, layout.Q11_LO + BLOCK * n), 1)
        for k, total in enumerate(sums_of_halves(v, q)):
            half = 2 * n + k
            v.store(b.trunc(total, I16), v.at(out, layout.Q11_TOTALS + 2 * half), 2)
            v.store(two_bf16(b, total), v.at(out, layout.Q11_SUMS + 4 * half), 4)


def two_bf16(b: Any, whole: Any) -> Any:
    """A whole number of up to 16 bits as two bfloat16 in a word, which add up to it."""
    lower = b.and_(whole, ir.Constant(I32, 255))
    upper = b.sub(whole, lower)
    first, second = (b.bitcast(b.sitofp(part, F32), I32) for part in (upper, lower))
    return b.or_(b.lshr(first, ir.Constant(I32, 16)), second)


# --- softmax --------------------------------------------------------------------------------------


@instruction(constants=1, returns=types.float32)
def softmax_page_tile(
    v: Vectors, scaled: int, address: Any, visible: Any, accumulator: Any, width: Any, scales: Any
) -> Any:
    """A page's scores become weights e^(score − largest so far), 0 where not visible.

    `scales` holds the scale of every token's key, then of its value: if `scaled` is 2, scores are
    multiplied by the first; if it is 1 or 2, weights, once summed, by the second. The accumulator
    ends in the largest score and the sum of weights so far: both are updated. Returns the factor by
    which the sums of earlier pages must be multiplied. At least one token is visible.
    """
    b, page = v.builder, vector(F32, PAGE)
    seen = b.icmp_signed("<", lane_numbers(0, PAGE), v.splat(b.trunc(visible, I32), PAGE))
    scores = v.load(address, page, 4)
    if scaled == 2:
        scores = b.fmul(scores, v.load(scales, page, 4))
    ends = v.step(accumulator, width, 4)
    before = v.load(ends, F32, 4)
    here = v.largest(b.select(seen, scores, v.same(page, float("-inf"))))
    top = b.select(b.fcmp_ordered(">", before, here), before, here)
    weights = vector_exponential(v, b.fsub(scores, v.splat(top, PAGE)))
    weights = b.select(seen, weights, v.same(page, 0.0))
    stored = weights
    if scaled:
        stored = b.fmul(weights, v.load(v.at(scales, 4 * PAGE), page, 4))
        stored = b.select(seen, stored, v.same(page, 0.0))
    v.store(stored, address, 4)
    shrink = vector_exponential(v, v.splat(b.fsub(before, top), 4))
    shrink = b.extract_element(shrink, ir.Constant(I32, 0))
    total = v.fused(v.load(v.at(ends, 4), F32, 4), shrink, v.total(weights))
    v.store(top, ends, 4)
    v.store(total, v.at(ends, 4), 4)
    return shrink
