"""What the readers of tensor files share: format by first bytes, mapped files, tensors in them.

    GGUF         "GGUF"
    safetensors  8 bytes of header length, of which the upper four are 0, and "{"
    zip          "PK", 3, 4: written by torch.save since torch 1.6
    pickle       128 and a protocol from 2 to 5: written by older versions

The name decides for damaged files, so that the reader of that format can say what is wrong.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError, quoted
from glassllama.base.interfaces import TensorInfo
from glassllama.formats.blocks import ELEMENT_TYPES, TYPES

Container = Literal["gguf", "safetensors", "zip", "pickle"]

ENDINGS: dict[str, Container] = {".gguf": "gguf", ".safetensors": "safetensors", ".pth": "zip"}
GGUF_MAGIC, ZIP_MAGIC = b"GGUF", b"PK\3\4"
PICKLE_MAGIC = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
FIRST_BYTES = 9  # enough to tell the formats apart

MOST_DIMS = 32  # the limit of NumPy
BYTES_LIMIT = 2**63  # sizes are signed 64-bit numbers


def format_of(path: Path) -> Container | None:
    """The format of a file; None for folders and unknown formats.

    Raises OSError if a regular file cannot be read.
    """
    if path.is_dir():
        return None
    start = b""
    if path.is_file():  # a pipe might never begin
        with path.open("rb") as file:
            start = file.read(FIRST_BYTES)
    if start.startswith(GGUF_MAGIC):
        return "gguf"
    if start[4:] == b"\0\0\0\0{":  # a header has at most 100 MB
        return "safetensors"
    if start.startswith(ZIP_MAGIC):
        return "zip"
    return "pickle" if start.startswith(PICKLE_MAGIC) else ENDINGS.get(path.suffix.lower())


def formats_in(folder: Path) -> dict[Path, Container]:
    """The files of a folder that have a format, in the order of their names."""
    found: dict[Path, Container] = {}
    for path in sorted(folder.glob("*")):
        try:
            format = format_of(path)
        except OSError:  # a folder may hold files of others
            format = ENDINGS.get(path.suffix.lower())
        if format is not None:
            found[path] = format
    return found


def checked_shape(shape: object, itemsize: int, where: str) -> tuple[int, ...]:
    """The shape as a tuple. Raises FormatError unless it is a list of sizes within the limits.

    NumPy limits the bytes of a shape without its empty axes, too.
    """
    if not isinstance(shape, list | tuple) or len(shape) > MOST_DIMS:
        problem = f"is not a list of at most {MOST_DIMS} sizes"
    elif not all(type(size) is int and 0 <= size < BYTES_LIMIT for size in shape):
        problem = "must hold whole numbers >= 0"
    elif math.prod(max(size, 1) for size in shape) * itemsize >= BYTES_LIMIT:
        problem = "counts more than 2^63 bytes"
    else:
        return tuple(shape)
    raise FormatError(f"{where}: shape {quoted(shape)} {problem}")


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
                missing = "is not a regular file" if path.exists() else "no such file"
                folder = "is a folder; name a file in it"
                raise FormatError(f"{path}: {folder if path.is_dir() else missing}")
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
        self, shape: tuple[int, ...], dtype: Any, offset: int, strides: Any = None
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


class MappedTensors:
    """A `TensorFile` (base/interfaces.py) over the mapped files of a checkpoint.

    Arrays from `read` and the metadata stay valid after `close`: a map ends with the last array
    that uses it.
    """

    def __init__(
        self,
        files: Iterable[MappedFile],
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, Any],
    ) -> None:
        self._files = {str(file.path): file for file in files}
        self._tensors, self._path = tensors, next(iter(self._files))
        self.metadata = metadata

    def names(self) -> list[str]:
        """Tensor names in the order of the file's table."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, type and offset of a tensor. Raises FormatError if there is none of this name."""
        if name not in self._tensors:
            raise FormatError(f"{self._path}: no tensor named {quoted(name)}")
        return self._tensors[name]

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """The tensor as stored, or `rows` along its first axis: a read-only view of the file.

        Block types come as uint8 of shape (*shape[:-1], bytes of a row). Elements that are not
        aligned, or not in C order, are copied.
        """
        info = self.info(name)
        if info.path not in self._files:
            raise FormatError(f"{info.path}: closed, so {quoted(name)} cannot be read any more")
        row = "a single number" if info.dtype in ELEMENT_TYPES else "a single row of blocks"
        if rows is not None and len(info.shape) < (1 if info.dtype in ELEMENT_TYPES else 2):
            raise FormatError(f"{info.path}: {quoted(name)} is {row}: read it whole")
        view = self._view(info)
        view = view if rows is None else view[rows]
        plain = view if view.flags.c_contiguous and view.flags.aligned else view.copy(order="C")
        plain.setflags(write=False)
        return plain

    def _view(self, info: TensorInfo) -> NDArray[Any]:
        dtype, shape = ELEMENT_TYPES.get(info.dtype), info.shape
        if dtype is None:  # rows of blocks
            blocks = TYPES[info.dtype]
            dtype = np.dtype(np.uint8)
            shape = (*shape[:-1], shape[-1] // blocks.elements * blocks.bytes)
        return self._files[info.path].array(shape, dtype, info.offset)

    def release_pages(self, name: str) -> None:
        """Give this tensor's pages back to the system; later reads read the file again."""
        info = self.info(name)
        if info.path in self._files:
            self._files[info.path].release_pages(info.offset, self._span(info))

    def _span(self, info: TensorInfo) -> int:
        """Bytes from the first to the last of a tensor."""
        return info.nbytes

    def close(self) -> None:
        self._files = {}
