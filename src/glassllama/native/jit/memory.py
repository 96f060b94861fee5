"""Memory as a processor fetches it: huge pages, lines of 64 bytes, many bytes of a text at once."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_inlined
from glassllama.native.jit.intrinsics import (
    ARRAY,
    I8,
    I32,
    I64,
    Vectors,
    cgutils,
    instruction,
    number,
    types,
    vector,
)

Bytes = NDArray[np.uint8]

HUGE_PAGE = 2 << 20
# By default Python maps shared memory, which gets no huge pages.
PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)
SLOTS = 8  # numbers of 64 bits in a cache line
KEYS = 16  # numbers of 32 bits in a cache line
PADDING = 16  # bytes after a text, so that reading eight at its end stays within it
WINDOW = 64  # bytes that are compared at once: one bit of a machine word for each
# In each of eight bytes: the sign bit, all others, the bit between a capital and its small letter.
SIGNS, OTHERS = np.uint64(0x8080808080808080), np.uint64(0x7F7F7F7F7F7F7F7F)
TO_LOWER = np.uint64(0x2020202020202020)
FROM_A = np.uint64(0x0101010101010101 * (0x80 - ord("a")))  # added: the sign bit is set from a on
AFTER_Z = np.uint64(0x0101010101010101 * (0x80 - ord("z") - 1))


# --- allocation -----------------------------------------------------------------------------------


def own_memory(nbytes: int) -> Bytes:
    """Private zeroed memory that begins at a huge page; in huge pages if the system has them.

    It is asked from the system: freed memory that is used again stays in usual pages.
    """
    mapping = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE) + HUGE_PAGE, **PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    return memory[start : start + nbytes]


def table_of_zeros(rows: int, columns: int) -> NDArray[np.uint64]:
    """(rows, columns) zeros for a table with random access: in huge pages if it fills any.

    With usual pages every other access waits for the translation of its address, too.
    """
    size = rows * columns * 8
    if size < HUGE_PAGE:
        return np.zeros((rows, columns), np.uint64)
    memory = own_memory(-(-size // HUGE_PAGE) * HUGE_PAGE)
    memory[:] = 0  # all pages are allocated now, not one by one in the middle of a text
    return memory[:size].view(np.uint64).reshape(rows, columns)


def padded(text: str) -> Bytes:
    """The UTF-8 of a text and PADDING zeros; writable, as all texts of compiled loops.

    (A loop is compiled for each type of array that it is given.)
    """
    return np.frombuffer(bytearray().join([text.encode(), bytes(PADDING)]), np.uint8)


# --- bytes of a text ------------------------------------------------------------------------------


def place_at(v: Vectors, array: Any, at: Any, kind: Any) -> Any:
    """A pointer to type `kind` at an index of an array."""
    return v.builder.bitcast(v.builder.gep(array.data, [at]), kind.as_pointer())


@instruction(ARRAY, types.int64, returns=types.uint64)
def eight_bytes(v: Vectors, text: Any, at: Any) -> Any:
    """eight_bytes(text, at) -> uint64: text[at : at + 8], the first in the lowest place."""
    word = v.builder.load(place_at(v, text, at, I64))
    word.align = 1
    return word


@instruction(ARRAY, types.int64, types.uint64)
def put_eight_bytes(v: Vectors, text: Any, at: Any, word: Any) -> None:
    """put_eight_bytes(text, at, uint64): the inverse of eight_bytes."""
    stored = v.builder.store(word, place_at(v, text, at, I64))
    stored.align = 1


@instruction(ARRAY, types.int64, types.int64, types.int64, returns=types.uint64)
def bytes_within(v: Vectors, text: Any, at: Any, first: Any, count: Any) -> Any:
    """bytes_within(text, at, first, count) -> uint64: a bit for each byte of text[at : at + 64],
    the first in the lowest place, set if the byte is one of `count` values from `first` on."""
    b = v.builder
    window = b.load(place_at(v, text, at, vector(I8, WINDOW)))
    window.align = 1
    low, size = (v.splat(b.trunc(value, I8), WINDOW) for value in (first, count))
    inside = b.icmp_unsigned("<", b.sub(window, low), size)
    return b.bitcast(inside, ir.IntType(WINDOW))


@instruction(types.uint64, returns=types.int64)
def leading_zeros(v: Vectors, word: Any) -> Any:
    """leading_zeros(uint64) -> int64; 64 for zero."""
    return v.builder.ctlz(word, cgutils.false_bit)


@instruction(types.uint64, returns=types.int64)
def trailing_zeros(v: Vectors, word: Any) -> Any:
    """trailing_zeros(uint64) -> int64; 64 for zero."""
    return v.builder.cttz(word, cgutils.false_bit)


@raw_inlined
def letters_in(word: Int) -> Int:
    """How many of eight bytes, from the first on, are ASCII letters."""
    low = (word | TO_LOWER) & OTHERS
    letters = (low + FROM_A) & ~(low + AFTER_Z) & ~word & SIGNS
    return trailing_zeros(letters ^ SIGNS) >> 3


# --- lines of a table -----------------------------------------------------------------------------


@instruction(ARRAY, types.uint64, types.uint64, types.uint64, returns=types.uint64)
def slot_of_key(v: Vectors, slots: Any, line: Any, key: Any, shift: Any) -> Any:
    """slot_of_key(slots, line, key, shift) -> uint64: the one of slots[line] (SLOTS uint64) that
    contains `key` above its lowest `shift` bits; 0 if none does."""
    b, several = v.builder, vector(I64, SLOTS)
    row = b.load(place_at(v, slots, b.mul(line, number(SLOTS)), several))
    row.align = 8
    same = b.icmp_unsigned("==", b.lshr(row, v.splat(shift, SLOTS)), v.splat(key, SLOTS))
    found = b.select(same, row, v.same(several, 0))
    return v.call(f"llvm.vector.reduce.or.v{SLOTS}i64", I64, found)


@instruction(ARRAY, types.int64)
def fetch_soon(v: Vectors, array: Any, row: Any) -> None:
    """fetch_soon(array, row): prefetch array[row] of a C-contiguous array."""
    b, location = v.builder, row
    for columns in cgutils.unpack_tuple(b, array.shape)[1:]:
        location = b.mul(location, columns)
    to_read, nearest, is_data = (ir.Constant(I32, value) for value in (0, 3, 1))
    pointer = place_at(v, array, location, I8)
    v.call("llvm.prefetch.p0", ir.VoidType(), pointer, to_read, nearest, is_data)


@instruction(ARRAY, types.int64, types.int64, returns=types.int64)
def lowest_key(v: Vectors, keys: Any, row: Any, at: Any) -> Any:
    """lowest_key(keys, row, at) -> int64: the lowest of keys[row, at : at + KEYS], C-contiguous
    numbers of 32 bits, compared as unsigned."""
    b, several = v.builder, vector(I32, KEYS)
    columns = cgutils.unpack_tuple(b, keys.shape)[1]
    line = b.load(place_at(v, keys, b.add(b.mul(row, columns), at), several))
    line.align = 4
    return b.zext(v.call(f"llvm.vector.reduce.umin.v{KEYS}i32", I32, line), I64)
