"""Metadata values of a GGUF file: numbers, strings, and arrays of them, read with suspicion.

Source: the GGUF specification (ggml, docs/gguf.md), "metadata value types". Nothing is allocated
before the bytes that would fill it are known to be in the file. docs/formats/gguf.md draws them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError

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
    """A place in a file's header: it moves on as values are read, and never past the end."""

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
    """An array of strings as it lies in the file; each is decoded when asked for.

    A vocabulary of 128k words with its merges opens in a tenth of the time this way. The bytes
    are a copy, so the strings outlive the file. Raises FormatError for one that is not UTF-8.
    """

    of: ClassVar = "text"  # what base/fields.py need not ask every item

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
    """Hop from length to length; the bytes between are only copied."""
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
