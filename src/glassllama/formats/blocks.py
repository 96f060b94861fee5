"""Convert stored numbers to float32: plain element types, and blocks with a common scale.

A quantized tensor is divided along its rows into blocks of 32. A block holds small whole numbers q,
a half-precision scale d and with some types an offset m: x = d·q, or x = d·q + m. In IQ4_NL q is
looked up in a table. Superblocks of 256 are in k_blocks.py. docs/formats/gguf.md draws the bytes.

Source: the block_* structures of ggml (ggml-common.h). The arithmetic is float32, in the order
written here, which makes results equal to the `gguf` package's bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError
from glassllama.formats.k_blocks import K_BLOCKS, STEPS, Blocks, Codes, Floats
from glassllama.formats.mmap_file import ELEMENT_TYPES

FLOATS = ("F64", "F32", "F16", "BF16")

BYTE = np.dtype(np.uint8)  # what blocks are read as

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
class BlockLayout:
    """A block's size: `elements` of the tensor in `bytes` of the file. Plain types: 1 element."""

    elements: int
    bytes: int


@dataclass(frozen=True)
class BlockType:
    """A block's size and bytes, and how n of them become float32 (n, elements)."""

    elements: int
    record: np.dtype[np.void]
    unpack: Callable[[Blocks, Floats], None]


BLOCKS = {
    "Q4_0": BlockType(BLOCK, Q4_0, unpack_q4_0),
    "Q4_1": BlockType(BLOCK, Q4_1, unpack_q4_1),
    "Q5_0": BlockType(BLOCK, Q5_0, unpack_q5_0),
    "Q5_1": BlockType(BLOCK, Q5_1, unpack_q5_1),
    "Q8_0": BlockType(BLOCK, Q8_0, unpack_q8_0),
    "IQ4_NL": BlockType(BLOCK, IQ4_NL, unpack_iq4_nl),
    **{name: BlockType(*parts) for name, parts in K_BLOCKS.items()},
}
SUPPORTED = (*FLOATS, *BLOCKS)  # what `dequantize` takes


def block_layout(dtype: str) -> BlockLayout:
    """Elements and bytes of one block, or of one element of a plain type."""
    if dtype in ELEMENT_TYPES:
        return BlockLayout(1, ELEMENT_TYPES[dtype].itemsize)
    if dtype in BLOCKS:
        return BlockLayout(BLOCKS[dtype].elements, BLOCKS[dtype].record.itemsize)
    raise FormatError(f"type {dtype} is unknown; have {' '.join((*ELEMENT_TYPES, *BLOCKS))}")


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
    stored = ELEMENT_TYPES.get(dtype, BYTE)
    if raw.dtype != stored:
        raise FormatError(f"{dtype} is stored as {stored}, got an array of {raw.dtype}")
    layout = block_layout(dtype)
    expected = math.prod(shape) // layout.elements * layout.bytes
    row = shape[-1] if shape else 1
    if raw.nbytes != expected or row % layout.elements:
        raise FormatError(
            f"{dtype} of shape {shape} takes {expected} bytes in rows of whole blocks of "
            f"{layout.elements}, got {raw.nbytes} bytes"
        )
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise FormatError(f"out must be contiguous float32 {shape}, got {out.dtype} {out.shape}")
    with np.errstate(all="ignore"):  # a file may hold NaN and infinity: they are passed on
        if dtype in BLOCKS:
            unpack_blocks(raw, BLOCKS[dtype], out)
        else:
            out[...] = raw.reshape(shape)  # float64 is rounded to the nearest
    return out


def unpack_blocks(raw: NDArray[np.uint8], kind: BlockType, out: Floats) -> None:
    blocks = np.ascontiguousarray(raw).reshape(-1).view(kind.record)  # (n,)
    numbers = out.reshape(-1, kind.elements)  # (n, elements), a view
    step = CHUNK // kind.elements
    for start in range(0, len(blocks), step):
        chunk = slice(start, start + step)
        kind.unpack(blocks[chunk], numbers[chunk])
