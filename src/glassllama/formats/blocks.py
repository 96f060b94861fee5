"""Convert stored numbers to float32, and float32 to blocks: numbers with a common scale.

A quantized tensor is divided along its rows into blocks of 32. A block holds small whole numbers q,
a half-precision scale d and with some types an offset m: x = d·q, or x = d·q + m. In IQ4_NL q is
looked up in a table; in MXFP4 it is a number of four bits, and d a power of two.
docs/formats/gguf.md draws the bytes.

Superblocks of 256 ("K-quants") have one half-precision scale d (with some types dmin, for minima
too), and each group of 16 or 32 a small whole number by which d is multiplied: x = (d·scale)·q, or
x = (d·scale)·q − (dmin·minimum). The codes are in eight lanes of 32; several lanes share the same
32 bytes, each has its own bits of them.

Sources: the block_* structures of ggml (ggml-common.h); for MXFP4, OCP Microscaling Formats (MX)
v1.0, sections 5.3.3 and 5.4.1. The arithmetic is float32, in the order
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

# --- superblocks ----------------------------------------------------------------------------

Floats = NDArray[np.float32]
Codes = NDArray[np.integer]
Words = NDArray[np.uint64]  # eight codes at a time, one per byte
Blocks = NDArray[np.void]  # one record per superblock: (n,) of a dtype below

SUPERBLOCK = 256  # QK_K
LANES, LANE = 8, 32  # a superblock is unpacked as eight lanes of 32
LANE_WORDS = LANE // 8
GROUP = 16  # elements that share a scale in Q2_K, Q3_K, Q6_K; in Q4_K and Q5_K a lane does
EACH_BYTE = 0x0101010101010101  # times a mask: the mask in each byte of a word

Q2_K = np.dtype([("scales", "u1", 16), ("codes", "u1", (2, 32)), ("d", "<f2"), ("dmin", "<f2")])
Q3_K = np.dtype(
    [
        ("high", "u1", 32),
        ("codes", "u1", (2, 32)),
        ("scales_low", "u1", 8),
        ("scales_high", "u1", 4),
        ("d", "<f2"),
    ]
)
SIX_BIT_PAIRS = [("scales", "u1", 4), ("minima", "u1", 4), ("both", "u1", 4)]
Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), *SIX_BIT_PAIRS, ("codes", "u1", (4, 32))])
Q5_K = np.dtype(
    [("d", "<f2"), ("dmin", "<f2"), *SIX_BIT_PAIRS, ("high", "u1", 32), ("codes", "u1", (4, 32))]
)
Q6_K = np.dtype(
    [("low", "u1", (2, 2, 32)), ("high", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")]
)
IQ4_XS = np.dtype(
    [("d", "<f2"), ("scales_high", "<u2"), ("scales_low", "u1", 4), ("codes", "u1", (8, 16))]
)
# What the codes of IQ4_NL and IQ4_XS stand for (kvalues_iq4nl of ggml-common.h).
STEPS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def unpack_q2_k(blocks: Blocks, out: Floats) -> None:
    """Two runs of 32 bytes, four lanes of 2 bits in each -> out (n, 256)."""
    to_floats(two_bits(blocks), out)
    groups = out.reshape(-1, SUPERBLOCK // GROUP, GROUP)
    groups *= times(blocks["d"], blocks["scales"] & 15)
    groups -= times(blocks["dmin"], blocks["scales"] >> 4)


def unpack_q3_k(blocks: Blocks, out: Floats) -> None:
    """As Q2_K, and a third bit from `high`; codes 0 … 7 stand for −4 … 3 -> out (n, 256)."""
    codes = two_bits(blocks)
    high = words(blocks["high"])  # (n, 4)
    for lane in range(LANES):
        codes[lane] |= bits(high, lane, 1) << 2
    to_floats(codes, out)
    out -= np.float32(4)
    groups = out.reshape(-1, SUPERBLOCK // GROUP, GROUP)
    groups *= times(blocks["d"], sixteen_scales(blocks))


def unpack_q4_k(blocks: Blocks, out: Floats) -> None:
    """Four runs of 32 bytes, two lanes of 4 bits in each -> out (n, 256)."""
    to_floats(lane_bits(blocks), out)
    scale_and_shift(blocks, out)


def unpack_q5_k(blocks: Blocks, out: Floats) -> None:
    """As Q4_K, and a fifth bit from `high` -> out (n, 256)."""
    codes = lane_bits(blocks)
    high = words(blocks["high"])  # (n, 4)
    for lane in range(LANES):
        codes[lane] |= bits(high, lane, 1) << 4
    to_floats(codes, out)
    scale_and_shift(blocks, out)


def unpack_q6_k(blocks: Blocks, out: Floats) -> None:
    """4 bits from `low`, 2 from `high`; codes 0 … 63 stand for −32 … 31 -> out (n, 256)."""
    low, high = words(blocks["low"]), words(blocks["high"])  # (2, 2, n, 4), (2, n, 4)
    codes = np.stack([bits(low, 0, 4), bits(low, 4, 4)], axis=1)  # (2, 2, 2, n, 4)
    codes = codes.reshape(2, 4, -1, LANE_WORDS)
    for lane in range(4):
        codes[:, lane] |= bits(high, 2 * lane, 2) << 4
    to_floats(codes, out)
    out -= np.float32(32)
    groups = out.reshape(-1, SUPERBLOCK // GROUP, GROUP)
    groups *= times(blocks["d"], blocks["scales"])


def unpack_iq4_xs(blocks: Blocks, out: Floats) -> None:
    """Eight lanes of 16 bytes, low halves first, whose codes stand for STEPS -> out (n, 256)."""
    lanes = out.reshape(-1, LANES, LANE)
    lanes[:, :, :16] = STEPS[blocks["codes"] & 15]
    lanes[:, :, 16:] = STEPS[blocks["codes"] >> 4]
    low, lane = blocks["scales_low"], np.arange(LANES)
    scales = low[:, lane // 2] >> lane % 2 * 4 & 15
    scales = scales | (blocks["scales_high"][:, None] >> lane * 2 & 3) << 4  # −32 … 31, plus 32
    lanes *= times(blocks["d"], scales.astype(np.int64) - 32)


def words(field: NDArray[np.uint8]) -> Words:
    """Runs of 32 bytes, (n, …, 32) -> run by run over all blocks, (…, n, 4 words)."""
    return np.ascontiguousarray(np.moveaxis(field, 0, -2)).view(np.uint64)


def bits(packed: Words, first: int, count: int) -> Words:
    """From every byte the `count` bits that begin at bit `first`, moved down to bit 0."""
    return packed >> np.uint64(first) & np.uint64(EACH_BYTE * (2**count - 1))


def two_bits(blocks: Blocks) -> Words:
    """Four codes in each byte: bits 0–1 of all bytes of a run are its first lane -> (8, n, 4)."""
    runs = words(blocks["codes"])  # (2, n, 4)
    return np.stack([bits(runs, 2 * i, 2) for i in range(4)], axis=1).reshape(LANES, -1, LANE_WORDS)


def lane_bits(blocks: Blocks) -> Words:
    """Two codes in each byte -> (8, n, 4)."""
    runs = words(blocks["codes"])  # (4, n, 4)
    return np.stack([bits(runs, 0, 4), bits(runs, 4, 4)], axis=1).reshape(LANES, -1, LANE_WORDS)


def to_floats(codes: Words, out: Floats) -> None:
    """Lane by lane over all blocks, any shape of 8 · n · 4 words -> block by block, (n, 256)."""
    lanes = codes.view(np.uint8).reshape(LANES, -1, LANE)
    out.reshape(-1, LANES, LANE)[...] = lanes.transpose(1, 0, 2)


def scale_and_shift(blocks: Blocks, out: Floats) -> None:
    """Q4_K and Q5_K: codes in `out` (n, 256) become numbers, lane by lane."""
    lanes = out.reshape(-1, LANES, LANE)
    lanes *= times(blocks["d"], six_bits(blocks["scales"], blocks["both"] & 15))
    lanes -= times(blocks["dmin"], six_bits(blocks["minima"], blocks["both"] >> 4))


def sixteen_scales(blocks: Blocks) -> Codes:
    """Q3_K: 4 low bits and 2 high bits of each scale; 0 … 63 stand for −32 … 31 -> (n, 16)."""
    low, high = blocks["scales_low"], blocks["scales_high"]
    scales = np.concatenate([low & 15, low >> 4], axis=1)
    scales |= np.concatenate([(high >> 2 * i & 3) << 4 for i in range(4)], axis=1)
    return scales.view(np.int8) - np.int8(32)


def six_bits(first: Codes, last_low: Codes) -> Codes:
    """Eight numbers of 6 bits: four in the low bits of `first`, whose top bits end four more.

    first, last_low (n, 4) -> (n, 8)
    """
    return np.concatenate([first & 63, first >> 6 << 4 | last_low], axis=1)


def times(d: NDArray[np.float16], whole: Codes) -> Floats:
    """Scale of each group: d (n,) times its whole numbers (n, g) -> (n, g, 1), to be broadcast."""
    scales = d.astype(np.float32)[:, None] * whole.astype(np.float32)
    return scales[:, :, None]


K_BLOCKS = {
    "Q2_K": (SUPERBLOCK, Q2_K, unpack_q2_k),
    "Q3_K": (SUPERBLOCK, Q3_K, unpack_q3_k),
    "Q4_K": (SUPERBLOCK, Q4_K, unpack_q4_k),
    "Q5_K": (SUPERBLOCK, Q5_K, unpack_q5_k),
    "Q6_K": (SUPERBLOCK, Q6_K, unpack_q6_k),
    "IQ4_XS": (SUPERBLOCK, IQ4_XS, unpack_iq4_xs),
}


# --- blocks of 32 and float types ---------------------------------------------------------------

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
MXFP4 = np.dtype([("exponent", "u1"), ("codes", "u1", 16)])
# What the codes of MXFP4 stand for (e2m1: a sign, two bits of exponent, one of mantissa). Code 8 is
# −0; as in ggml it gives 0.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

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


def unpack_mxfp4(blocks: Blocks, out: Floats) -> None:
    """Codes stand for numbers of a table; the scale is 2^(exponent − 127), 255 is NaN (e8m0)
    -> out (n, 32)."""
    out[:, :16] = E2M1[blocks["codes"] & 15]
    out[:, 16:] = E2M1[blocks["codes"] >> 4]
    powers = np.ldexp(np.float32(1), blocks["exponent"].astype(np.int32) - 127)
    powers[blocks["exponent"] == 255] = np.nan
    out *= powers[:, None]


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
    "MXFP4": BlockType(BLOCK, MXFP4, unpack_mxfp4),
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
