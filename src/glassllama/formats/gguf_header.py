"""The header of one GGUF file: metadata, and the offsets of its tensors.

    magic version counts │ key type value … │ name sizes type offset … │ padding │ data

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian. Every byte
must be accounted for: it belongs to the header, to one tensor, or to padding shorter than the
alignment; anything else is an error. Nothing is allocated before the bytes that would fill it are
known to be in the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorInfo
from glassllama.formats.blocks import block_layout
from glassllama.formats.mmap_file import checked_shape

# --- metadata values ------------------------------------------------------------------------

NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
BOOL, STRING, ARRAY = 7, 8, 9
DEEPEST = 8  # arrays inside arrays; real files have none, but the format allows them
MOST_INNER = 2**16  # arrays in an array; no key that is read holds arrays of arrays

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
ARRAY_HEADER_BYTES = U32.size + U64.size  # type of the elements, number of elements

Value = Any  # int | float | bool | str | read-only array | StringArray | tuple of the last three


class Cursor:
    """A position in a file's header; it advances as values are read, and never past the end."""

    def __init__(self, data: memoryview, path: str) -> None:
        self.data, self.path, self.at = data, path, 0

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem}")

    def check_room(self, count: int, size: int, what: str) -> None:
        """`count` things of at least `size` bytes each must still fit into the file."""
        left = len(self.data) - self.at
        if count * size > left:
            raise self.error(
                f"{what} needs {count * size} bytes at byte {self.at}, but only {left} are left: "
                "the file is cut short or damaged; fetch it again"
            )

    def take(self, count: int, size: int, what: str) -> int:
        """Move on by `count * size` bytes -> where they begin."""
        self.check_room(count, size, what)
        start = self.at
        self.at += count * size
        return start

    def u32(self, what: str) -> int:
        return int(U32.unpack_from(self.data, self.take(1, U32.size, what))[0])

    def u64(self, what: str) -> int:
        return int(U64.unpack_from(self.data, self.take(1, U64.size, what))[0])

    def string(self, what: str) -> str:
        start = self.take(self.u64(f"the length of {what}"), 1, what)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {start} is not UTF-8: {error.reason}") from None

    def numbers(self, dtype: np.dtype[Any], count: int, what: str) -> NDArray[Any]:
        """The next `count` numbers, copied, so that the file may be closed; read-only."""
        start = self.take(count, dtype.itemsize, what)
        return np.frombuffer(bytes(self.data[start : self.at]), dtype)

    def bools(self, count: int, what: str) -> NDArray[Any]:
        """One byte each, 0 or 1: any other would be a broken np.bool."""
        values = self.numbers(np.dtype("u1"), count, what)
        if count and values.max() > 1:
            raise self.error(f"{what} holds a bool of {values.max()}; a bool is 0 or 1")
        return values.view(np.bool_)


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

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # from the end if negative; IndexError outside
        start = int(self._ends[i - 1]) if i else 0
        return self._decode(i, start, int(self._ends[i]))

    def __iter__(self) -> Iterator[str]:
        start = 0
        for i, end in enumerate(self._ends.tolist()):
            yield self._decode(i, start, end)
            start = end

    def _decode(self, i: int, start: int, end: int) -> str:
        try:
            return self._data[start + U64.size : end].decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._what}: string {i} is not UTF-8: {error.reason}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | tuple | StringArray) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equal to lists, so unhashable like them

    def __repr__(self) -> str:
        return f"<{len(self)} strings: {self._what}>"


def read_value(cursor: Cursor, kind: int, what: str, depth: int = 0) -> Value:
    """The value that begins at the cursor, of the metadata type `kind`. Raises FormatError."""
    if kind == STRING:
        return cursor.string(what)
    if kind == ARRAY:
        return read_array(cursor, what, depth)
    if kind == BOOL:
        return bool(cursor.bools(1, what)[0])
    if kind in NUMBERS:
        return cursor.numbers(NUMBERS[kind], 1, what)[0].item()
    raise cursor.error(
        f"{what} has the unknown metadata type {kind}; types are 0 to 12: "
        "the file is damaged, or newer than this reader"
    )


