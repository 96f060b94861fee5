"""From a file's rows to the packed layout (layout.py): moved as they are, or quantized.

`pack_matrix` is the only entrance. The compiled functions below it move groups of sixteen rows.
They take addresses: of the first row in the file's form, and of the values and scales of the first
group; then the bytes of a row, the number of groups and of blocks in a row. A word is four bytes:
four inputs, or eight nibbles. Blocks in a file begin at any even address, so words are loaded
without alignment. The same in NumPy is in tests/native/engine/plain_packing.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.native.engine import layout
from glassllama.native.engine.layout import BLOCK, GROUP, Matrix, WeightType
from glassllama.native.jit.compile import entry, inlined
from glassllama.native.jit.intrinsics import (
    I8,
    I16,
    I32,
    Vectors,
    carray,
    float_from_bits,
    floats,
    instruction,
    pointer,
    stack_words,
    types,
)

LANES = GROUP
LOW, HIGH, TOP = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0), np.uint32(0x03030303)
ONES, SPREAD = np.uint32(0x01010101), np.uint32(0x00204081)  # SPREAD: bit n to bit 8n
SIGNS = np.uint32(0x80808080)
MAGNITUDE = np.int32(0x7FFFFFFF)  # a float32's bits without its sign; these order like the numbers
INFINITY = np.int32(0x7F800000)  # and whatever is above is NaN


def pack_matrix(matrix: Matrix, first: int, rows: NDArray[Any]) -> None:
    """Pack rows `first` … (a multiple of sixteen) of a matrix.

    `rows` is the blocks of a file of the matrix's own type, as uint8 (rows, bytes of a row); or
    numbers (rows, columns) of the matrix's own float type; or float32 numbers, which are quantized
    to the matrix's Q8_0 or Q4_0. If it ends within a group of sixteen rows, it must be the end of
    the matrix, and rows of zeros follow.
    """
    short = -len(rows) % GROUP
    if short:
        rows = np.concatenate([rows, np.zeros((short, *rows.shape[1:]), rows.dtype)])
    groups = slice(first // GROUP, (first + len(rows)) // GROUP)
    values, scales = matrix.values[groups], matrix.scales[groups]
    if matrix.weight_type.is_float:
        interleave_floats(np.asarray(rows, matrix.weight_type.dtype), values)
    elif rows.dtype == np.uint8:
        move_blocks(matrix, rows, values, scales)
    else:
        quantize_rows(matrix, rows, values, scales)


def row_slices(matrix: Matrix, numbers: int) -> Iterator[slice]:
    """The rows of a matrix in pieces of whole groups, of about so many numbers each."""
    step = max(1, numbers // (GROUP * matrix.columns)) * GROUP
    for first in range(0, matrix.rows, step):
        yield slice(first, min(first + step, matrix.rows))


def layout_digest() -> bytes:
    """A digest of the code that decides how packed weights are laid out in memory."""
    sources = (Path(str(layout.__file__)), Path(__file__))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).digest()


def interleave_floats(rows: NDArray[Any], values: NDArray[np.uint8]) -> None:
    """Columns of sixteen rows; of bfloat16 pairs of columns, and an odd last one by itself."""
    location = values.view(rows.dtype)  # (G, columns, 16)
    if rows.dtype != WeightType.BF16.dtype:
        location[:] = rows.reshape(len(values), GROUP, -1).transpose(0, 2, 1)
        return
    even = rows.shape[1] // 2 * 2
    pairs = rows[:, :even].reshape(len(values), GROUP, -1, 2).transpose(0, 2, 1, 3)
    location[:, :even].reshape(len(values), -1, GROUP, 2)[:] = pairs
    location[:, even:] = rows[:, even:].reshape(len(values), GROUP, -1).transpose(0, 2, 1)


def move_blocks(
    matrix: Matrix, raw: NDArray[np.uint8], values: NDArray[np.uint8], scales: NDArray[np.uint8]
) -> None:
    """Blocks of the matrix's own type (16·G, bytes of a row) -> values and scales of G groups."""
    raw, blocks = np.ascontiguousarray(raw), matrix.weight_type.blocks(matrix.columns)
    assert raw.nbytes * 8 == len(values) * GROUP * blocks * matrix.weight_type.stored_bytes
    MOVE[matrix.weight_type](
        raw.ctypes.data, values.ctypes.data, scales.ctypes.data, raw.strides[0],
        len(values), blocks,
    )  # fmt: skip


