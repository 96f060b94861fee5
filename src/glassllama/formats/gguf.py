"""GGUF checkpoints: metadata and named tensors, memory-mapped, in one file or several parts.

    magic version counts │ key type value … │ name sizes type offset … │ padding │ data

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian. Every byte
must be accounted for: it belongs to the header, to one tensor, or to padding shorter than the
alignment; anything else is an error. Nothing is allocated before the bytes that would fill it are
known to be in the file. docs/formats/gguf.md draws the bytes.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorInfo
from glassllama.formats.blocks import TYPES
from glassllama.formats.tensor_file import GGUF_MAGIC, MappedFile, MappedTensors, checked_shape

PART_NAME = re.compile(
    r"(?P<stem>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})(?P<suffix>\.gguf)", re.IGNORECASE
)
VERSIONS = (2, 3)  # 1 counted in 32 bits; 3 is 2 with big-endian files allowed
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS holds instead

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
LEAST_PAIR_BYTES = U64.size + U32.size + 1  # empty key, type, one byte
LEAST_TENSOR_BYTES = U64.size + U32.size + U32.size + U64.size  # empty name, no sizes
ARRAY_HEADER_BYTES = U32.size + U64.size  # type of the elements, number of elements

NUMBERS: dict[int, np.dtype[Any]] = {  # types of metadata values
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
STRING, ARRAY = 8, 9
DEEPEST = 8  # arrays inside arrays; real files have none, but the format allows them
MOST_INNER = 2**16  # arrays in an array; no key that is read holds arrays of arrays
MOST_PAIRS = 2**16
DEFAULT_ALIGNMENT, LEAST_ALIGNMENT = 32, 8
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
WIDEST_ELEMENT = 8  # bytes

TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
    39: "MXFP4",
}  # fmt: skip
UNREADABLE_TYPES = {  # only named, so that the error can say what came
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
    # dropped from ggml, but files have them
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

Value = Any  # int, float, bool, str, a read-only array, a StringArray, or a tuple of such arrays

# --- one file or several parts --------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint; most checkpoints have one."""

    mapped: MappedFile
    metadata: dict[str, Value]
    tensors: list[TensorInfo]

    def number(self, key: str, default: Any) -> Any:
        """A number of parts or tensors in the metadata. Raises FormatError for anything else."""
        get = Fields(str(self.mapped.path), self.metadata, FormatError)
        return get.integer(key, default, minimum=0)


def open_gguf(path: Path) -> MappedTensors:
    """Open a checkpoint by its file, or by any one of its `-0000N-of-0000M.gguf` parts.

    In the metadata, which is that of the first part, single numbers are plain Python, arrays of
    numbers read-only numpy, arrays of strings a sequence that decodes on demand. Raises
    FormatError, in one line, for whatever the file has that the format forbids.
    """
    parts = [open_part(path)]
    count = parts[0].number("split.count", 1)
    if count > 1:  # 0 is what the tool that merges parts leaves behind
        opened, paths = parts[0], part_paths(path, count)
        parts = [opened if other == path else open_part(other) for other in paths]
        check_parts(parts)
    tensors = {info.name: info for part in parts for info in part.tensors}
    return MappedTensors([part.mapped for part in parts], tensors, parts[0].metadata)


def open_part(path: Path) -> Part:
    mapped = MappedFile(path)
    whole = mapped.array((mapped.size,), np.uint8, 0)
    return Part(mapped, *read_header(Cursor(whole.data, str(path))))  # copies what it keeps


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


