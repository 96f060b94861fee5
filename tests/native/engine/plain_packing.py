"""Packing of block types in NumPy: the reference for the compiled loops of
native/engine/repack.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def to_nibbles(codes: Raw) -> Raw:
    """(rows, blocks, 32) codes -> (rows, blocks, 4, 4) bytes of two nibbles."""
    low, high = codes[..., :16] & 15, codes[..., 16:] & 15
    return (low | high << 4).reshape(*codes.shape[:2], -1, QUAD)


def by_lane(rows: Raw) -> Raw:
    """(16·G, n, k) numbers of each row -> (G, n, k, 16)."""
    return rows.reshape(-1, GROUP, *rows.shape[1:]).transpose(0, 2, 3, 1)


def pack_q4_k(raw: Raw, values: Raw, scales: Raw) -> None:
    """File: float16 d and dmin, 12 bytes of six-bit scales and minima, 128 bytes of nibbles."""
    supers = raw.reshape(len(raw), -1, 144)
    runs = supers[..., 16:].reshape(*supers.shape[:2], 4, 32)
    codes = np.stack([runs & 15, runs >> 4], 3).reshape(len(raw), -1, BLOCK)
    vectors = values.reshape(*values.shape[:2], -1, GROUP, QUAD)
    vectors[:] = interleave(to_nibbles(codes))
    places = scales.reshape(len(scales), -1, 320)
    halves = places.view(np.uint16)
    halves[..., :32] = scales_of_lanes(supers[..., :4]).reshape(*halves.shape[:2], 32)
    both = np.stack(six_bits(supers[..., 4:16]), -1)  # (rows, supers, 8, 2)
    small = by_lane(both.reshape(*both.shape[:2], 16))  # (G, supers, 16, lanes)
    places[..., 64:] = small.reshape(*places.shape[:2], 256)


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
    low = np.stack([low & 15, low >> 4], 3).reshape(*supers.shape[:2], 2, 4, 32)
    high = supers[..., 128:192].reshape(*supers.shape[:2], 2, 1, 32)
    high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    low, high = (part.reshape(len(raw), -1, BLOCK) for part in (low, high))
    fields = high.reshape(*high.shape[:2], 4, 2, QUAD)  # inputs 4q+t: (rows, blocks, q//2, q%2, t)
    tops = (fields << np.array([0, 2, 4, 6], np.uint8)[:, None, None]).sum(2, dtype=np.uint8)
    quads = np.concatenate([to_nibbles(low), tops], 2)
    values.reshape(*values.shape[:2], -1, GROUP, QUAD)[:] = interleave(quads)
    places = scales.reshape(len(scales), -1, 288)
    halves = places.view(np.uint16)
    halves[..., :16] = scales_of_lanes(supers[..., 208:]).reshape(*halves.shape[:2], 16)
    places[..., 32:] = by_lane(supers[..., 192:208]).reshape(*places.shape[:2], 256)


PACK: dict[WeightType, Callable[[Raw, Raw, Raw], None]] = {
    WeightType.Q8_0: pack_q8_0, WeightType.Q4_0: pack_q4_0, WeightType.Q4_1: pack_q4_1,
    WeightType.Q4_K: pack_q4_k, WeightType.Q6_K: pack_q6_k,
}  # fmt: skip


def pack_with_numpy(matrix: Matrix, raw: Raw) -> None:
    """Pack all rows of a matrix from the file's blocks (rows, bytes of a row)."""
    padding = np.zeros((-len(raw) % GROUP, *raw.shape[1:]), raw.dtype)
    PACK[matrix.weight_type](np.concatenate([raw, padding]), matrix.values, matrix.scales)
