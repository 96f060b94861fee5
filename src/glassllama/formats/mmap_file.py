"""A file's bytes in memory without reading them: pages come from the disk when touched."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError


class MappedFile:
    """A regular, non-empty file mapped read-only.

    Raises FormatError where the file is missing, not a file, unreadable or empty. As with every
    mapped file, the process dies if somebody shortens it while it is open.
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
        """A copy of these bytes; shorter where the file ends first."""
        return self._map[offset : offset + nbytes]

    def array(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        offset: int,
        strides: tuple[int, ...] | None = None,
    ) -> NDArray[Any]:
        """A read-only view, nothing touched yet; `offset` and `strides` in bytes.

        numpy itself refuses (ValueError, TypeError) what would reach outside the file; the readers
        check it before, with words.
        """
        if 0 in shape:  # may lie at the very end, where there is no byte to point at
            return np.empty(shape, dtype)
        # Through frombuffer, because only that keeps the map from being closed under the array.
        whole = np.frombuffer(self._map, np.uint8)
        return np.ndarray(shape, dtype, buffer=whole, offset=offset, strides=strides)

    def release_pages(self, offset: int, nbytes: int) -> None:
        """Give the pages of these bytes back; they come from the disk again if touched again."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows: the system takes pages back by itself
            return
        start = offset - offset % mmap.PAGESIZE
        if nbytes > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Unmap the file, or leave that to the last array that still looks into it."""
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
