"""Convert stored numbers to float32, and float32 to blocks: numbers with a common scale.

A quantized tensor is divided along its rows into blocks of 32. A block holds small whole numbers q,
a half-precision scale d and with some types an offset m: x = d·q, or x = d·q + m. In IQ4_NL q is
looked up in a table. Superblocks of 256 are in k_blocks.py. docs/formats/gguf.md draws the bytes.

Source: the block_* structures of ggml (ggml-common.h). The arithmetic is float32, in the order
written here, which makes results equal to the `gguf` package's bit for bit. Quantizing to Q8_0 and
Q4_0 follows quantize_row_q8_0_ref and quantize_row_q4_0_ref of ggml.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError
from glassllama.formats.k_blocks import K_BLOCKS, STEPS, Blocks, Codes, Floats

FLOATS = ("F64", "F32", "F16", "BF16")
ELEMENT_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip

BLOCK = 32
Q4_0 = np.dtype([("d", "<f2"), ("codes", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "u1", 16)])
Q5_0 = np.dtype([("d", "<f2"), ("high", "u1", 4), ("codes", "u1", 16)])
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "u1", 4), ("codes", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("codes", "i1", 32)])
IQ4_NL = Q4_0

CHUNK = 2**16  # elements unpacked at a time, 512 KiB of intermediate arrays: they stay in cache


def unpack_q4_0(blocks: Blocks, out: Floats) -> None:
    """Codes 0 … 15 stand for −8 … 7 -> out (n, 32)."""
    four_bits(blocks, out)
    out -= np.float32(8)
    out *= column(blocks["d"])


def unpack_q4_1(blocks: Blocks, out: Floats) -> None:
    four_bits(blocks, out)
    out *= column(blocks["d"])
    out += column(blocks["m"])


def unpack_q5_0(blocks: Blocks, out: Floats) -> None:
    """Codes 0 … 31 stand for −16 … 15 -> out (n, 32)."""
    np.subtract(five_bits(blocks), np.float32(16), out=out)
    out *= column(blocks["d"])


def unpack_q5_1(blocks: Blocks, out: Floats) -> None:
    out[...] = five_bits(blocks)
    out *= column(blocks["d"])
    out += column(blocks["m"])


def unpack_q8_0(blocks: Blocks, out: Floats) -> None:
    out[...] = blocks["codes"]
    out *= column(blocks["d"])


def unpack_iq4_nl(blocks: Blocks, out: Floats) -> None:
    """Codes 0 … 15 stand for the steps of a table, close together around 0 -> out (n, 32)."""
    out[:, :16] = STEPS[blocks["codes"] & 15]
    out[:, 16:] = STEPS[blocks["codes"] >> 4]
    out *= column(blocks["d"])


def four_bits(blocks: Blocks, out: NDArray[Any]) -> None:
    """The low halves of the 16 bytes are the first 16 codes, the high halves the last 16."""
    out[:, :16] = blocks["codes"] & 15
    out[:, 16:] = blocks["codes"] >> 4


def five_bits(blocks: Blocks) -> Codes:
    """As four_bits, and bit i of the four bytes `high` is on top of code i -> (n, 32)."""
    codes = np.unpackbits(blocks["high"], axis=1, bitorder="little")
    codes <<= 4
    codes[:, :16] |= blocks["codes"] & 15
    codes[:, 16:] |= blocks["codes"] >> 4
    return codes


def column(halves: NDArray[np.float16]) -> Floats:
    """One number per block (n,), to be broadcast over its elements -> (n, 1)."""
    return halves.astype(np.float32)[:, None]


@dataclass(frozen=True)
class BlockType:
    """A block's elements and bytes, and how n of them become float32 (n, elements)."""

    elements: int  # 1 for plain types
    record: np.dtype[Any]
    unpack: Callable[[Blocks, Floats], None] | None = None  # plain types: NumPy converts them

    @property
    def bytes(self) -> int:
        return self.record.itemsize


BLOCKS = {
    "Q4_0": BlockType(BLOCK, Q4_0, unpack_q4_0),
    "Q4_1": BlockType(BLOCK, Q4_1, unpack_q4_1),
    "Q5_0": BlockType(BLOCK, Q5_0, unpack_q5_0),
    "Q5_1": BlockType(BLOCK, Q5_1, unpack_q5_1),
    "Q8_0": BlockType(BLOCK, Q8_0, unpack_q8_0),
    "IQ4_NL": BlockType(BLOCK, IQ4_NL, unpack_iq4_nl),
    **{name: BlockType(*parts) for name, parts in K_BLOCKS.items()},
}
TYPES = {name: BlockType(1, dtype) for name, dtype in ELEMENT_TYPES.items()} | BLOCKS
SUPPORTED = (*FLOATS, *BLOCKS)  # what `dequantize` takes


