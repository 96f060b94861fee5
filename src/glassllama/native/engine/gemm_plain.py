"""The matrix kernels as plain loops: every processor can run them, and the faster ones equal them.

All kernels have one signature, so that a step can call any of them by its address:

    kernel(values, scales, blocks, inputs, input_stride, factors, factor_stride,
           tokens, outputs, output_stride, first, last)

For groups first … last-1 of a packed matrix (layout.py) and every token t, `outputs[t, 16·group :
16·group+16]` becomes the sixteen rows' dot products with `inputs[t]`. Everything is an address or a
count; strides are bytes from token to token. Integer kernels read INT8 inputs; of a row's factors
these use two for every block: the inputs' scale s, and s times their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glassllama.native.engine.layout import SCALE, TOTAL, WeightType
from glassllama.native.jit.compile import inlined
from glassllama.native.jit.intrinsics import (
    bytes8,
    carray,
    float_from_bfloat,
    float_from_half,
    floats,
    integers8,
    stack_words,
    words16,
)

FLOAT, INT = np.float32, np.int32
LOW = INT(15)


# --- float weights, float32 inputs ----------------------------------------------------------------


@inlined
def add_products_f32(part: Any, values: int, columns: int, k: int, x: Any) -> None:
    """part (16,) += column k of sixteen rows, times one input."""
    w = floats(values + k * 64, 16)
    for row in range(16):
        part[row] += w[row] * x


@inlined
def add_products_f16(part: Any, values: int, columns: int, k: int, x: Any) -> None:
    w = words16(values + k * 32, 16)
    for row in range(16):
        part[row] += float_from_half(w[row]) * x


@inlined
def add_products_bf16(part: Any, values: int, columns: int, k: int, x: Any) -> None:
    """Columns are stored in pairs, an odd last one alone."""
    start, step = (k // 2 * 32 + k % 2, 2) if k < columns // 2 * 2 else (k * 16, 1)
    w = words16(values + start * 2, 32)
    for row in range(16):
        part[row] += float_from_bfloat(w[row * step]) * x


@inlined
def float_gemm(
    add_products: Any, column_bytes: int, values: int, columns: int, inputs: int,
    input_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """All groups and tokens. Sums of 32 products are added up, so that rounding errors stay small.

    `add_products` is one of the functions above.
    """
    part = carray(stack_words(), 16, np.float32)
    for group in range(first, last):
        w = values + group * columns * column_bytes
        for t in range(tokens):
            x = floats(inputs + t * input_stride, columns)
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = FLOAT(0)
            for start in range(0, columns, 32):
                for row in range(16):
                    part[row] = FLOAT(0)
                for k in range(start, min(start + 32, columns)):
                    add_products(part, w, columns, k, x[k])
                for row in range(16):
                    y[row] += part[row]


def f32(
    values: int, scales: int, columns: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    float_gemm(add_products_f32, 64, values, columns, inputs, input_stride, tokens, outputs,
               output_stride, first, last)  # fmt: skip


def f16(
    values: int, scales: int, columns: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    float_gemm(add_products_f16, 32, values, columns, inputs, input_stride, tokens, outputs,
               output_stride, first, last)  # fmt: skip


def bf16(
    values: int, scales: int, columns: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    float_gemm(add_products_bf16, 32, values, columns, inputs, input_stride, tokens, outputs,
               output_stride, first, last)  # fmt: skip


# --- integer weights, int8 inputs -----------------------------------------------------------------


@inlined
def begin(total: Any, x: Any, first: int, last: int, zero_point: int) -> None:
    """Sums begin with the zero-point correction: −zero_point · Σ x, of quads first … last-1."""
    start = INT(0)
    for q in range(first, last):
        for k in range(4):
            start -= INT(zero_point) * INT(x[q, k])
    for row in range(16):
        total[row] = start


@inlined
def add_quad(total: Any, w: Any, x: Any) -> None:
    """Add four bytes of each of sixteen rows (64,) times four inputs."""
    x0, x1, x2, x3 = INT(x[0]), INT(x[1]), INT(x[2]), INT(x[3])
    for row in range(16):
        w0, w1 = INT(w[4 * row]), INT(w[4 * row + 1])
        w2, w3 = INT(w[4 * row + 2]), INT(w[4 * row + 3])
        total[row] += w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3


@inlined
def add_nibbles(total: Any, values: int, x: Any, zero_point: int) -> None:
    """The sums of a block of bytes that hold two weights: low nibbles are its first inputs."""
    w = bytes8(values, (4, 64))
    begin(total, x, 0, 8, zero_point)
    for q in range(4):
        a0, a1, a2, a3 = INT(x[q, 0]), INT(x[q, 1]), INT(x[q, 2]), INT(x[q, 3])
        b0, b1, b2, b3 = INT(x[4 + q, 0]), INT(x[4 + q, 1]), INT(x[4 + q, 2]), INT(x[4 + q, 3])
        for row in range(16):
            w0, w1 = INT(w[q, 4 * row]), INT(w[q, 4 * row + 1])
            w2, w3 = INT(w[q, 4 * row + 2]), INT(w[q, 4 * row + 3])
            lows = (w0 & LOW) * a0 + (w1 & LOW) * a1 + (w2 & LOW) * a2 + (w3 & LOW) * a3
            highs = (w0 >> 4) * b0 + (w1 >> 4) * b1 + (w2 >> 4) * b2 + (w3 >> 4) * b3
            total[row] += lows + highs


@inlined
def add_block_q8_0(y: Any, values: int, scales: int, b: int, x: Any, s: Any, total: Any) -> None:
    """y (16,) += block b of sixteen rows times its inputs x (8, 4), whose scales are s (2,).

    `values` is the address of the block, `scales` that of the group.
    """
    w, d = bytes8(values, (8, 64)), words16(scales + b * 32, 16)
    begin(total, x, 0, 8, 128)
    for q in range(8):
        add_quad(total, w[q], x[q])
    for row in range(16):
        y[row] += float_from_half(d[row]) * (FLOAT(total[row]) * s[SCALE])


@inlined
def add_block_q4_0(y: Any, values: int, scales: int, b: int, x: Any, s: Any, total: Any) -> None:
    d = words16(scales + b * 32, 16)
    add_nibbles(total, values, x, 8)
    for row in range(16):
        y[row] += float_from_half(d[row]) * (FLOAT(total[row]) * s[SCALE])


@inlined
def add_block_q4_1(y: Any, values: int, scales: int, b: int, x: Any, s: Any, total: Any) -> None:
    """Weights d · nibble + m: the minimum m is multiplied by the sum of the inputs."""
    d = words16(scales + b * 64, (2, 16))
    add_nibbles(total, values, x, 0)
    for row in range(16):
        y[row] += float_from_half(d[0, row]) * (FLOAT(total[row]) * s[SCALE])
        y[row] += float_from_half(d[1, row]) * s[TOTAL]


@inlined
def add_block_q4_k(y: Any, values: int, scales: int, b: int, x: Any, s: Any, total: Any) -> None:
    """Weights d · scale · nibble − dmin · minimum, with d and dmin of eight blocks together."""
    d, small = words16(scales + b // 8 * 320, 32), bytes8(scales + b // 8 * 320, (10, 32))
    add_nibbles(total, values, x, 0)
    own = small[2 + b % 8]
    for row in range(16):
        scale = float_from_half(d[row]) * FLOAT(own[row])
        minimum = float_from_half(d[16 + row]) * FLOAT(own[16 + row])
        y[row] += scale * (FLOAT(total[row]) * s[SCALE]) - minimum * s[TOTAL]


@inlined
def add_six_bits(total: Any, w: Any, high: Any, upper: bool, shift: int, x: Any) -> None:
    """As `add_quad`: four bits from w's low or high nibbles, two more from `high`."""
    for row in range(16):
        for k in range(4):
            low = INT(w[4 * row + k]) >> INT(4) if upper else INT(w[4 * row + k]) & LOW
            top = (INT(high[4 * row + k]) >> INT(shift)) & INT(3)
            total[row] += (low + INT(16) * top) * INT(x[k])


