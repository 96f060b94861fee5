"""The element types of a tensor, and what a shape may be: shared by all tensor files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from glassllama.base.errors import FormatError, quoted

ELEMENT_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

MOST_DIMS = 32  # what every numpy can hold
BYTES_LIMIT = 2**63  # sizes are signed 64-bit numbers in every program that reads these files


def checked_shape(shape: object, itemsize: int, where: str) -> tuple[int, ...]:
    """The shape as a tuple; FormatError unless it is a list of sizes that a machine can count."""
    if not isinstance(shape, list | tuple) or len(shape) > MOST_DIMS:
        raise FormatError(
            f"{where}: shape {quoted(shape)} is not a list of at most {MOST_DIMS} sizes"
        )
    if not all(type(size) is int and 0 <= size < BYTES_LIMIT for size in shape):
        raise FormatError(f"{where}: shape {quoted(shape)} must hold whole numbers >= 0")
    if largest_nbytes(shape, itemsize) >= BYTES_LIMIT:
        raise FormatError(f"{where}: shape {quoted(shape)} counts more than 2^63 bytes")
    return tuple(shape)


def largest_nbytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of the shape with its empty axes ignored: numpy wants these to be countable too."""
    return math.prod(max(size, 1) for size in shape) * itemsize
