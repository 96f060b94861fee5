"""Memory-mapped files and element types: what the readers of all tensor files share."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

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

MOST_DIMS = 32  # the limit of NumPy
BYTES_LIMIT = 2**63  # sizes are signed 64-bit numbers


def checked_shape(shape: object, itemsize: int, where: str) -> tuple[int, ...]:
    """The shape as a tuple. Raises FormatError unless it is a list of sizes within the limits."""
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
    """Bytes of the shape without its empty axes: NumPy limits these, too."""
    return math.prod(max(size, 1) for size in shape) * itemsize


class MappedFile:
    """A regular, non-empty file mapped read-only.

    Pages are read from the disk when they are accessed. Raises FormatError if the file is missing,
    not a regular file, unreadable or empty. As with every mapped file, the process dies if the file
    is shortened while it is open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise FormatError(f"{path}: {_why_no_file(path)}")
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise FormatError(f"{path}: the file is empty; download or copy it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        """A copy of these bytes; shorter if the file ends first."""
        return self._map[offset : offset + nbytes]

    def array(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        offset: int,
        strides: tuple[int, ...] | None = None,
    ) -> NDArray[Any]:
        """A read-only view; nothing is read yet. `offset` and `strides` in bytes.

        The readers check that it is inside the file; NumPy raises ValueError or TypeError if not.
        """
        if 0 in shape:  # may be at the very end, after the last byte
            return np.empty(shape, dtype)
        # With frombuffer, because then the map cannot be closed while the array exists.
        whole = np.frombuffer(self._map, np.uint8)
        return np.ndarray(shape, dtype, buffer=whole, offset=offset, strides=strides)

    def release_pages(self, offset: int, nbytes: int) -> None:
        """Give the pages of these bytes back; if accessed again they are read again."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows: the system does it by itself
            return
        start = offset - offset % mmap.PAGESIZE
        if nbytes > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Unmap the file; if arrays still use it, the last of them unmaps it."""
        with contextlib.suppress(BufferError):
            self._map.close()


def as_plain_array(view: NDArray[Any], rows: slice | None = None) -> NDArray[Any]:
    """These rows of the view in C order, aligned, read-only: the view itself, else a copy."""
    if rows is not None:
        if view.ndim == 0:
            raise FormatError(f"rows {rows} asked of a tensor that is a single number")
        view = view[rows]
    plain = view if view.flags.c_contiguous and view.flags.aligned else view.copy(order="C")
    plain.setflags(write=False)
    return plain


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder; name a file in it"
    return "is not a regular file" if path.exists() else "no such file"
