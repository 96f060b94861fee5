"""Superblocks of 256 numbers ("K quants"): groups of 16 or 32 with small scales of their own.

A superblock holds one half-precision scale d (with some types dmin, for minima too). Each group
has a whole number of 4, 6 or 8 bits by which d is multiplied: x = (d·scale)·q, or
x = (d·scale)·q − (dmin·minimum). The codes q of several groups share a byte: group g of a run of
bytes sits in the same bits of all of them. docs/formats/gguf.md draws it.

Source: the block_*_K structures of ggml (ggml-common.h). Float32, in the order written here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.integer]
Blocks = NDArray[np.void]  # one record per superblock: (n,) of a dtype below

SUPERBLOCK = 256  # QK_K
GROUP = 16  # elements that share a scale in Q2_K, Q3_K, Q6_K
LONG_GROUP = 32  # the same in Q4_K, Q5_K

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
    [("low", "u1", (2, 64)), ("high", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")]
)


def unpack_q2_k(blocks: Blocks, out: Floats) -> None:
    """Two runs of 32 bytes, four 2-bit codes in each byte -> out (n, 256)."""
    runs = out.reshape(-1, 2, 4, 32)
    for g in range(4):
        runs[:, :, g] = blocks["codes"] >> (2 * g) & 3
    groups = out.reshape(-1, GROUP, GROUP)
    groups *= times(blocks["d"], blocks["scales"] & 15)
    groups -= times(blocks["dmin"], blocks["scales"] >> 4)


def unpack_q3_k(blocks: Blocks, out: Floats) -> None:
    """As Q2_K, with a third bit from `high`; codes 0 … 7 stand for −4 … 3 -> out (n, 256)."""
    codes = np.empty((len(blocks), 2, 4, 32), np.uint8)
    for g in range(4):
        codes[:, :, g] = blocks["codes"] >> (2 * g) & 3
    for g in range(8):
        codes[:, g // 4, g % 4] |= (blocks["high"] >> g & 1) << 2
    np.subtract(codes.reshape(out.shape), np.float32(4), out=out)
    low, high = blocks["scales_low"], blocks["scales_high"]
    scales = np.concatenate([low & 15, low >> 4], axis=1)  # (n, 16)
    scales |= np.concatenate([(high >> (2 * g) & 3) << 4 for g in range(4)], axis=1)
    groups = out.reshape(-1, GROUP, GROUP)
    groups *= times(blocks["d"], scales.view(np.int8) - np.int8(32))


def unpack_q4_k(blocks: Blocks, out: Floats) -> None:
    """Four runs of 32 bytes, two 4-bit codes in each byte -> out (n, 256)."""
    runs = out.reshape(-1, 4, 2, 32)
    runs[:, :, 0] = blocks["codes"] & 15
    runs[:, :, 1] = blocks["codes"] >> 4
    scale_and_shift(blocks, out)


def unpack_q5_k(blocks: Blocks, out: Floats) -> None:
    """As Q4_K, with a fifth bit from `high` -> out (n, 256)."""
    codes = np.empty((len(blocks), 4, 2, 32), np.uint8)
    codes[:, :, 0] = blocks["codes"] & 15
    codes[:, :, 1] = blocks["codes"] >> 4
    for g in range(8):
        codes[:, g // 2, g % 2] |= (blocks["high"] >> g & 1) << 4
    out[...] = codes.reshape(out.shape)
    scale_and_shift(blocks, out)


def unpack_q6_k(blocks: Blocks, out: Floats) -> None:
    """4 bits from `low`, 2 from `high`; codes 0 … 63 stand for −32 … 31 -> out (n, 256)."""
    codes = np.empty((len(blocks), 2, 2, 64), np.uint8)
    codes[:, :, 0] = blocks["low"] & 15
    codes[:, :, 1] = blocks["low"] >> 4
    runs = codes.reshape(-1, 2, 4, 32)
    for g in range(4):
        runs[:, :, g] |= (blocks["high"] >> (2 * g) & 3) << 4
    np.subtract(codes.reshape(out.shape), np.float32(32), out=out)
    groups = out.reshape(-1, GROUP, GROUP)
    groups *= times(blocks["d"], blocks["scales"])


def scale_and_shift(blocks: Blocks, out: Floats) -> None:
    """Q4_K and Q5_K: codes in `out` (n, 256) become numbers, 32 by 32."""
    groups = out.reshape(-1, SUPERBLOCK // LONG_GROUP, LONG_GROUP)
    groups *= times(blocks["d"], six_bits(blocks["scales"], blocks["both"] & 15))
    groups -= times(blocks["dmin"], six_bits(blocks["minima"], blocks["both"] >> 4))


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
}
