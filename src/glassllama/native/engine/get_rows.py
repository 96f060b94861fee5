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
from glassllama.native.jit.compile import STRICT, callback_address, inlined
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
def plane(w: Any, first: int, bits: int, q: int, lane: int, k: int) -> Any:
    """The bits of input 4q+k in a plane whose first vector is `first`."""
    return I32(w[first + q % bits, lane, k]) >> I32(q // bits * bits) & I32((1 << bits) - 1)


@inlined
def weight(form: Any, w: Any, q: int, lane: int, k: int) -> Any:
    """The whole number that stands for input 4q+k of a block w (vectors, 16, 4)."""
    code = plane(w, 0, form.low, q, lane, k)
    if form.high > 0:
        code |= plane(w, form.low, form.high, q, lane, k) << I32(form.low)
    if form.table > 0:
        return TABLES[form.table, code]
    return code - I32(form.zero_point)


@inlined
def half_at(address: int) -> Any:
    return float_from_half(words16(address, 1)[0])


@inlined
def scale_and_minimum(form: Any, scales: int, b: int, half: int, lane: int) -> Any:
    """Of a half of block b: a weight is scale · whole number + minimum. `scales` of the group."""
    if form.is_super == 0:
        own = scales + b * form.scale_bytes + 2 * lane
        if form.is_bf16 == 1:
            return float_from_bfloat(words16(own, 1)[0]), F32(0)
        return half_at(own), half_at(own + 32) if form.has_minima else F32(0)
    start = scales + b // 8 * 8 * form.scale_bytes
    d, dmin = half_at(start + 2 * lane), half_at(start + 32 + 2 * lane)
    step = form.scale_bytes - 4 * (1 + form.has_minima)  # bytes of a block's own
    own = start + 32 * (1 + form.has_minima) + b % 8 * step + 16 * half + lane
    if form.has_minima == 0:
        return d * F32(integers8(own, 1)[0]), F32(0)
    first = bytes8(own, 17)
    if form.sums == 2:
        return d * F32(first[0] & 15), -(dmin * F32(first[0] >> 4))
    return d * F32(first[0]), -(dmin * F32(first[16]))


@inlined
def read_blocks(form: Any, values: int, scales: int, blocks: int, row: int, out: int) -> None:
    group, lane = row // 16, row % 16
    w = bytes8(values + group * blocks * form.value_bytes, (blocks, form.value_bytes // 64, 16, 4))
    d, y = scales + group * blocks * form.scale_bytes, floats(out, (blocks, 8, 4))
    for b in range(blocks):
        for q in range(8):
            scale, minimum = scale_and_minimum(form, d, b, q // 4 * (form.sums - 1), lane)
            for k in range(4):
                y[b, q, k] = scale * F32(weight(form, w[b], q, lane, k)) + minimum


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
