"""The header of one GGUF file: what it says of itself, and where its tensors lie.

    magic version counts │ key type value … │ name sizes type offset … │ padding │ data

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian. Every byte
must be accounted for: it belongs to the header, to one tensor, or to padding shorter than the
alignment. Whatever else is in a file is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from glassllama.base.errors import FormatError, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorInfo
from glassllama.formats.blocks import block_layout
from glassllama.formats.dtypes import checked_shape
from glassllama.formats.gguf_values import U32, U64, Cursor, Value, read_value

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