def read_array(cursor: Cursor, what: str, depth: int) -> Value:
    """An array: numpy for numbers, StringArray for strings, a tuple for arrays of arrays."""
    if depth == DEEPEST:
        raise cursor.error(f"{what} nests arrays deeper than {DEEPEST}: the file is damaged")
    kind, count = cursor.u32(f"the type of {what}"), cursor.u64(f"the length of {what}")
    if kind == STRING:
        return read_strings(cursor, count, what)
    if kind == BOOL:
        return cursor.bools(count, what)
    if kind in NUMBERS:
        return cursor.numbers(NUMBERS[kind], count, what)
    if kind != ARRAY:
        raise cursor.error(f"{what} is an array of the unknown metadata type {kind}; have 0 to 12")
    cursor.check_room(count, ARRAY_HEADER_BYTES, what)
    if count > MOST_INNER:
        raise cursor.error(f"{what} is an array of {count} arrays; at most {MOST_INNER} are read")
    return tuple(read_array(cursor, what, depth + 1) for _ in range(count))


def read_strings(cursor: Cursor, count: int, what: str) -> StringArray:
    """Read only the lengths; the bytes between them are copied."""
    cursor.check_room(count, U64.size, what)
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

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 counted in 32 bits; 3 is 2 with big-endian files allowed
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS holds instead
LEAST_PAIR_BYTES = U64.size + U32.size + 1  # empty key, type, one byte
MOST_PAIRS = 2**16
LEAST_TENSOR_BYTES = U64.size + U32.size + U32.size + U64.size  # empty name, no sizes
DEFAULT_ALIGNMENT, LEAST_ALIGNMENT = 32, 8
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
WIDEST_ELEMENT = 8  # bytes

TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
}  # fmt: skip
UNREADABLE_TYPES = {  # only named, so that the error can say what came
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
    41: "Q1_0",
    # dropped from ggml, but files have them
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A row of the tensor table; `shape` in numpy's order, `offset` from where the data begins."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


def read_header(cursor: Cursor) -> tuple[dict[str, Value], list[TensorInfo]]:
    """Metadata and tensors of the file under the cursor. Raises FormatError."""
    check_magic(cursor)
    check_version(cursor)
    tensor_count = cursor.u64("the number of tensors")
    metadata = read_metadata(cursor, cursor.u64("the number of metadata pairs"))
    alignment = read_alignment(cursor, metadata)
    entries = read_entries(cursor, tensor_count)
    begin = align(cursor.at, alignment)
    check_places(cursor, entries, begin, alignment)
    tensors = [
        TensorInfo(
            name=entry.name,
            shape=entry.shape,
            dtype=entry.dtype,
            path=cursor.path,
            offset=begin + entry.offset,
            nbytes=entry.nbytes,
        )
        for entry in entries
    ]
    return metadata, tensors


def check_magic(cursor: Cursor) -> None:
    begins = bytes(cursor.data[: len(LFS_POINTER)])
    if begins == LFS_POINTER:
        raise cursor.error("is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if begins[: len(MAGIC)] != MAGIC:
        raise cursor.error(f"is not GGUF: begins with {begins[:4]!r} instead of {MAGIC!r}")
    cursor.take(1, len(MAGIC), "the magic")


def check_version(cursor: Cursor) -> None:
    version = cursor.u32("the version")
    if version in VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(U32.size, "little"), "big")
    kind = "big-endian" if swapped in VERSIONS else f"of GGUF version {version}"
    raise cursor.error(
        f"is {kind}, but only little-endian files of versions 2 and 3 can be read; "
        "convert the model again with a current converter"
    )


def read_metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    cursor.check_room(count, LEAST_PAIR_BYTES, f"a list of {count} metadata pairs")
    if count > MOST_PAIRS:
        raise cursor.error(f"{count} metadata pairs; a model has some tens, at most {MOST_PAIRS}")
    metadata: dict[str, Value] = {}
    for number in range(count):
        key = cursor.string(f"metadata key {number} of {count}")
        if key in metadata:
            raise cursor.error(f"metadata key {quoted(key)} comes twice; it may come once")
        metadata[key] = read_value(cursor, cursor.u32(f"the type of {quoted(key)}"), quoted(key))
    return metadata


def read_alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    key = "general.alignment"
    get = Fields(cursor.path, metadata, FormatError)
    value = get.whole(key, DEFAULT_ALIGNMENT, least=0)
    if value < LEAST_ALIGNMENT or value & (value - 1):
        raise cursor.error(
            f"{key} must be a power of two and at least {LEAST_ALIGNMENT}, got {value}"
        )
    return value


def align(at: int, alignment: int) -> int:
    """The next multiple of `alignment`, or `at` where it is one."""
    return -(-at // alignment) * alignment


def read_entries(cursor: Cursor, count: int) -> list[Entry]:
    cursor.check_room(count, LEAST_TENSOR_BYTES, f"a table of {count} tensors")
    entries: dict[str, Entry] = {}
    for number in range(count):
        entry = read_entry(cursor, f"name {number} of {count} tensors")
        if entry.name in entries:
            raise cursor.error(f"tensor {quoted(entry.name)} comes twice; it may come once")
        entries[entry.name] = entry
    return list(entries.values())


def read_entry(cursor: Cursor, what: str) -> Entry:
    name = cursor.string(what)
    tensor = f"tensor {quoted(name)}"
    dimensions = cursor.u32(f"{tensor}: the number of dimensions")
    if dimensions > MOST_DIMENSIONS:
        raise cursor.error(f"{tensor} has {dimensions} dimensions; {MOST_DIMENSIONS} are allowed")
    sizes = cursor.numbers(np.dtype("<u8"), dimensions, f"{tensor}: the shape").tolist()
    sizes.reverse()  # GGUF names the fastest-running size first
    shape = checked_shape(sizes, WIDEST_ELEMENT, f"{cursor.path}: {tensor}")
    dtype = tensor_type(cursor, cursor.u32(f"{tensor}: the type"), tensor)
    offset = cursor.u64(f"{tensor}: the offset")
    return Entry(name, shape, dtype, offset, count_bytes(cursor, tensor, shape, dtype))


def tensor_type(cursor: Cursor, number: int, tensor: str) -> str:
    if number in TENSOR_TYPES:
        return TENSOR_TYPES[number]
    named = UNREADABLE_TYPES.get(number, "unknown")
    raise cursor.error(
        f"{tensor} is of type {number} ({named}), which cannot be read; have "
        f"{' '.join(TENSOR_TYPES.values())}: take another quantisation of this model, such as Q8_0"
    )


def count_bytes(cursor: Cursor, tensor: str, shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor of `shape`; rows must be whole blocks."""
    layout = block_layout(dtype)
    row = shape[-1] if shape else 1
    if row % layout.elements:
        raise cursor.error(
            f"{tensor} has rows of {row} elements, but {dtype} needs a multiple of "
            f"{layout.elements}"
        )
    return math.prod(shape) // layout.elements * layout.bytes


def check_places(cursor: Cursor, entries: list[Entry], begin: int, alignment: int) -> None:
    """Tensors fill the file from `begin` to its end: no overlap, no hole, nothing behind."""
    size, end, before = len(cursor.data), cursor.at, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        tensor, start = f"tensor {quoted(entry.name)}", begin + entry.offset
        if entry.offset % alignment:
            raise cursor.error(f"{tensor} has offset {entry.offset}, no multiple of {alignment}")
        if entry.nbytes and start + entry.nbytes > size:
            raise cursor.error(
                f"{tensor} ends at byte {start + entry.nbytes}, but the file has {size}: "
                "it is cut short or damaged; fetch it again"
            )
        if start < end:
            raise cursor.error(f"{tensor} begins at byte {start}, inside of {before}")
        if start - end >= alignment:
            raise cursor.error(f"{start - end} bytes between {before} and {tensor} are unused")
        end, before = start + entry.nbytes, tensor
    check_tail(cursor, end, alignment)


def check_tail(cursor: Cursor, end: int, alignment: int) -> None:
    """Behind the last tensor: nothing, or zeros up to the alignment, as most writers add."""
    size = len(cursor.data)
    if size > align(end, alignment) or np.frombuffer(cursor.data[end:size], np.uint8).any():
        raise cursor.error(
            f"{size - end} bytes follow {end} bytes of header and tensors: padding may be zeros "
            f"up to a multiple of {alignment}; fetch the file again"
        )
