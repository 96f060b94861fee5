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

from glassllama.native.engine.get_rows import form_of, scale_and_minimum, weight
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
    part = carray(stack_words(1), 16, np.float32)
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
def add_block(
    form: Any, y: Any, values: int, scales: int, b: int, x: Any, s: Any, total: Any
) -> None:
    """y (16,) += block b of sixteen rows times its inputs x (2, 4, 4), whose scales are s (2,).

    `values` is the address of the block, `scales` that of the group. `total` (2, 16) is for the
    sums of the halves of the block: computed together, because they share bytes.
    """
    w, last = bytes8(values, (form.value_bytes // 64, 16, 4)), form.sums - 1
    for row in range(16):
        total[0, row] = total[1, row] = 0
    for q in range(4):
        a0, a1, a2, a3 = INT(x[0, q, 0]), INT(x[0, q, 1]), INT(x[0, q, 2]), INT(x[0, q, 3])
        b0, b1, b2, b3 = INT(x[1, q, 0]), INT(x[1, q, 1]), INT(x[1, q, 2]), INT(x[1, q, 3])
        for row in range(16):
            w0, w1 = weight(form, w, q, 0, row, 0), weight(form, w, q, 0, row, 1)
            w2, w3 = weight(form, w, q, 0, row, 2), weight(form, w, q, 0, row, 3)
            total[0, row] += w0 * a0 + w1 * a1 + w2 * a2 + w3 * a3
            w0, w1 = weight(form, w, q, 1, row, 0), weight(form, w, q, 1, row, 1)
            w2, w3 = weight(form, w, q, 1, row, 2), weight(form, w, q, 1, row, 3)
            total[last, row] += w0 * b0 + w1 * b1 + w2 * b2 + w3 * b3
    for half in range(form.sums):
        seen = s[TOTAL]  # the sum of the inputs that share a minimum
        if form.sums == 2:
            whole = INT(0)
            for n in range(16):
                whole += INT(x[half, n // 4, n % 4])
            seen = FLOAT(whole) * s[SCALE]
        for row in range(16):
            scale, minimum = scale_and_minimum(form, scales, b, half, row)
            y[row] += scale * (FLOAT(total[half, row]) * s[SCALE])
            if form.has_minima:
                y[row] += minimum * seen


@inlined
def integer_gemm(
    form: Any, values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
    factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """All groups and tokens, block by block."""
    total = carray(stack_words(2), (2, 16), np.int32)
    for group in range(first, last):
        w = values + group * blocks * form.value_bytes
        d = scales + group * blocks * form.scale_bytes
        for t in range(tokens):
            x = integers8(inputs + t * input_stride, (blocks, 2, 4, 4))
            s = floats(factors + t * factor_stride, (blocks, 2))
            y = floats(outputs + t * output_stride + group * 64, 16)
            for row in range(16):
                y[row] = FLOAT(0)
            for b in range(blocks):
                add_block(form, y, w + b * form.value_bytes, d, b, x[b], s[b], total)


def kernel(weight_type: WeightType) -> Callable[..., None]:
    """The function to compile for a weight type: see above."""
    if weight_type.is_float:
        return FLOATS[weight_type]
    form = form_of(weight_type)

    def run(
        values: int, scales: int, blocks: int, inputs: int, input_stride: int, factors: int,
        factor_stride: int, tokens: int, outputs: int, output_stride: int, first: int, last: int,
    ) -> None:  # fmt: skip
        integer_gemm(form, values, scales, blocks, inputs, input_stride, factors, factor_stride,
                     tokens, outputs, output_stride, first, last)  # fmt: skip

    return run


FLOATS: dict[WeightType, Callable[..., None]] = {
    WeightType.F32: f32, WeightType.F16: f16, WeightType.BF16: bf16,
}  # fmt: skip
