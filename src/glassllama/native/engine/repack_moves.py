"""The work of repack.py, compiled: from a file's blocks to the packed layout, a word at a time.

Each function moves some groups of sixteen rows. It takes addresses: of the first row in the file's
form, and of the values and scales of the first group; then the bytes of a row, the number of groups
and of blocks in a row. A word is four bytes: four inputs, or eight nibbles. Blocks in a file begin
at any even address, so words are loaded without alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from glassllama.native.engine.layout import GROUP, Matrix
from glassllama.native.jit.compile import inlined, instruction, native
from glassllama.native.jit.intrinsics import types

LANES = GROUP
NO_FREEDOM: set[str] = set()  # arithmetic as it is written: quantised numbers equal ggml's
LOW, HIGH, TOP = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0), np.uint32(0x03030303)
SIGNS = np.uint32(0x80808080)


def access(bits: int, kind: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Load and store of that many bits at any address."""
    place = ir.IntType(bits).as_pointer()

    def load(context: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(builder.inttoptr(arguments[0], place), align=1)

        return kind(types.int64), emit

    def store(context: Any, address: Any, value: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.store(arguments[1], builder.inttoptr(arguments[0], place), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, kind), emit

    return instruction(load), instruction(store)


load8, store8 = access(8, types.uint8)
load16, store16 = access(16, types.uint16)
load32, store32 = access(32, types.uint32)


def moving(function: Callable[..., None]) -> Callable[..., None]:
    return native(function, NO_FREEDOM)


@inlined
def word_place(values: int, cell: int, words: int, word: int, lane: int) -> int:
    """Where a lane's word of a block lies, of so many words per lane."""
    return values + ((cell * words + word) * LANES + lane) * 4


@moving
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


@moving
def move_q4_0(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    """File block: half d, sixteen bytes of two nibbles in our order already."""
    for cell in range(groups * blocks):
        first = raw + cell // blocks * LANES * row + cell % blocks * 18
        for lane in range(LANES):
            block = first + lane * row
            store16(scales + (cell * LANES + lane) * 2, load16(block))
            for w in range(4):
                store32(word_place(values, cell, 4, w, lane), load32(block + 2 + 4 * w))


@moving
def move_q4_1(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    """File block: half d, half m, sixteen bytes as in Q4_0."""
    for cell in range(groups * blocks):
        first = raw + cell // blocks * LANES * row + cell % blocks * 20
        for lane in range(LANES):
            block = first + lane * row
            store16(scales + (cell * 2 * LANES + lane) * 2, load16(block))
            store16(scales + ((cell * 2 + 1) * LANES + lane) * 2, load16(block + 2))
            for w in range(4):
                store32(word_place(values, cell, 4, w, lane), load32(block + 4 + 4 * w))


@moving
def move_q4_k(raw: int, values: int, scales: int, row: int, groups: int, blocks: int) -> None:
    """File: half d, half dmin, 12 bytes of six-bit scales and minima, 128 bytes of nibbles.

    A run of 32 bytes holds two blocks, one in its low and one in its high nibbles; with us a byte
    holds two numbers of the same block.
    """
    supers = blocks // 8
    for cell in range(groups * supers):
        first = raw + cell // supers * LANES * row + cell % supers * 144
        own = scales + cell * 320
        for lane in range(LANES):
            block = first + lane * row
            store16(own + lane * 2, load16(block))
            store16(own + (LANES + lane) * 2, load16(block + 2))
            for n in range(4):
                scale, minimum = load8(block + 4 + n), load8(block + 8 + n)
                both = load8(block + 12 + n)
                place = own + 4 * LANES + n * 2 * LANES + lane
                store8(place, scale & 63)
                store8(place + LANES, minimum & 63)
                store8(place + 8 * LANES, both & 15 | scale >> 6 << 4)
                store8(place + 9 * LANES, both >> 4 | minimum >> 6 << 4)
            for run in range(4):
                for w in range(4):
                    place = word_place(values, cell * 8 + 2 * run, 4, w, lane)
                    left = load32(block + 16 + run * 32 + 4 * w)
                    right = load32(block + 32 + run * 32 + 4 * w)
                    store32(place, left & LOW | (right & LOW) << 4)
                    store32(place + 16 * LANES, (left & HIGH) >> 4 | right & HIGH)


@moving
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
                high = block + 128 + n // 4 * 32
                shift = n // 2 % 2 * 4
                for w in range(4):
                    left = load32(low + 4 * w) >> shift & LOW
                    right = load32(low + 16 + 4 * w) >> shift & LOW
                    store32(word_place(values, cell * 8 + n, 6, w, lane), left | right << 4)
                for v in range(2):
                    tops = np.uint32(0)
                    for w in range(4):
                        two = load32(high + 4 * (2 * w + v)) >> (2 * (n % 4)) & TOP
                        tops |= two << (2 * w)
                    store32(word_place(values, cell * 8 + n, 6, 4 + v, lane), tops)


MOVE: dict[str, Callable[..., None]] = {
    "Q8_0": move_q8_0, "Q4_0": move_q4_0, "Q4_1": move_q4_1, "Q4_K": move_q4_k, "Q6_K": move_q6_k,
}  # fmt: skip


FILE_BYTES = {"Q8_0": 8 * 34, "Q4_0": 8 * 18, "Q4_1": 8 * 20, "Q4_K": 144, "Q6_K": 210}  # of 256


def move(matrix: Matrix, place: slice, raw: NDArray[np.uint8]) -> None:
    """Blocks (16·G, bytes of a row) into the groups `place` of a matrix."""
    values, scales = matrix.values[place], matrix.scales[place]
    raw = np.ascontiguousarray(raw)
    name, blocks = matrix.weight_type.name, matrix.weight_type.blocks(matrix.columns)
    assert raw.nbytes * 8 == len(values) * GROUP * blocks * FILE_BYTES[name]
    MOVE[name](
        raw.ctypes.data, values.ctypes.data, scales.ctypes.data, raw.strides[0],
        len(values), blocks,
    )  # fmt: skip
