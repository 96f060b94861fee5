"""Single rows of a packed matrix as float32: the lookup of embeddings.

All readers have one signature, so that a step can call any of them by its address:

    reader(values, scales, blocks, row, out)

`out[k]` becomes the number in column k of that row; everything is an address or a count. Layouts
are those of layout.py; the numbers equal those of the file to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from glassllama.native.engine.layout import WeightType
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
I32 = np.int32


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


def q8_0(values: int, scales: int, blocks: int, row: int, out: int) -> None:
    group, lane = row // 16, row % 16
    w = bytes8(values + group * blocks * 512, (blocks, 8, 16, 4))
    d, y = words16(scales + group * blocks * 32, (blocks, 16)), floats(out, (blocks, 8, 4))
    for b in range(blocks):
        scale = float_from_half(d[b, lane])
        for q in range(8):
            for k in range(4):
                y[b, q, k] = scale * np.float32(I32(w[b, q, lane, k]) - I32(128))


@inlined
def read_nibbles(w: Any, lane: int, scale: Any, zero_point: int, minimum: Any, y: Any) -> None:
    """A block (4, 16, 4) of nibbles -> y (8, 4) = scale · (nibble − zero_point) + minimum."""
    for q in range(4):
        for k in range(4):
            both = I32(w[q, lane, k])
            y[q, k] = scale * np.float32((both & I32(15)) - I32(zero_point)) + minimum
            y[4 + q, k] = scale * np.float32((both >> I32(4)) - I32(zero_point)) + minimum


def q4_0(values: int, scales: int, blocks: int, row: int, out: int) -> None:
    group, lane = row // 16, row % 16
    w = bytes8(values + group * blocks * 256, (blocks, 4, 16, 4))
    d, y = words16(scales + group * blocks * 32, (blocks, 16)), floats(out, (blocks, 8, 4))
    for b in range(blocks):
        read_nibbles(w[b], lane, float_from_half(d[b, lane]), 8, np.float32(0), y[b])


def q4_1(values: int, scales: int, blocks: int, row: int, out: int) -> None:
    group, lane = row // 16, row % 16
    w = bytes8(values + group * blocks * 256, (blocks, 4, 16, 4))
    d, y = words16(scales + group * blocks * 64, (blocks, 2, 16)), floats(out, (blocks, 8, 4))
    for b in range(blocks):
        scale, minimum = float_from_half(d[b, 0, lane]), float_from_half(d[b, 1, lane])
        read_nibbles(w[b], lane, scale, 0, minimum, y[b])


def q4_k(values: int, scales: int, blocks: int, row: int, out: int) -> None:
    group, lane = row // 16, row % 16
    w = bytes8(values + group * blocks * 256, (blocks, 4, 16, 4))
    d = words16(scales + group * blocks * 40, (blocks // 8, 160))
    small = bytes8(scales + group * blocks * 40, (blocks // 8, 10, 2, 16))
    y = floats(out, (blocks, 8, 4))
    for b in range(blocks):
        own = small[b // 8, 2 + b % 8]
        scale = float_from_half(d[b // 8, lane]) * np.float32(own[0, lane])
        minimum = float_from_half(d[b // 8, 16 + lane]) * np.float32(own[1, lane])
        read_nibbles(w[b], lane, scale, 0, -minimum, y[b])


def q6_k(values: int, scales: int, blocks: int, row: int, out: int) -> None:
    group, lane = row // 16, row % 16
    w = bytes8(values + group * blocks * 384, (blocks, 6, 16, 4))
    d = words16(scales + group * blocks * 36, (blocks // 8, 144))
    small = integers8(scales + group * blocks * 36, (blocks // 8, 18, 16))
    y = floats(out, (blocks, 8, 4))
    for b in range(blocks):
        for q in range(8):
            own = small[b // 8, 2 + b % 8 * 2 + q // 4, lane]
            scale = float_from_half(d[b // 8, lane]) * np.float32(own)
            for k in range(4):
                low = I32(w[b, q % 4, lane, k]) >> I32(q // 4 * 4) & I32(15)
                top = I32(w[b, 4 + q % 2, lane, k]) >> I32(q // 2 * 2) & I32(3)
                y[b, q, k] = scale * np.float32(low + I32(16) * top - I32(32))


READERS: dict[WeightType, Callable[..., None]] = {
    WeightType.F32: f32, WeightType.F16: f16, WeightType.BF16: bf16, WeightType.Q8_0: q8_0,
    WeightType.Q4_0: q4_0, WeightType.Q4_1: q4_1, WeightType.Q4_K: q4_k, WeightType.Q6_K: q6_k,
}  # fmt: skip


@cache
def reader_address(weight_type: WeightType) -> int:
    """The address of the compiled reader of a weight type."""
    return callback_address(SIGNATURE, READERS[weight_type], STRICT)