@inlined
def add_block_q6_k(y: Any, values: int, scales: int, b: int, x: Any, s: Any, total: Any) -> None:
    """Weights d · scale · (code − 32), a scale for sixteen inputs, d of eight blocks together."""
    w, d = bytes8(values, (6, 64)), words16(scales + b // 8 * 288, 16)
    small = integers8(scales + b // 8 * 288, (18, 16))
    for half in range(2):
        begin(total, x, 4 * half, 4 * half + 4, 32)
        for q in range(4):
            shift = 2 * (2 * half + q // 2)
            add_six_bits(total, w[q], w[4 + q % 2], half == 1, shift, x[4 * half + q])
        own = small[2 + b % 8 * 2 + half]
        for row in range(16):
            dot = FLOAT(total[row]) * s[SCALE]
            y[row] += float_from_half(d[row]) * FLOAT(own[row]) * dot


@inlined
def integer_gemm(
    add_block: Any, value_bytes: int, scale_bytes: int, values: int, scales: int, blocks: int,
    inputs: int, input_stride: int, factors: int, factor_stride: int, tokens: int, outputs: int,
    output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """All groups and tokens, block by block; `add_block` is one of the functions above."""
    total = carray(stack_words(), 16, np.int32)
    for group in range(first, last):
        w, d = values + group * blocks * value_bytes, scales + group * blocks * scale_bytes
        for t in range(tokens):
            x = integers8(inputs + t * input_stride, (blocks, 8, 4))
            s = floats(factors + t * factor_stride, (blocks, 2))
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = FLOAT(0)
            for b in range(blocks):
                add_block(y, w + b * value_bytes, d, b, x[b], s[b], total)


def q8_0(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    integer_gemm(add_block_q8_0, 512, 32, values, scales, blocks, inputs, input_stride, factors,
                 factor_stride, tokens, outputs, output_stride, first, last)  # fmt: skip


def q4_0(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    integer_gemm(add_block_q4_0, 256, 32, values, scales, blocks, inputs, input_stride, factors,
                 factor_stride, tokens, outputs, output_stride, first, last)  # fmt: skip


def q4_1(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    integer_gemm(add_block_q4_1, 256, 64, values, scales, blocks, inputs, input_stride, factors,
                 factor_stride, tokens, outputs, output_stride, first, last)  # fmt: skip


def q4_k(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    integer_gemm(add_block_q4_k, 256, 40, values, scales, blocks, inputs, input_stride, factors,
                 factor_stride, tokens, outputs, output_stride, first, last)  # fmt: skip


def q6_k(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    integer_gemm(add_block_q6_k, 384, 36, values, scales, blocks, inputs, input_stride, factors,
                 factor_stride, tokens, outputs, output_stride, first, last)  # fmt: skip


PLAIN: dict[WeightType, Callable[..., None]] = {
    WeightType.F32: f32, WeightType.F16: f16, WeightType.BF16: bf16, WeightType.Q8_0: q8_0,
    WeightType.Q4_0: q4_0, WeightType.Q4_1: q4_1, WeightType.Q4_K: q4_k, WeightType.Q6_K: q6_k,
}  # fmt: skip
