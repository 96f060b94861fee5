"""The matrix kernels as plain loops: what every processor can run, and the twins of faster ones.

All have one form, so that the step can call any of them by its address:

    kernel(values, scales, blocks, inputs, input_stride, factors, factor_stride,
           tokens, outputs, output_stride, first, last)

For groups first … last-1 of a packed matrix (layout.py) and every token t, `outputs[t, 16·group :
16·group+16]` becomes the sixteen rows' dot products with `inputs[t]`. Everything is an address or a
count; strides are bytes from token to token. Integer kernels read int8 inputs and a row's factors
(quantize_activations.py), of which these want two for every block: the inputs' scale s, and s times
their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glassllama.native.engine.quantize_activations import SCALE, TOTAL
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

I32 = np.int32
LOW = I32(15)


def f32(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Float32 weights and inputs. Sums of 32 products are added up: rounding stays small."""
    part = carray(stack_words(), 16, np.float32)
    for group in range(first, last):
        w = floats(values + group * blocks * 64, (blocks, 16))
        for t in range(tokens):
            x = floats(inputs + t * input_stride, blocks)
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = np.float32(0)
            for start in range(0, blocks, 32):
                for row in range(16):
                    part[row] = np.float32(0)
                for k in range(start, min(start + 32, blocks)):
                    for row in range(16):
                        part[row] += w[k, row] * x[k]
                for row in range(16):
                    y[row] += part[row]


