"""Packing of block types in NumPy: the reference for the compiled loops of
native/engine/repack.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from glassllama.native.engine.layout import BLOCK, GROUP, Matrix, WeightType

QUAD = 4  # inputs per lane
Raw = NDArray[Any]


def interleave(rows: NDArray[Any]) -> NDArray[Any]:
    """(16·G, blocks, quads, 4) -> (G, blocks, quads, 16, 4): four inputs of each row alternate."""
    return rows.reshape(-1, GROUP, *rows.shape[1:]).transpose(0, 2, 3, 1, 4)


def scales_of_lanes(rows: NDArray[Any]) -> NDArray[Any]:
    """(16·G, blocks, n bytes) scales -> (G, blocks, n/2, 16) float16: the scales of each lane."""
    halves = np.ascontiguousarray(rows).view(np.uint16)
    return halves.reshape(-1, GROUP, *halves.shape[1:]).transpose(0, 2, 3, 1)


def pack_q8_0(raw: Raw, values: Raw, scales: Raw) -> None:
    """File block: float16 d, 32 signed bytes."""
    blocks = raw.reshape(len(raw), -1, 34)
    quads = (blocks[..., 2:] ^ 0x80).reshape(*blocks.shape[:2], -1, QUAD)  # signed -> plus 128
    values.reshape(*values.shape[:2], -1, GROUP, QUAD)[:] = interleave(quads)
    scales.view(np.uint16).reshape(*scales.shape[:2], -1, GROUP)[:] = scales_of_lanes(
        blocks[..., :2]
    )


def pack_nibbles(raw: Raw, values: Raw, scales: Raw, header: int) -> None:
    """File block: float16 d (and float16 m), then sixteen bytes, low nibbles first."""
    blocks = raw.reshape(len(raw), -1, header + BLOCK // 2)
    quads = blocks[..., header:].reshape(*blocks.shape[:2], -1, QUAD)
    values.reshape(*values.shape[:2], -1, GROUP, QUAD)[:] = interleave(quads)
    scales.view(np.uint16).reshape(*scales.shape[:2], -1, GROUP)[:] = scales_of_lanes(
        blocks[..., :header]
    )


def pack_q4_0(raw: Raw, values: Raw, scales: Raw) -> None:
    pack_nibbles(raw, values, scales, header=2)


def pack_q4_1(raw: Raw, values: Raw, scales: Raw) -> None:
    pack_nibbles(raw, values, scales, header=4)


def to_planes(codes: Raw, planes: tuple[int, ...]) -> Raw:
    """(rows, blocks, 32) codes -> (rows, blocks, vectors, 4) bytes, plane by plane."""
    quads, parts, low = codes.reshape(*codes.shape[:2], 8, QUAD), [], 0
    for bits in planes:
        field = (quads >> low & (2**bits - 1)).reshape(*codes.shape[:2], 8 // bits, bits, QUAD)
        shifts = (bits * np.arange(8 // bits)).astype(np.uint8)  # quad q in vector q % bits
        parts.append((field << shifts[:, None, None]).sum(2, dtype=np.uint8))
        low += bits
    return np.concatenate(parts, 2)


def put_codes(codes: Raw, planes: tuple[int, ...], values: Raw) -> None:
    rows = codes.reshape(len(codes), -1, BLOCK)
    values.reshape(*values.shape[:2], -1, GROUP, QUAD)[:] = interleave(to_planes(rows, planes))


def nibbles(packed: Raw) -> Raw:
    """(…, 16) bytes -> (…, 32) codes: the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def pack_q5(raw: Raw, values: Raw, scales: Raw, header: int) -> None:
    """File block: float16 d (and float16 m), 32 bits, sixteen bytes of nibbles."""
    blocks = raw.reshape(len(raw), -1, header + 4 + 16)
    high = np.unpackbits(blocks[..., header : header + 4], axis=-1, bitorder="little")
    put_codes(nibbles(blocks[..., header + 4 :]) | high << 4, (4, 1), values)
    scales.view(np.uint16).reshape(*scales.shape[:2], -1, GROUP)[:] = scales_of_lanes(
        blocks[..., :header]
    )


def pack_mxfp4(raw: Raw, values: Raw, scales: Raw) -> None:
    """File block: an exponent e8m0, sixteen bytes of nibbles. Scales are halved."""
    blocks = raw.reshape(len(raw), -1, 17)
    put_codes(nibbles(blocks[..., 1:]), (4,), values)
    exponents = blocks[..., :1].astype(int)
    powers = np.ldexp(1.0, exponents - 128).astype(ml_dtypes.bfloat16)
    powers[exponents == 255] = np.nan
    scales.view(np.uint16).reshape(*scales.shape[:2], -1, GROUP)[:] = scales_of_lanes(powers)


def pack_q4_k(raw: Raw, values: Raw, scales: Raw, high: int = 0) -> None:
    """File: float16 d and dmin, 12 bytes of six-bit scales and minima, 128 bytes of nibbles; in
    Q5_K, before these, 32 bytes of fifth bits."""
    supers = raw.reshape(len(raw), -1, 144 + high)
    runs = supers[..., 16 + high :].reshape(*supers.shape[:2], 4, 32)
    codes = np.stack([runs & 15, runs >> 4], 3).reshape(*supers.shape[:2], 8, 32)
    if high:
        codes |= one_bit(supers[..., 16:48]) << 4
    put_codes(codes, (4, 1) if high else (4,), values)
    both = np.stack(six_bits(supers[..., 4:16]), -1)  # (rows, supers, 8, 2)
    put_small(supers[..., :4], both.reshape(*both.shape[:2], 16), scales)