def check_parts(parts: list[Part]) -> None:
    """Each part must know its number; together they hold as many tensors as the first says, once.

    `split.no` counts from 0, the name of the file from 1.
    """
    seen: dict[str, Path] = {}
    for number, part in enumerate(parts):
        path = part.mapped.path
        for key, expected in (("split.no", number), ("split.count", len(parts))):
            if (value := part.number(key, None)) != expected:
                raise FormatError(
                    f"{path}: {key} must be {expected} by its name, got {value}; "
                    "parts were renamed, or mixed with another checkpoint's"
                )
        for info in part.tensors:
            if info.name in seen:
                other = seen[info.name].name
                raise FormatError(f"{path}: tensor {quoted(info.name)} is in {other} already")
            seen[info.name] = path
    key = "split.tensors.count"
    if (value := parts[0].number(key, None)) != len(seen):
        raise FormatError(
            f"{parts[0].mapped.path}: {key} must be {len(seen)}, the tensors of all parts, got "
            f"{value}"
        )


# --- metadata values ------------------------------------------------------------------------


class Cursor:
    """A position in a file's header; it advances as values are read, and never past the end."""

    def __init__(self, data: memoryview, path: str) -> None:
        self.data, self.path, self.at = data, path, 0

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem}")

    def require_bytes(self, count: int, size: int, what: str) -> None:
        """`count` things of at least `size` bytes each must still fit into the file."""
        left = len(self.data) - self.at
        if count * size > left:
            raise self.error(
                f"{what} needs {count * size} bytes at byte {self.at}, but only {left} are left: "
                "the file is cut short or damaged; fetch it again"
            )

    def advance(self, count: int, size: int, what: str) -> int:
        """Move on by `count * size` bytes -> where they begin."""
        self.require_bytes(count, size, what)
        start = self.at
        self.at += count * size
        return start

    def u32(self, what: str) -> int:
        return int(U32.unpack_from(self.data, self.advance(1, U32.size, what))[0])

    def u64(self, what: str) -> int:
        return int(U64.unpack_from(self.data, self.advance(1, U64.size, what))[0])

    def string(self, what: str) -> str:
        start = self.advance(self.u64(f"the length of {what}"), 1, what)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {start} is not UTF-8: {error.reason}") from None

    def numbers(self, dtype: np.dtype[Any], count: int, what: str) -> NDArray[Any]:
        """The next `count` numbers, copied, so that the file may be closed; read-only."""
        start = self.advance(count, dtype.itemsize, what)
        values = np.frombuffer(bytes(self.data[start : self.at]), dtype)
        if dtype == np.bool_ and count and (largest := values.view(np.uint8).max()) > 1:
            raise self.error(f"{what} holds a bool of {largest}; a bool is 0 or 1")
        return values

    def kind(self, what: str) -> int:
        """The type of a metadata value."""
        kind = self.u32(f"the type of {what}")
        if kind not in (*NUMBERS, STRING, ARRAY):
            raise self.error(
                f"{what} has the unknown metadata type {kind}; types are 0 to 12: "
                "the file is damaged, or newer than this reader"
            )
        return kind


class StringArray(Sequence[str]):
    """An array of strings as stored in the file; each is decoded when it is accessed.

    A vocabulary of 128k words with its merges opens in a tenth of the time this way. The bytes
    are a copy, so the strings outlive the file. Raises FormatError for one that is not UTF-8.
    """

    of: ClassVar = "text"  # base/fields.py need not check every item

    def __init__(self, data: bytes, ends: NDArray[np.int64], what: str) -> None:
        self._data = data  # length, bytes, length, bytes, …
        self._ends = ends  # where each string ends in it
        self._what = what  # file and key, for errors

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # from the end if negative; IndexError outside
        start = int(self._ends[i - 1]) if i else 0
        return self._decode(i, start, int(self._ends[i]))

    def __iter__(self) -> Iterator[str]:
        ends = self._ends.tolist()
        return map(self._decode, range(len(ends)), [0, *ends[:-1]], ends)

    def _decode(self, i: int, start: int, end: int) -> str:
        try:
            return self._data[start + U64.size : end].decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._what}: string {i} is not UTF-8: {error.reason}") from None

    def __repr__(self) -> str:
        return f"<{len(self)} strings: {self._what}>"


