"""Single rows of a packed matrix as float32: the lookup of embeddings.

All readers have one signature, so that a step can call any of them by its address:

    reader(values, scales, blocks, row, out)

`out[k]` becomes the number in column k of that row; everything is an address or a count. Layouts
are those of layout.py; the numbers equal those of the file to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from glassllama.native.engine.layout import E2M1, STEPS, WeightType
from glassllama.native.jit.compile import STRICT, callback_address, inlined, joined
from glassllama.native.jit.intrinsics import (
    bytes8,
    float_from_bfloat,
    float_from_half,
    floats,
    integers8,
    types,
    words16,
)

SIGNATURE = types.void(*[types.int64] * 5)
I32, F32 = np.int32, np.float32


def f32(values: int, scales: int, columns: int, row: int, out: int) -> None:
    w, y = floats(values + row // 16 * columns * 64, (columns, 16)), floats(out, columns)
    for k in range(columns):
        y[k] = w[k, row % 16]


def f16(values: int, scales: int, columns: int, row: int, out: int) -> None:
    w, y = words16(values + row // 16 * columns * 32, (columns, 16)), floats(out, columns)
    for k in range(columns):
        y[k] = float_from_half(w[k, row % 16])


def bf16(values: int, scales: int, columns: int, row: int, out: int) -> None:
    """In pairs; an odd last one alone."""
    w, y = words16(values + row // 16 * columns * 32, columns * 16), floats(out, columns)
    for k in range(columns // 2 * 2):
        y[k] = float_from_bfloat(w[(k // 2 * 16 + row % 16) * 2 + k % 2])
    if columns % 2 == 1:
        y[columns - 1] = float_from_bfloat(w[(columns - 1) * 16 + row % 16])


# --- blocks of integers ---------------------------------------------------------------------------


class Form(NamedTuple):
    """A weight type as numbers, which compiled code may close over: see layout.py."""

    low: int  # bits of the planes
    high: int
    zero_point: int
    table: int  # of TABLES; 0: none
    value_bytes: int
    scale_bytes: int
    sums: int
    has_minima: int
    is_super: int
    is_bf16: int


TABLES = np.array([(0,) * 16, STEPS, E2M1], np.int32)


def form_of(weight_type: WeightType) -> Form:
    low, high = (*weight_type.planes, 0)[:2]
    table = [(), STEPS, E2M1].index(weight_type.steps)
    scales = weight_type.scales
    return Form(low, high, weight_type.zero_point, table, weight_type.value_bytes, scales.bytes,
                scales.sums, int(scales.has_minima), int(scales.is_super),
                int(scales.is_bf16))  # fmt: skip


@inlined
def plane(w: Any, first: int, bits: int, q: int, half: int, lane: int, k: int) -> Any:
    """The bits of input 16 · half + 4q + k in a plane whose first vector is `first`; q < 4."""
    if bits == 8:
        return I32(w[first + 4 * half + q, lane, k])
    shift = (q & 3) // bits * bits + 4 * half  # masks, because LLVM does not know the ranges
    return I32(w[first + q % bits, lane, k]) >> I32(shift & 7) & I32((1 << bits) - 1)


@joined
def weight(form: Any, w: Any, q: int, half: int, lane: int, k: int) -> Any:
    """The whole number that stands for input 16 · half + 4q + k of a block w (vectors, 16, 4)."""
    code = plane(w, 0, form.low, q, half, lane, k)
    if form.high > 0:
        code |= plane(w, form.low, form.high, q, half, lane, k) << I32(form.low)
    if form.table > 0:
        return TABLES[form.table, code]
    return code - I32(form.zero_point)


@joined
def scale_and_minimum(form: Any, scales: int, b: int, half: int, lane: int) -> Any:
    """Of a half of block b: a weight is scale · whole number + minimum. `scales` of the group."""
    count = 1 + form.has_minima
    if form.is_super == 0:
        d = words16(scales + b * form.scale_bytes, 32)
        scale = float_from_bfloat(d[lane]) if form.is_bf16 else float_from_half(d[lane])
        return scale, float_from_half(d[16 + lane]) if form.has_minima else F32(0)
    start, step = scales + b // 8 * 8 * form.scale_bytes, form.scale_bytes - 4 * count
    d, own = words16(start, 32), start + 32 * count + b % 8 * step + 16 * half
    small, scale = bytes8(own, 32), float_from_half(d[lane])
    if form.has_minima == 0:
        return scale * F32(integers8(own, 16)[lane]), F32(0)
    minimum = -float_from_half(d[16 + lane])
    if form.sums == 2:
        return scale * F32(small[lane] & 15), minimum * F32(small[lane] >> 4)
    return scale * F32(small[lane]), minimum * F32(small[16 + lane])


@inlined
def read_blocks(form: Any, values: int, scales: int, blocks: int, row: int, out: int) -> None:
    group, lane = row // 16, row % 16
    w = bytes8(values + group * blocks * form.value_bytes, (blocks, form.value_bytes // 64, 16, 4))
    d, y = scales + group * blocks * form.scale_bytes, floats(out, (blocks, 2, 4, 4))
    for b in range(blocks):
        for half in range(2):
            scale, minimum = scale_and_minimum(form, d, b, half * (form.sums - 1), lane)
            for q in range(4):
                for k in range(4):
                    y[b, half, q, k] = scale * F32(weight(form, w[b], q, half, lane, k)) + minimum


def reader(weight_type: WeightType) -> Callable[..., None]:
    """The function to compile for a weight type."""
    if weight_type.is_float:
        return FLOATS[weight_type]
    form = form_of(weight_type)

    def read(values: int, scales: int, blocks: int, row: int, out: int) -> None:
        read_blocks(form, values, scales, blocks, row, out)

    return read


FLOATS: dict[WeightType, Callable[..., None]] = {
    WeightType.F32: f32, WeightType.F16: f16, WeightType.BF16: bf16,
}  # fmt: skip


@cache
def reader_address(weight_type: WeightType) -> int:
    """The address of the compiled reader of a weight type."""
    return callback_address(SIGNATURE, reader(weight_type), STRICT)
