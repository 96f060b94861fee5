"""Quantize float32 to blocks of Q8_0 and Q4_0: a scale for 32 numbers, and small whole numbers.

`blocks.dequantize` is the inverse. Source: ggml (quantize_row_q8_0_ref, quantize_row_q4_0_ref);
the bytes are equal to those of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError
from glassllama.formats.blocks import BLOCK, BLOCKS, CHUNK, Q4_0, Q8_0
from glassllama.formats.k_blocks import Blocks, Floats

Pack = Callable[[Floats], Blocks]


def quantize_q8_0(matrix: NDArray[Any]) -> NDArray[np.uint8]:
    """Floats (rows, columns) -> (rows, columns / 32 · 34), the bytes of a GGUF file.

    Raises FormatError for rows that are not whole blocks of 32, and for numbers without a
    half-precision scale: NaN, infinities, above 8.3 million.
    """
    return quantize(matrix, "Q8_0", pack_q8_0)


def quantize_q4_0(matrix: NDArray[Any]) -> NDArray[np.uint8]:
    """Floats (rows, columns) -> (rows, columns / 32 · 18), the bytes of a GGUF file.

    Raises FormatError as `quantize_q8_0`; here the limit is 524,000.
    """
    return quantize(matrix, "Q4_0", pack_q4_0)


QUANTIZE = {"Q8_0": quantize_q8_0, "Q4_0": quantize_q4_0}


def quantize(matrix: NDArray[Any], dtype: str, pack: Pack) -> NDArray[np.uint8]:
    """Pack some rows at a time, so that intermediate arrays stay in the processor's cache."""
    if matrix.ndim != 2 or matrix.shape[1] % BLOCK:
        raise FormatError(
            f"{dtype} takes rows of whole blocks of {BLOCK} numbers, got shape {matrix.shape}"
        )
    rows, columns = matrix.shape
    row_bytes = columns // BLOCK * BLOCKS[dtype].record.itemsize
    out = np.empty((rows, row_bytes), np.uint8)
    step = max(CHUNK // max(columns, 1), 1)
    for start in range(0, rows, step):
        numbers = np.asarray(matrix[start : start + step], np.float32).reshape(-1, BLOCK)
        with np.errstate(all="ignore"):  # an overflow shows in the scales
            blocks = pack(numbers)
        require_scales(blocks, dtype, start)
        rows_done = out[start : start + step]
        rows_done[...] = blocks.view(np.uint8).reshape(rows_done.shape)
    return out


def require_scales(blocks: Blocks, dtype: str, row: int) -> None:
    if not np.isfinite(blocks["d"]).all():
        raise FormatError(
            f"{dtype}: NaN, infinities or numbers beyond half precision in row {row} or soon "
            "after; keep such a tensor as float, or see whether the file is damaged"
        )


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
