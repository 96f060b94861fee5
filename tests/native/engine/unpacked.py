"""Packed rows as numbers, by the readers that are used for embeddings."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from glassllama.native.engine.get_rows import reader_address
from glassllama.native.engine.layout import Matrix
from glassllama.native.jit.intrinsics import call_kernel


@njit
def call(address, arguments):  # type: ignore[no-untyped-def]
    call_kernel(address, arguments)


def read_rows(matrix: Matrix, rows: int | None = None) -> NDArray[np.float32]:
    """The first `rows` of a matrix (all it has if None) -> (rows, columns)."""
    count = matrix.rows if rows is None else rows
    out = np.full((count, matrix.columns), np.nan, np.float32)
    values, scales = matrix.values.ctypes.data, matrix.scales.ctypes.data
    blocks, reader = (matrix.weight_type.blocks(matrix.columns), reader_address(matrix.weight_type))
    for row in range(count):
        call(reader, (values, scales, blocks, row, out[row].ctypes.data))
    return out