def read_value(cursor: Cursor, kind: int, what: str, depth: int = 0) -> Value:
    """The value that begins at the cursor, of the metadata type `kind`. Raises FormatError.

    An array is numpy for numbers, StringArray for strings, a tuple for arrays of arrays.
    """
    if kind == STRING:
        return cursor.string(what)
    if kind != ARRAY:
        return cursor.numbers(NUMBERS[kind], 1, what)[0].item()
    if depth == DEEPEST:
        raise cursor.error(f"{what} nests arrays deeper than {DEEPEST}: the file is damaged")
    kind, count = cursor.kind(what), cursor.u64(f"the length of {what}")
    if kind == STRING:
        return read_strings(cursor, count, what)
    if kind != ARRAY:
        return cursor.numbers(NUMBERS[kind], count, what)
    cursor.require_bytes(count, ARRAY_HEADER_BYTES, what)
    if count > MOST_INNER:
        raise cursor.error(f"{what} is an array of {count} arrays; at most {MOST_INNER} are read")
    return tuple(read_value(cursor, ARRAY, what, depth + 1) for _ in range(count))


def read_strings(cursor: Cursor, count: int, what: str) -> StringArray:
    """Read only the lengths; the bytes between them are copied."""
    cursor.require_bytes(count, U64.size, what)
    data, size, first = cursor.data, len(cursor.data), cursor.at
    length_at = U64.unpack_from
    ends, at = [0] * count, first
    for i in range(count):
        if at + U64.size > size:
            break
        ends[i] = at = at + U64.size + length_at(data, at)[0]
    if at > size or (count and not ends[-1]):
        raise cursor.error(f"{what}: a string of {count} runs past the end of the file")
    cursor.at = at
    offsets = np.array(ends, np.int64) - first
    return StringArray(bytes(data[first:at]), offsets, f"{cursor.path}: {what}")


# --- header ---------------------------------------------------------------------------------


def read_header(cursor: Cursor) -> tuple[dict[str, Value], list[TensorInfo]]:
    """Metadata and tensors of the file under the cursor. Raises FormatError."""
    check_start(cursor)
    tensor_count = cursor.u64("the number of tensors")
    metadata = read_metadata(cursor, cursor.u64("the number of metadata pairs"))
    key, get = "general.alignment", Fields(cursor.path, metadata, FormatError)
    alignment = get.integer(key, DEFAULT_ALIGNMENT, minimum=0)
    if alignment < LEAST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.error(
            f"{key} must be a power of two and at least {LEAST_ALIGNMENT}, got {alignment}"
        )
    tensors = read_tensors(cursor, tensor_count)
    begin = align(cursor.at, alignment)
    tensors = [replace(tensor, offset=begin + tensor.offset) for tensor in tensors]
    check_offsets(cursor, tensors, begin, alignment)
    return metadata, tensors


def check_start(cursor: Cursor) -> None:
    """Magic and version."""
    begins = bytes(cursor.data[: len(LFS_POINTER)])
    if begins == LFS_POINTER:
        raise cursor.error("is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if not begins.startswith(GGUF_MAGIC):
        raise cursor.error(f"is not GGUF: begins with {begins[:4]!r} instead of {GGUF_MAGIC!r}")
    cursor.advance(1, len(GGUF_MAGIC), "the magic")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(U32.size, "little"), "big")
        kind = "big-endian" if swapped in VERSIONS else f"of GGUF version {version}"
        raise cursor.error(
            f"is {kind}, but only little-endian files of versions 2 and 3 can be read; "
            "convert the model again with a current converter"
        )


def read_metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    cursor.require_bytes(count, LEAST_PAIR_BYTES, f"a list of {count} metadata pairs")
    if count > MOST_PAIRS:
        raise cursor.error(f"{count} metadata pairs; a model has some tens, at most {MOST_PAIRS}")
    metadata: dict[str, Value] = {}
    for number in range(count):
        key = cursor.string(f"metadata key {number} of {count}")
        if key in metadata:
            raise cursor.error(f"metadata key {quoted(key)} comes twice; it may come once")
        metadata[key] = read_value(cursor, cursor.kind(quoted(key)), quoted(key))
    return metadata