def f16(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Half-precision weights, float32 inputs."""
    part = carray(stack_words(), 16, np.float32)
    for group in range(first, last):
        w = words16(values + group * blocks * 32, (blocks, 16))
        for t in range(tokens):
            x = floats(inputs + t * input_stride, blocks)
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = np.float32(0)
            for start in range(0, blocks, 32):
                for row in range(16):
                    part[row] = np.float32(0)
                for k in range(start, min(start + 32, blocks)):
                    for row in range(16):
                        part[row] += float_from_half(w[k, row]) * x[k]
                for row in range(16):
                    y[row] += part[row]


def bf16(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Bfloat16 weights in pairs (an odd last one alone), float32 inputs."""
    part = carray(stack_words(), 16, np.float32)
    for group in range(first, last):
        w, pairs = words16(values + group * blocks * 32, blocks * 16), blocks // 2
        for t in range(tokens):
            x = floats(inputs + t * input_stride, blocks)
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = np.float32(0)
            for start in range(0, blocks, 32):
                for row in range(16):
                    part[row] = np.float32(0)
                for k in range(start, min(start + 32, blocks)):
                    start_of_pair, step = (k // 2 * 32 + k % 2, 2) if k < 2 * pairs else (k * 16, 1)
                    for row in range(16):
                        part[row] += float_from_bfloat(w[start_of_pair + row * step]) * x[k]
                for row in range(16):
                    y[row] += part[row]


@inlined
def begin(total: Any, x: Any, first: int, last: int, centre: int) -> None:
    """Sums begin with what weights are stored too large: −centre · Σ x, of quads first … last-1."""
    start = I32(0)
    for v in range(first, last):
        for k in range(4):
            start -= I32(centre) * I32(x[v, k])
    for row in range(16):
        total[row] = start


@inlined
def add_quad(total: Any, w: Any, x: Any) -> None:
    """Four bytes of each of sixteen rows (64,) times the four inputs they meet, added up."""
    x0, x1, x2, x3 = I32(x[0]), I32(x[1]), I32(x[2]), I32(x[3])
    for row in range(16):
        w0, w1 = I32(w[4 * row]), I32(w[4 * row + 1])
        w2, w3 = I32(w[4 * row + 2]), I32(w[4 * row + 3])
        total[row] += w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3


@inlined
def add_nibbles(total: Any, w: Any, low: Any, high: Any) -> None:
    """As `add_quad`, for bytes that hold two weights: low nibbles meet `low`, high ones `high`."""
    a0, a1, a2, a3 = I32(low[0]), I32(low[1]), I32(low[2]), I32(low[3])
    b0, b1, b2, b3 = I32(high[0]), I32(high[1]), I32(high[2]), I32(high[3])
    for row in range(16):
        w0, w1 = I32(w[4 * row]), I32(w[4 * row + 1])
        w2, w3 = I32(w[4 * row + 2]), I32(w[4 * row + 3])
        lows = (w0 & LOW) * a0 + (w1 & LOW) * a1 + (w2 & LOW) * a2 + (w3 & LOW) * a3
        highs = (w0 >> 4) * b0 + (w1 >> 4) * b1 + (w2 >> 4) * b2 + (w3 >> 4) * b3
        total[row] += lows + highs


def q8_0(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Weights stored plus 128: Σ (byte − 128) · x = −128 · Σ x + Σ byte · x."""
    total = carray(stack_words(), 16, np.int32)
    for group in range(first, last):
        w = bytes8(values + group * blocks * 512, (blocks, 8, 64))
        d = words16(scales + group * blocks * 32, (blocks, 16))
        for t in range(tokens):
            x = integers8(inputs + t * input_stride, (blocks, 8, 4))
            s = floats(factors + t * factor_stride, (blocks, 2))
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = np.float32(0)
            for b in range(blocks):
                begin(total, x[b], 0, 8, 128)
                for v in range(8):
                    add_quad(total, w[b, v], x[b, v])
                for row in range(16):
                    y[row] += float_from_half(d[b, row]) * (np.float32(total[row]) * s[b, SCALE])


def q4_0(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Weights stored plus 8."""
    total = carray(stack_words(), 16, np.int32)
    for group in range(first, last):
        w = bytes8(values + group * blocks * 256, (blocks, 4, 64))
        d = words16(scales + group * blocks * 32, (blocks, 16))
        for t in range(tokens):
            x = integers8(inputs + t * input_stride, (blocks, 8, 4))
            s = floats(factors + t * factor_stride, (blocks, 2))
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = np.float32(0)
            for b in range(blocks):
                begin(total, x[b], 0, 8, 8)
                for v in range(4):
                    add_nibbles(total, w[b, v], x[b, v], x[b, 4 + v])
                for row in range(16):
                    y[row] += float_from_half(d[b, row]) * (np.float32(total[row]) * s[b, SCALE])


def q4_1(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Weights d · nibble + m: the minimum m meets the sum of the inputs."""
    total = carray(stack_words(), 16, np.int32)
    for group in range(first, last):
        w = bytes8(values + group * blocks * 256, (blocks, 4, 64))
        d = words16(scales + group * blocks * 64, (blocks, 2, 16))
        for t in range(tokens):
            x = integers8(inputs + t * input_stride, (blocks, 8, 4))
            s = floats(factors + t * factor_stride, (blocks, 2))
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = np.float32(0)
            for b in range(blocks):
                begin(total, x[b], 0, 8, 0)
                for v in range(4):
                    add_nibbles(total, w[b, v], x[b, v], x[b, 4 + v])
                scale, offset = s[b, SCALE], s[b, TOTAL]
                for row in range(16):
                    dot = np.float32(total[row]) * scale
                    y[row] += float_from_half(d[b, 0, row]) * dot
                    y[row] += float_from_half(d[b, 1, row]) * offset


def q4_k(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Weights d · scale · nibble − dmin · minimum, with d and dmin of eight blocks together."""
    total = carray(stack_words(), 16, np.int32)
    for group in range(first, last):
        w = bytes8(values + group * blocks * 256, (blocks, 4, 64))
        d = words16(scales + group * blocks * 40, (blocks // 8, 160))
        small = bytes8(scales + group * blocks * 40, (blocks // 8, 10, 32))
        for t in range(tokens):
            x = integers8(inputs + t * input_stride, (blocks, 8, 4))
            s = floats(factors + t * factor_stride, (blocks, 2))
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = np.float32(0)
            for b in range(blocks):
                begin(total, x[b], 0, 8, 0)
                for v in range(4):
                    add_nibbles(total, w[b, v], x[b, v], x[b, 4 + v])
                own = small[b // 8, 2 + b % 8]
                for row in range(16):
                    scale = float_from_half(d[b // 8, row]) * np.float32(own[row])
                    minimum = float_from_half(d[b // 8, 16 + row]) * np.float32(own[16 + row])
                    y[row] += scale * (np.float32(total[row]) * s[b, SCALE]) - minimum * s[b, TOTAL]


@inlined
def add_six_bits(total: Any, w: Any, high: Any, upper: bool, shift: int, x: Any) -> None:
    """As `add_quad`: four bits from w's low or high nibbles, two more from `high`."""
    for row in range(16):
        for k in range(4):
            low = I32(w[4 * row + k]) >> I32(4) if upper else I32(w[4 * row + k]) & LOW
            top = (I32(high[4 * row + k]) >> I32(shift)) & I32(3)
            total[row] += (low + I32(16) * top) * I32(x[k])


def q6_k(
    values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Weights d · scale · (code − 32), a scale for sixteen inputs, d of eight blocks together."""
    total = carray(stack_words(), 16, np.int32)
    for group in range(first, last):
        w = bytes8(values + group * blocks * 384, (blocks, 6, 64))
        d = words16(scales + group * blocks * 36, (blocks // 8, 144))
        small = integers8(scales + group * blocks * 36, (blocks // 8, 18, 16))
        for t in range(tokens):
            x = integers8(inputs + t * input_stride, (blocks, 8, 4))
            s = floats(factors + t * factor_stride, (blocks, 2))
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = np.float32(0)
            for b in range(blocks):
                for half in range(2):
                    begin(total, x[b], 4 * half, 4 * half + 4, 32)
                    for q in range(4):
                        high, shift = w[b, 4 + q % 2], 2 * (2 * half + q // 2)
                        add_six_bits(total, w[b, q], high, half == 1, shift, x[b, 4 * half + q])
                    own = small[b // 8, 2 + b % 8 * 2 + half]
                    for row in range(16):
                        dot = np.float32(total[row]) * s[b, SCALE]
                        y[row] += float_from_half(d[b // 8, row]) * np.float32(own[row]) * dot


PLAIN: dict[str, Callable[..., None]] = {
    "F32": f32, "F16": f16, "BF16": bf16, "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1,
    "Q4_K": q4_k, "Q6_K": q6_k,
}  # fmt: skip