def quantize_rows(
    matrix: Matrix, numbers: NDArray[np.float32], values: NDArray[np.uint8],
    scales: NDArray[np.uint8],
) -> None:  # fmt: skip
    """Rows (16·G, columns) -> values and scales of G groups, quantized to Q8_0 or Q4_0.

    The codes are those of ggml's quantizers to the bit, as in formats/quantize.py, as long as the
    numbers are finite. A block with a NaN or an infinity gets NaN as its scale, so that a broken
    model is noticed.
    """
    numbers, groups = np.ascontiguousarray(numbers), len(values)
    assert numbers.shape == (groups * GROUP, values.shape[1] * BLOCK)
    assert numbers.dtype == np.float32
    exact = np.empty((groups, matrix.weight_type.blocks(numbers.shape[1]), GROUP), np.float32)
    QUANTIZE[matrix.weight_type](
        numbers.ctypes.data, values.ctypes.data, exact.ctypes.data, numbers.shape[1], groups
    )
    halves = scales.view(np.float16)
    with np.errstate(over="ignore"):  # beyond a half's range: infinity, which comes out as NaN
        halves[:] = exact.reshape(halves.shape)


# --- blocks of a file -----------------------------------------------------------------------------


@instruction(returns=types.uint8)
def load8(v: Vectors, address: Any) -> Any:
    return v.load(address, I8, 1)


@instruction(returns=types.uint16)
def load16(v: Vectors, address: Any) -> Any:
    return v.load(address, I16, 1)


@instruction(returns=types.uint32)
def load32(v: Vectors, address: Any) -> Any:
    return v.load(address, I32, 1)


@instruction(types.int64, types.uint8)
def store8(v: Vectors, address: Any, value: Any) -> None:
    v.store(value, address, 1)


@instruction(types.int64, types.uint16)
def store16(v: Vectors, address: Any, value: Any) -> None:
    v.store(value, address, 1)


@instruction(types.int64, types.uint32)
def store32(v: Vectors, address: Any, value: Any) -> None:
    v.store(value, address, 1)


@inlined
def word_place(values: int, cell: int, words: int, word: int, lane: int) -> int:
    """The address of a lane's word of a block, of so many words per lane."""
    return values + ((cell * words + word) * LANES + lane) * 4