def align(at: int, alignment: int) -> int:
    """The next multiple of `alignment`, or `at` where it is one."""
    return -(-at // alignment) * alignment


def read_tensors(cursor: Cursor, count: int) -> list[TensorInfo]:
    """The table of tensors; offsets count from where the data begins."""
    cursor.require_bytes(count, LEAST_TENSOR_BYTES, f"a table of {count} tensors")
    tensors: dict[str, TensorInfo] = {}
    for number in range(count):
        tensor = read_tensor(cursor, f"name {number} of {count} tensors")
        if tensor.name in tensors:
            raise cursor.error(f"tensor {quoted(tensor.name)} comes twice; it may come once")
        tensors[tensor.name] = tensor
    return list(tensors.values())


def read_tensor(cursor: Cursor, what: str) -> TensorInfo:
    name = cursor.string(what)
    tensor = f"tensor {quoted(name)}"
    dimensions = cursor.u32(f"{tensor}: the number of dimensions")
    if dimensions > MOST_DIMENSIONS:
        raise cursor.error(f"{tensor} has {dimensions} dimensions; {MOST_DIMENSIONS} are allowed")
    sizes = cursor.numbers(np.dtype("<u8"), dimensions, f"{tensor}: the shape").tolist()
    sizes.reverse()  # GGUF names the fastest-running size first
    shape = checked_shape(sizes, WIDEST_ELEMENT, f"{cursor.path}: {tensor}")
    number = cursor.u32(f"{tensor}: the type")
    if number not in TENSOR_TYPES:
        raise cursor.error(
            f"{tensor} is of type {number} ({UNREADABLE_TYPES.get(number, 'unknown')}), which "
            f"cannot be read; have {' '.join(TENSOR_TYPES.values())}: take another quantization "
            "of this model, such as Q8_0"
        )
    dtype = TENSOR_TYPES[number]
    offset, kind = cursor.u64(f"{tensor}: the offset"), TYPES[dtype]
    row = shape[-1] if shape else 1
    if row % kind.elements:
        raise cursor.error(
            f"{tensor} has rows of {row} elements, but {dtype} needs a multiple of {kind.elements}"
        )
    return TensorInfo(
        name=name, shape=shape, dtype=dtype, path=cursor.path, offset=offset,
        nbytes=math.prod(shape) // kind.elements * kind.bytes,
    )  # fmt: skip


def check_offsets(cursor: Cursor, tensors: list[TensorInfo], begin: int, alignment: int) -> None:
    """Tensors fill the file from `begin` to its end: no overlap, no hole, nothing behind.

    Behind the last tensor most writers add zeros up to the alignment.
    """
    size, end, before = len(cursor.data), cursor.at, "the header"
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        tensor, start = f"tensor {quoted(info.name)}", info.offset
        if (start - begin) % alignment:
            raise cursor.error(f"{tensor} has offset {start - begin}, no multiple of {alignment}")
        if info.nbytes and start + info.nbytes > size:
            raise cursor.error(
                f"{tensor} ends at byte {start + info.nbytes}, but the file has {size}: "
                "it is cut short or damaged; fetch it again"
            )
        if start < end:
            raise cursor.error(f"{tensor} begins at byte {start}, inside of {before}")
        if start - end >= alignment:
            raise cursor.error(f"{start - end} bytes between {before} and {tensor} are unused")
        end, before = start + info.nbytes, tensor
    if size > align(end, alignment) or np.frombuffer(cursor.data[end:size], np.uint8).any():
        raise cursor.error(
            f"{size - end} bytes follow {end} bytes of header and tensors: padding may be zeros "
            f"up to a multiple of {alignment}; fetch the file again"
        )