def one_bit(packed: Raw) -> Raw:
    """(…, 32) bytes -> (…, 8, 32): bit n of each is of block n."""
    return packed[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1


def two_bits(packed: Raw) -> Raw:
    """(…, 64) bytes, two runs -> (…, 8, 32): two bits of each are of one block."""
    runs = packed.reshape(*packed.shape[:-1], 2, 1, 32)
    blocks = runs >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return blocks.reshape(*packed.shape[:-1], 8, 32)


def put_small(halves: Raw, small: Raw, scales: Raw) -> None:
    """Scales of superblocks: halves (rows, supers, bytes), small numbers (rows, supers, n)."""
    places = scales.reshape(len(scales), halves.shape[1], -1)
    first = scales_of_lanes(halves).reshape(*places.shape[:2], -1)
    places[..., : 2 * first.shape[-1]].view(np.uint16)[:] = first
    places[..., 2 * first.shape[-1] :] = (
        small.reshape(-1, GROUP, *small.shape[1:])
        .transpose(0, 2, 3, 1)
        .reshape(*places.shape[:2], -1)
    )  # (G, supers, n, 16)


def pack_q2_k(raw: Raw, values: Raw, scales: Raw) -> None:
    """File: sixteen bytes of scales and minima, 64 bytes of codes, float16 d and dmin."""
    supers = raw.reshape(len(raw), -1, 84)
    put_codes(two_bits(supers[..., 16:80]), (2,), values)
    put_small(supers[..., 80:], supers[..., :16], scales)


def pack_q3_k(raw: Raw, values: Raw, scales: Raw) -> None:
    """File: 32 bytes of third bits, 64 bytes of codes, sixteen six-bit scales, float16 d."""
    supers = raw.reshape(len(raw), -1, 110)
    put_codes(two_bits(supers[..., 32:96]) | one_bit(supers[..., :32]) << 2, (2, 1), values)
    low, high = nibbles(supers[..., 96:104]), supers[..., 104:108]
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    put_small(supers[..., 108:], (low | high << 4) - np.uint8(32), scales)


def pack_iq4_xs(raw: Raw, values: Raw, scales: Raw) -> None:
    """File: float16 d, eight six-bit scales, 128 bytes of nibbles block by block."""
    supers = raw.reshape(len(raw), -1, 136)
    put_codes(nibbles(supers[..., 8:].reshape(*supers.shape[:2], 8, 16)), (4,), values)
    low = np.stack([supers[..., 4:8] & 15, supers[..., 4:8] >> 4], -1).reshape(*supers.shape[:2], 8)
    high = supers[..., 2:4].copy().view(np.uint16) >> 2 * np.arange(8, dtype=np.uint16) & 3
    put_small(supers[..., :2], (low | high.astype(np.uint8) << 4) - np.uint8(32), scales)


def six_bits(packed: Raw) -> tuple[Raw, Raw]:
    """Twelve bytes -> eight scales and eight minima; the last four have separate upper bits."""
    low_scales, low_minima, both = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low_scales & 63, (both & 15) | (low_scales >> 6 << 4)], -1)
    minima = np.concatenate([low_minima & 63, (both >> 4) | (low_minima >> 6 << 4)], -1)
    return scales, minima


def pack_q6_k(raw: Raw, values: Raw, scales: Raw) -> None:
    """File: 128 bytes of low nibbles, 64 of upper bits, 16 signed scales, float16 d."""
    supers = raw.reshape(len(raw), -1, 210)
    low = supers[..., :128].reshape(*supers.shape[:2], 2, 2, 32)
    low = np.stack([low & 15, low >> 4], 3).reshape(*supers.shape[:2], 8, 32)
    put_codes(low | two_bits(supers[..., 128:192]) << 4, (4, 2), values)
    put_small(supers[..., 208:], supers[..., 192:208], scales)


PACK: dict[WeightType, Callable[[Raw, Raw, Raw], None]] = {
    WeightType.Q8_0: pack_q8_0, WeightType.Q4_0: pack_q4_0, WeightType.Q4_1: pack_q4_1,
    WeightType.Q5_0: partial(pack_q5, header=2), WeightType.Q5_1: partial(pack_q5, header=4),
    WeightType.IQ4_NL: pack_q4_0, WeightType.MXFP4: pack_mxfp4, WeightType.Q2_K: pack_q2_k,
    WeightType.Q3_K: pack_q3_k, WeightType.Q4_K: pack_q4_k,
    WeightType.Q5_K: partial(pack_q4_k, high=32), WeightType.Q6_K: pack_q6_k,
    WeightType.IQ4_XS: pack_iq4_xs,
}  # fmt: skip


def pack_with_numpy(matrix: Matrix, raw: Raw) -> None:
    """Pack all rows of a matrix from the file's blocks (rows, bytes of a row)."""
    padding = np.zeros((-len(raw) % GROUP, *raw.shape[1:]), raw.dtype)
    PACK[matrix.weight_type](np.concatenate([raw, padding]), matrix.values, matrix.scales)