def dequantize(
    raw: NDArray[Any], dtype: str, shape: tuple[int, ...], out: Floats | None = None
) -> Floats:
    """Convert numbers stored as `dtype` to float32 of `shape`, writable.

    `raw` is what `TensorFile.read` returns: elements, or bytes of blocks. `out`, a contiguous
    float32 array of `shape`, receives the numbers if given. Raises FormatError for a type that is
    not in SUPPORTED and for the wrong number of bytes.
    """
    if dtype not in SUPPORTED:
        raise FormatError(f"{dtype} is no type of weights; have {' '.join(SUPPORTED)}")
    stored, kind = ELEMENT_TYPES.get(dtype, np.dtype(np.uint8)), TYPES[dtype]
    if raw.dtype != stored:
        raise FormatError(f"{dtype} is stored as {stored}, got an array of {raw.dtype}")
    expected = math.prod(shape) // kind.elements * kind.bytes
    row = shape[-1] if shape else 1
    if raw.nbytes != expected or row % kind.elements:
        raise FormatError(
            f"{dtype} of shape {shape} takes {expected} bytes in rows of whole blocks of "
            f"{kind.elements}, got {raw.nbytes} bytes"
        )
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise FormatError(f"out must be contiguous float32 {shape}, got {out.dtype} {out.shape}")
    with np.errstate(all="ignore"):  # a file may hold NaN and infinity: they are passed on
        if kind.unpack is None:
            out[...] = raw.reshape(shape)  # float64 is rounded to the nearest
            return out
        blocks = np.ascontiguousarray(raw).reshape(-1).view(kind.record)  # (n,)
        numbers = out.reshape(-1, kind.elements)  # (n, elements), a view
        step = CHUNK // kind.elements
        for start in range(0, len(blocks), step):
            chunk = slice(start, start + step)
            kind.unpack(blocks[chunk], numbers[chunk])
    return out


# --- quantizing -----------------------------------------------------------------------------


def quantize(matrix: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """Floats (rows, columns) -> (rows, bytes of a row), as Q8_0 or Q4_0: the bytes of a GGUF file.

    Some rows at a time, so that intermediate arrays stay in the processor's cache. Raises
    FormatError for rows that are not whole blocks of 32, and for numbers without a half-precision
    scale: NaN, infinities, above 8.3 million for Q8_0, above 524,000 for Q4_0.
    """
    if matrix.ndim != 2 or matrix.shape[1] % BLOCK:
        raise FormatError(
            f"{dtype} takes rows of whole blocks of {BLOCK} numbers, got shape {matrix.shape}"
        )
    rows, columns = matrix.shape
    out = np.empty((rows, columns // BLOCK * BLOCKS[dtype].bytes), np.uint8)
    step = max(CHUNK // max(columns, 1), 1)
    for start in range(0, rows, step):
        numbers = np.asarray(matrix[start : start + step], np.float32).reshape(-1, BLOCK)
        with np.errstate(all="ignore"):  # an overflow shows in the scales
            blocks = PACK[dtype](numbers)
        if not np.isfinite(blocks["d"]).all():
            raise FormatError(
                f"{dtype}: NaN, infinities or numbers beyond half precision in row {start} or soon "
                "after; keep such a tensor as float, or see whether the file is damaged"
            )
        rows_done = out[start : start + step]
        rows_done[...] = blocks.view(np.uint8).reshape(rows_done.shape)
    return out


def pack_q8_0(numbers: Floats) -> Blocks:
    """Codes −127 … 127: the largest number of a block gets 127. (n, 32) -> n blocks."""
    blocks = np.zeros(len(numbers), Q8_0)
    scale = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)
    codes = numbers * inverse(scale)
    blocks["d"] = scale[:, 0].astype(np.float16)
    blocks["codes"] = np.trunc(codes + np.copysign(np.float32(0.5), codes))  # halves away from 0
    return blocks


def pack_q4_0(numbers: Floats) -> Blocks:
    """Codes 0 … 15 for −8 … 7: the number farthest from zero gets −8. (n, 32) -> n blocks."""
    blocks = np.zeros(len(numbers), Q4_0)
    farthest = np.abs(numbers).argmax(axis=1)[:, None]
    scale = np.take_along_axis(numbers, farthest, axis=1) / np.float32(-8)
    codes = np.trunc(numbers * inverse(scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    blocks["d"] = scale[:, 0].astype(np.float16)
    blocks["codes"] = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
    return blocks


def inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 for a block of zeros or of numbers too small to have one."""
    one = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    one[np.isinf(one)] = 0
    return one


PACK: dict[str, Callable[[Floats], Blocks]] = {"Q8_0": pack_q8_0, "Q4_0": pack_q4_0}
