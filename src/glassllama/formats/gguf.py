"""GGUF checkpoints: metadata and named tensors, memory-mapped, in one file or several parts.

One file's header is read by gguf_header.py; blocks.py converts what `read` returns to float32.
docs/formats/gguf.md draws the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorInfo
from glassllama.formats.blocks import block_layout
from glassllama.formats.gguf_header import Cursor, Value, read_header
from glassllama.formats.mmap_file import ELEMENT_TYPES, MappedFile, as_plain_array

PART_NAME = re.compile(
    r"(?P<stem>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})(?P<suffix>\.gguf)", re.IGNORECASE
)
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint; most checkpoints have one."""

    path: Path
    mapped: MappedFile
    metadata: dict[str, Value]
    tensors: list[TensorInfo]


class GGUFFile:
    """A checkpoint in GGUF form: a `TensorFile` (base/interfaces.py).

    Single numbers of the metadata are plain Python, arrays of numbers read-only numpy, arrays of
    strings a sequence that decodes on demand; all of them outlive `close`. The metadata of a split
    checkpoint is that of its first part. Arrays from `read` stay valid after `close` too: the
    system's map ends with the last of them.
    """

    def __init__(self, parts: list[Part]) -> None:
        self._path = parts[0].path
        self._maps = {str(part.path): part.mapped for part in parts}
        self._tensors = {info.name: info for part in parts for info in part.tensors}
        self.metadata: Mapping[str, Value] = MappingProxyType(parts[0].metadata)

    def names(self) -> list[str]:
        """Tensor names in the order of the file's table."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, type and place of a tensor. Raises FormatError if there is none of this name."""
        if name not in self._tensors:
            raise FormatError(f"{self._path}: there is no tensor {quoted(name)}")
        return self._tensors[name]

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """The tensor as stored, or `rows` along its first axis: a read-only view of the file.

        Block types come as uint8 of shape (*shape[:-1], bytes of a row). Pages are read from the
        disk when they are accessed.
        """
        info = self.info(name)
        if info.path not in self._maps:
            raise FormatError(f"{info.path}: closed, so {quoted(name)} cannot be read any more")
        if rows is not None and info.dtype not in ELEMENT_TYPES and len(info.shape) == 1:
            raise FormatError(
                f"{info.path}: {quoted(name)} is a single row of blocks: read it whole"
            )
        dtype, shape = stored_form(info)
        return as_plain_array(self._maps[info.path].array(shape, dtype, info.offset), rows)

    def release_pages(self, name: str) -> None:
        """Give this tensor's pages back to the system; later reads read the file again."""
        info = self.info(name)
        if info.path in self._maps:
            self._maps[info.path].release_pages(info.offset, info.nbytes)

    def close(self) -> None:
        """Close the files. A mapping ends with the last array that uses it."""
        self._maps = {}


def stored_form(info: TensorInfo) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The numpy type and shape of a tensor's bytes: its own, or rows of bytes for blocks."""
    if info.dtype in ELEMENT_TYPES:
        return ELEMENT_TYPES[info.dtype], info.shape
    layout = block_layout(info.dtype)
    row_bytes = info.shape[-1] // layout.elements * layout.bytes
    return np.dtype(np.uint8), (*info.shape[:-1], row_bytes)


def open_gguf(path: Path) -> GGUFFile:
    """Open a checkpoint by its file, or by any one of its `-0000N-of-0000M.gguf` parts.

    Raises FormatError, in one line, for whatever the file has that the format forbids.
    """
    given = open_part(path)
    count = whole(given, "split.count", 1)
    if count <= 1:  # 0 is what the tool that merges parts leaves behind
        return GGUFFile([given])
    paths = part_paths(path, count)
    parts = [given if other == path else open_part(other) for other in paths]
    for number, part in enumerate(parts):
        check_part(part, number, count)
    check_tensors(parts)
    return GGUFFile(parts)


def open_part(path: Path) -> Part:
    mapped = MappedFile(path)
    whole = mapped.array((mapped.size,), np.dtype(np.uint8), 0)
    metadata, tensors = read_header(Cursor(whole.data, str(path)))  # copies what it keeps
    return Part(path, mapped, metadata, tensors)


def whole(part: Part, key: str, default: T) -> int | T:
    """A number of parts or tensors in a part's metadata. Raises FormatError for anything else."""
    return Fields(str(part.path), part.metadata, FormatError).whole(key, default, least=0)


def part_paths(path: Path, count: int) -> list[Path]:
    """The files of all parts, from the name of one. Raises FormatError if one is not there."""
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(
            f"{path}: split.count says {count} parts, so the name must end in "
            f"-0000N-of-{count:05}.gguf for the others to be found; rename it"
        )
    paths = []
    for n in range(1, count + 1):
        paths.append(path.with_name(f"{match['stem']}-{n:05}-of-{count:05}{match['suffix']}"))
        if not paths[-1].is_file():
            raise FormatError(
                f"{paths[-1]}: missing; {path.name} needs all {count} parts beside it"
            )
    return paths


def check_part(part: Part, number: int, count: int) -> None:
    """A part must know its own place: `split.no` counts from 0, the name from 1."""
    for key, expected in (("split.no", number), ("split.count", count)):
        value = whole(part, key, None)
        if value != expected:
            raise FormatError(
                f"{part.path}: {key} must be {expected} by its name, got {value}; "
                "parts were renamed, or mixed with another checkpoint's"
            )


def check_tensors(parts: list[Part]) -> None:
    """All parts together must hold as many tensors as the first says, and each once."""
    first = parts[0]
    seen: dict[str, Path] = {}
    for part in parts:
        for info in part.tensors:
            if info.name in seen:
                other = seen[info.name].name
                raise FormatError(f"{part.path}: tensor {quoted(info.name)} is in {other} already")
            seen[info.name] = part.path
    key = "split.tensors.count"
    expected = whole(first, key, None)
    if len(seen) != expected:
        raise FormatError(
            f"{first.path}: {key} must be {len(seen)}, the tensors of all parts, got {expected}"
        )