@entry
def move_q8_0(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    """File block: half d, 32 signed bytes."""
    for cell in range(groups * blocks):
        first = raw + cell // blocks * LANES * row + cell % blocks * 34
        for lane in range(LANES):
            block = first + lane * row
            store16(scales + (cell * LANES + lane) * 2, load16(block))
            for w in range(8):
                word = load32(block + 2 + 4 * w) ^ SIGNS  # signed -> plus 128
                store32(word_place(values, cell, 8, w, lane), word)


@inlined
def move_nibbles(
    header: int, high: int, raw: int, values: int, scales: int, row: int, groups: int, blocks: int
) -> None:
    """File block: `header` bytes of halves, or one byte e8m0; `high` bytes, 0 or 4, of fifth bits
    in the order of the inputs; sixteen bytes of two nibbles as they are here."""
    size, words = header + high + 16, 4 + high // 4
    for cell in range(groups * blocks):
        first = raw + cell // blocks * LANES * row + cell % blocks * size
        for lane in range(LANES):
            block = first + lane * row
            if header == 1:
                store16(scales + (cell * LANES + lane) * 2, bfloat_of_e8m0(load8(block)))
            for n in range(header // 2):
                location = scales + ((cell * (header // 2) + n) * LANES + lane) * 2
                store16(location, load16(block + 2 * n))
            for w in range(4):
                word = load32(block + header + high + 4 * w)
                store32(word_place(values, cell, words, w, lane), word)
            if high > 0:
                bits, word = load32(block + header), np.uint32(0)
                for q in range(8):  # four bits, one to a byte
                    word |= ((bits >> (4 * q) & np.uint32(15)) * SPREAD & ONES) << q
                store32(word_place(values, cell, words, 4, lane), word)


@inlined
def bfloat_of_e8m0(exponent: int) -> Any:
    """Half of 2^(exponent − 127) as bfloat16, because the table E2M1 is doubled; 255 is NaN."""
    if exponent == 255:
        return np.uint16(0x7FC0)
    return np.uint16((exponent - 1) << 7 if exponent > 1 else 32 << exponent)  # or subnormal


@entry
def move_q4_0(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    move_nibbles(2, 0, raw, values, scales, row, groups, blocks)


@entry
def move_q4_1(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    move_nibbles(4, 0, raw, values, scales, row, groups, blocks)


@entry
def move_q5_0(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    move_nibbles(2, 4, raw, values, scales, row, groups, blocks)


@entry
def move_q5_1(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    move_nibbles(4, 4, raw, values, scales, row, groups, blocks)


@entry
def move_mxfp4(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    move_nibbles(1, 0, raw, values, scales, row, groups, blocks)


@inlined
def two_bits(run: int, shift: int, n: int) -> Any:
    """A plane of two bits, word n of it: from a run of 32 bytes, two bits of each from `shift`."""
    word = np.uint32(0)
    for w in range(4):
        word |= (load32(run + 4 * (2 * w + n)) >> shift & TOP) << (2 * w)
    return word


@inlined
def one_bit(run: int, shift: int) -> Any:
    """A plane of one bit: from a run of 32 bytes, one bit of each."""
    word = np.uint32(0)
    for q in range(8):
        word |= (load32(run + 4 * q) >> shift & ONES) << q
    return word


@inlined
def move_q4_or_q5_k(
    high: int, raw: int, values: int, scales: int, row: int, groups: int, blocks: int
) -> None:
    """File: half d, half dmin, 12 bytes of six-bit scales and minima; `high` bytes, 0 or 32, whose
    bit n is the fifth one of block n; 128 bytes of nibbles.

    A run of 32 bytes holds two blocks, one in its low and one in its high nibbles; here a byte
    holds two numbers of the same block.
    """
    supers, words = blocks // 8, 4 + high // 32
    for cell in range(groups * supers):
        first = raw + cell // supers * LANES * row + cell % supers * (144 + high)
        own = scales + cell * 320
        for lane in range(LANES):
            block = first + lane * row
            store16(own + lane * 2, load16(block))
            store16(own + (LANES + lane) * 2, load16(block + 2))
            for n in range(4):
                scale, minimum = load8(block + 4 + n), load8(block + 8 + n)
                both = load8(block + 12 + n)
                location = own + 4 * LANES + n * 2 * LANES + lane
                store8(location, scale & 63)
                store8(location + LANES, minimum & 63)
                store8(location + 8 * LANES, both & 15 | scale >> 6 << 4)
                store8(location + 9 * LANES, both >> 4 | minimum >> 6 << 4)
            for run in range(4):
                for w in range(4):
                    codes = block + 16 + high + run * 32 + 4 * w
                    left, right = load32(codes), load32(codes + 16)
                    location = word_place(values, cell * 8 + 2 * run, words, w, lane)
                    store32(location, left & LOW | (right & LOW) << 4)
                    location = word_place(values, cell * 8 + 2 * run + 1, words, w, lane)
                    store32(location, (left & HIGH) >> 4 | right & HIGH)
            for n in range(8 if high > 0 else 0):
                location = word_place(values, cell * 8 + n, words, 4, lane)
                store32(location, one_bit(block + 16, n))


@entry
def move_q4_k(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    move_q4_or_q5_k(0, raw, values, scales, row, groups, blocks)


@entry
def move_q5_k(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    move_q4_or_q5_k(32, raw, values, scales, row, groups, blocks)


@entry
def move_q6_k(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    """File: 128 bytes of low nibbles, 64 of upper bits, 16 signed scales, half d.

    Each half of a superblock is four blocks: their low nibbles are in two runs of 32 bytes, first
    the low halves of both, then the high ones; their upper bits share 32 bytes.
    """
    supers = blocks // 8
    for cell in range(groups * supers):
        first = raw + cell // supers * LANES * row + cell % supers * 210
        own = scales + cell * 288
        for lane in range(LANES):
            block = first + lane * row
            store16(own + lane * 2, load16(block + 208))
            for n in range(16):
                store8(own + 2 * LANES + n * LANES + lane, load8(block + 192 + n))
            for n in range(8):
                low = block + n // 4 * 64 + n % 2 * 32
                shift = n // 2 % 2 * 4
                for w in range(4):
                    left = load32(low + 4 * w) >> shift & LOW
                    right = load32(low + 16 + 4 * w) >> shift & LOW
                    store32(word_place(values, cell * 8 + n, 6, w, lane), left | right << 4)
                for v in range(2):
                    tops = two_bits(block + 128 + n // 4 * 32, 2 * (n % 4), v)
                    store32(word_place(values, cell * 8 + n, 6, 4 + v, lane), tops)


@entry
def move_q3_k(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    """File: 32 bytes whose bit n is the third one of block n; two runs of 32 bytes, each with two
    bits of four blocks; sixteen scales plus 32, of six bits in twelve bytes; half d."""
    supers = blocks // 8
    for cell in range(groups * supers):
        first = raw + cell // supers * LANES * row + cell % supers * 110
        own = scales + cell * 288
        for lane in range(LANES):
            block = first + lane * row
            store16(own + lane * 2, load16(block + 108))
            for n in range(16):
                low = load8(block + 96 + n % 8) >> (n // 8 * 4) & 15
                high = load8(block + 104 + n % 4) >> (n // 4 * 2) & 3
                store8(own + 2 * LANES + n * LANES + lane, (low | high << 4) - 32)
            for n in range(8):
                for v in range(2):
                    codes = two_bits(block + 32 + n // 4 * 32, 2 * (n % 4), v)
                    store32(word_place(values, cell * 8 + n, 3, v, lane), codes)
                store32(word_place(values, cell * 8 + n, 3, 2, lane), one_bit(block, n))


@entry
def move_q2_k(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    """File: sixteen bytes of scales and minima, two runs of codes as in Q3_K, half d, half dmin."""
    supers = blocks // 8
    for cell in range(groups * supers):
        first = raw + cell // supers * LANES * row + cell % supers * 84
        own = scales + cell * 320
        for lane in range(LANES):
            block = first + lane * row
            store16(own + lane * 2, load16(block + 80))
            store16(own + (LANES + lane) * 2, load16(block + 82))
            for n in range(16):
                store8(own + (4 + n) * LANES + lane, load8(block + n))
            for n in range(8):
                for v in range(2):
                    codes = two_bits(block + 16 + n // 4 * 32, 2 * (n % 4), v)
                    store32(word_place(values, cell * 8 + n, 2, v, lane), codes)


@entry
def move_iq4_xs(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    """File: half d, eight scales plus 32, of six bits in two and four bytes; 128 bytes of nibbles,
    block by block."""
    supers = blocks // 8
    for cell in range(groups * supers):
        first = raw + cell // supers * LANES * row + cell % supers * 136
        own = scales + cell * 160
        for lane in range(LANES):
            block = first + lane * row
            store16(own + lane * 2, load16(block))
            for n in range(8):
                low = load8(block + 4 + n // 2) >> (n % 2 * 4) & 15
                high = load16(block + 2) >> (n * 2) & 3
                store8(own + (2 + n) * LANES + lane, (low | high << 4) - 32)
                for w in range(4):
                    word = load32(block + 8 + 16 * n + 4 * w)
                    store32(word_place(values, cell * 8 + n, 4, w, lane), word)


MOVE: dict[WeightType, Callable[..., None]] = {
    WeightType.Q8_0: move_q8_0, WeightType.Q4_0: move_q4_0, WeightType.Q4_1: move_q4_1,
    WeightType.Q5_0: move_q5_0, WeightType.Q5_1: move_q5_1, WeightType.IQ4_NL: move_q4_0,
    WeightType.MXFP4: move_mxfp4, WeightType.Q2_K: move_q2_k, WeightType.Q3_K: move_q3_k,
    WeightType.Q4_K: move_q4_k, WeightType.Q5_K: move_q5_k, WeightType.Q6_K: move_q6_k,
    WeightType.IQ4_XS: move_iq4_xs,
}  # fmt: skip


# --- float32 rows ---------------------------------------------------------------------------------


@inlined
def largest_magnitude(bits: Any, start: int) -> Any:
    """Of 32 float32, given as int32: the bits of the largest, without sign."""
    most = np.int32(0)
    for i in range(BLOCK):
        most = max(most, bits[start + i] & MAGNITUDE)
    return most


@inlined
def scale_or_nan(most: int, scale: float) -> Any:
    """The scale; NaN if the largest magnitude is not finite."""
    return float_from_bits(MAGNITUDE) if most >= INFINITY else scale


@inlined
def inverse(scale: float) -> Any:
    return np.float32(1) / scale if scale != 0 else np.float32(0)


@entry
def quantize_q8_0(numbers: int, values: int, scales: int, columns: int, groups: int) -> None:
    """Codes −127 … 127, halves away from zero; the largest of a block gets ±127.

    scales: (groups, blocks, 16) float32, to be rounded to halves by the caller.
    """
    blocks = columns // BLOCK
    bits = carray(pointer(numbers), groups * LANES * columns, np.int32)
    inputs = floats(numbers, groups * LANES * columns)
    line = stack_words(1)  # the codes of one block
    codes, words = carray(line, BLOCK, np.uint8), carray(line, BLOCK // 4, np.uint32)
    factors = floats(scales, groups * blocks * LANES)
    for cell in range(groups * blocks):
        for lane in range(LANES):
            start = (cell // blocks * LANES + lane) * columns + cell % blocks * BLOCK
            most = largest_magnitude(bits, start)
            scale = float_from_bits(most) / np.float32(127)
            factors[cell * LANES + lane] = scale_or_nan(most, scale)
            times = inverse(scale)
            for i in range(BLOCK):
                code = inputs[start + i] * times
                code += np.float32(0.5) if code >= 0 else np.float32(-0.5)
                codes[i] = np.uint8(np.int32(code) + np.int32(128))
            for w in range(8):
                store32(word_place(values, cell, 8, w, lane), words[w])


@entry
def quantize_q4_0(numbers: int, values: int, scales: int, columns: int, groups: int) -> None:
    """Codes 0 … 15 for −8 … 7; the first number farthest from zero gets −8."""
    blocks = columns // BLOCK
    bits = carray(pointer(numbers), groups * LANES * columns, np.int32)
    inputs = floats(numbers, groups * LANES * columns)
    line = stack_words(1)  # the codes of one block
    codes, words = carray(line, BLOCK, np.uint8), carray(line, BLOCK // 4, np.uint32)
    factors = floats(scales, groups * blocks * LANES)
    for cell in range(groups * blocks):
        for lane in range(LANES):
            start = (cell // blocks * LANES + lane) * columns + cell % blocks * BLOCK
            most, farthest = largest_magnitude(bits, start), start
            while bits[farthest] & MAGNITUDE != most:
                farthest += 1
            scale = inputs[farthest] / np.float32(-8)
            factors[cell * LANES + lane] = scale_or_nan(most, scale)
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


QUANTIZE: dict[WeightType, Callable[..., None]] = {
    WeightType.Q8_0: quantize_q8_0, WeightType.Q4_0: quantize_q4_0,
}  # fmt: skip
