"""float32 -> blocks of Q8_0 and Q4_0, plainly: a scale for 32 numbers, and small whole numbers.

Source: the quantisers of ggml (quantize_row_q8_0_ref, quantize_row_q4_0_ref); equal to the `gguf`
package's to the byte. `formats.blocks` unpacks what is made here.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError
from glassllama.formats.blocks import BLOCK, BLOCKS, Q4_0, Q8_0, dequantise

ROWS_AT_ONCE = 512  # of a matrix of gigabytes
Kind = Literal["Q8_0", "Q4_0"]
Floats = NDArray[np.float32]


def quantise(matrix: Floats, kind: Kind) -> NDArray[np.uint8]:
    """(rows, columns) -> (rows, bytes of a row). Raises FormatError for rows of broken blocks."""
    if matrix.ndim != 2 or matrix.shape[1] % BLOCK:
        raise FormatError(f"{kind} needs rows of whole blocks of {BLOCK}, got {matrix.shape}")
    numbers = matrix.astype(np.float32).reshape(-1, BLOCK)  # (n, 32)
    blocks = {"Q8_0": eight_bits, "Q4_0": four_bits}[kind](numbers)
    return blocks.view(np.uint8).reshape(len(matrix), -1)


def eight_bits(numbers: Floats) -> NDArray[np.void]:
    """Codes −127 … 127: the largest number of a block gets 127. (n, 32) -> n blocks."""
    blocks = np.zeros(len(numbers), Q8_0)
    scale = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)
    codes = numbers * inverse(scale)
    blocks["d"] = scale[:, 0].astype(np.float16)
    blocks["codes"] = np.trunc(codes + np.copysign(np.float32(0.5), codes))  # halves away from 0
    return blocks


def four_bits(numbers: Floats) -> NDArray[np.void]:
    """Codes 0 … 15 for −8 … 7: the number farthest from zero gets −8. (n, 32) -> n blocks."""
    blocks = np.zeros(len(numbers), Q4_0)
    farthest = np.abs(numbers).argmax(axis=1)[:, None]
    scale = np.take_along_axis(numbers, farthest, axis=1) / np.float32(-8)
    codes = np.trunc(numbers * inverse(scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    blocks["d"] = scale[:, 0].astype(np.float16)
    blocks["codes"] = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
    return blocks


def inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 for a block of zeros."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def rounded(matrix: Floats, kind: Kind) -> Floats:
    """The matrix as it comes back from such a file; rows are filled up to whole blocks first."""
    columns = matrix.shape[1]
    missing = -columns % BLOCK
    out = np.empty_like(matrix)
    for start in range(0, len(matrix), ROWS_AT_ONCE):
        filled = np.pad(matrix[start : start + ROWS_AT_ONCE], ((0, 0), (0, missing)))
        back = dequantise(quantise(filled, kind), kind, filled.shape)
        out[start : start + ROWS_AT_ONCE] = back[:, :columns]
    return out


def bits_each(kind: Kind) -> float:
    """Bits that one number takes: 8.5 and 4.5."""
    return 8 * BLOCKS[kind].record.itemsize / BLOCK
