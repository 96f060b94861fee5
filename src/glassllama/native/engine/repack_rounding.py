"""Quantisation at load, compiled: float32 rows straight into the packed layout of Q8_0 or Q4_0.

The numbers are those of ggml's quantisers to the bit, as formats/quantize.py says them plainly, as
long as they are finite. A block with a NaN or an infinity gets a NaN for its scale, so that a
broken model is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.native.engine.layout import BLOCK, GROUP, WEIGHT_TYPES
from glassllama.native.engine.repack_moves import moving, store32, word_place
from glassllama.native.jit.compile import inlined
from glassllama.native.jit.intrinsics import carray, float_from_bits, floats, pointer, stack_words

LANES = GROUP
MAGNITUDE = np.int32(0x7FFFFFFF)  # a float32's bits without its sign; these order like the numbers
INFINITY = np.int32(0x7F800000)  # and whatever is above is no number


@inlined
def largest_magnitude(bits: Any, start: int) -> Any:
    """Of 32 float32, given as int32: the bits of the largest, without sign."""
    most = np.int32(0)
    for i in range(BLOCK):
        most = max(most, bits[start + i] & MAGNITUDE)
    return most


@inlined
def scale_from(most: int, scale: float) -> Any:
    """The scale, or NaN where the largest of its numbers is none."""
    return float_from_bits(MAGNITUDE) if most >= INFINITY else scale


@inlined
def inverse(scale: float) -> Any:
    return np.float32(1) / scale if scale != 0 else np.float32(0)


@moving
def round_q8_0(numbers: int, values: int, scales: int, columns: int, groups: int) -> None:
    """Codes −127 … 127, halves away from zero; the largest of a block gets ±127.

    scales: (groups, blocks, 16) float32, to be rounded to halves by the caller.
    """
    blocks = columns // BLOCK
    bits = carray(pointer(numbers), groups * LANES * columns, np.int32)
    inputs = floats(numbers, groups * LANES * columns)
    line = stack_words()  # the codes of one block
    codes, words = carray(line, BLOCK, np.uint8), carray(line, BLOCK // 4, np.uint32)
    factors = floats(scales, groups * blocks * LANES)
    for cell in range(groups * blocks):
        for lane in range(LANES):
            start = (cell // blocks * LANES + lane) * columns + cell % blocks * BLOCK
            most = largest_magnitude(bits, start)
            scale = float_from_bits(most) / np.float32(127)
            factors[cell * LANES + lane] = scale_from(most, scale)
            times = inverse(scale)
            for i in range(BLOCK):
                code = inputs[start + i] * times
                code += np.float32(0.5) if code >= 0 else np.float32(-0.5)
                codes[i] = np.uint8(np.int32(code) + np.int32(128))
            for w in range(8):
                store32(word_place(values, cell, 8, w, lane), words[w])


@moving
def round_q4_0(numbers: int, values: int, scales: int, columns: int, groups: int) -> None:
    """Codes 0 … 15 for −8 … 7; the first number farthest from zero gets −8."""
    blocks = columns // BLOCK
    bits = carray(pointer(numbers), groups * LANES * columns, np.int32)
    inputs = floats(numbers, groups * LANES * columns)
    line = stack_words()  # the codes of one block
    codes, words = carray(line, BLOCK, np.uint8), carray(line, BLOCK // 4, np.uint32)
    factors = floats(scales, groups * blocks * LANES)
    for cell in range(groups * blocks):
        for lane in range(LANES):
            start = (cell // blocks * LANES + lane) * columns + cell % blocks * BLOCK
            most, farthest = largest_magnitude(bits, start), start
            while bits[farthest] & MAGNITUDE != most:
                farthest += 1
            scale = inputs[farthest] / np.float32(-8)
            factors[cell * LANES + lane] = scale_from(most, scale)
            times = inverse(scale)
            for i in range(BLOCK // 2):
                low = four_bits(inputs[start + i] * times)
                high = four_bits(inputs[start + BLOCK // 2 + i] * times)
                codes[i] = np.uint8(low | high << np.int32(4))
            for w in range(4):
                store32(word_place(values, cell, 4, w, lane), words[w])


@inlined
def four_bits(steps: float) -> Any:
    """Steps of −8 … 8 -> the nearest code, at most 15."""
    return min(np.int32(steps + np.float32(8.5)), np.int32(15))


ROUND: dict[str, Callable[..., None]] = {"Q8_0": round_q8_0, "Q4_0": round_q4_0}


def quantise_groups(
    kind: str, numbers: NDArray[np.float32], values: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Rows (16·G, columns) -> codes in `values`; returns the scales, (G, blocks, 16) float32."""
    numbers = np.ascontiguousarray(numbers)
    groups, columns = len(values), numbers.shape[1]
    assert len(numbers) == groups * GROUP
    assert columns == values.shape[1] * BLOCK
    assert numbers.dtype == np.float32
    scales = np.empty((groups, WEIGHT_TYPES[kind].blocks(columns), GROUP), np.float32)
    ROUND[kind](
        numbers.ctypes.data, values.ctypes.data, scales.ctypes.data, columns, groups
    )  # fmt: skip
    return scales
