"""Superblocks of 256 numbers ("K quants"): groups of 16 or 32 with small scales of their own.

A superblock holds one half-precision scale d (with some types dmin, for minima too). Each group
has a whole number of 4, 6 or 8 bits by which d is multiplied: x = (d·scale)·q, or
x = (d·scale)·q − (dmin·minimum). The codes q lie in eight lanes of 32; several lanes share the
same 32 bytes, each with bits of its own. docs/formats/gguf.md draws it.

Source: the block_*_K structures of ggml (ggml-common.h). Float32, in the order written here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
    to_floats(four_bits(blocks), out)
    scale_and_shift(blocks, out)


def unpack_q5_k(blocks: Blocks, out: Floats) -> None:
    """As Q4_K, and a fifth bit from `high` -> out (n, 256)."""
    codes = four_bits(blocks)
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


def four_bits(blocks: Blocks) -> Words:
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
