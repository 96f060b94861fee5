"""Tables in memory as a processor fetches it: lines of 64 bytes, and huge pages."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from glassllama.native.jit.byte_scan import cgutils, everywhere
from glassllama.native.jit.compile import instruction

HUGE_PAGE = 2**21  # bytes
LINE = 8  # numbers of 64 bits
# Memory of our own, not shared with other processes: only that comes in huge pages.
PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)
KEYS = 16  # numbers of 32 bits


def table_of_zeros(rows: int, columns: int) -> NDArray[np.uint64]:
    """(rows, columns) zeros for a table that is read here and there: in huge pages if it fills any.

    With usual pages every other look into the table waits for its address, too. The memory is
    asked from the system: what was used before, and came back, lies in usual pages for ever.
    """
    size = rows * columns * 8
    if size < HUGE_PAGE:
        return np.zeros((rows, columns), np.uint64)
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    room = mmap.mmap(-1, whole + HUGE_PAGE, **PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(room, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    memory[start : start + whole] = 0  # now, not page by page in the middle of a text
    return memory[start : start + size].view(np.uint64).reshape(rows, columns)


@instruction
def slot_of_key(typing: Any, slots: Any, line: Any, key: Any, shift: Any) -> Any:
    """slot_of_key(slots, line, key, shift) -> uint64: of slots[line] (LINE of them, uint64) the one
    that holds `key` above its lowest `shift` bits; 0 if none does."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        number = ir.IntType(64)
        several = ir.VectorType(number, LINE)
        array = context.make_array(signature.args[0])(context, builder, values[0])
        first = builder.mul(values[1], ir.Constant(number, LINE))
        place = builder.gep(array.data, [first])
        line = builder.load(builder.bitcast(place, several.as_pointer()))
        line.align = 8
        keys = builder.lshr(line, everywhere(builder, values[3], number, LINE))
        same = builder.icmp_unsigned("==", keys, everywhere(builder, values[2], number, LINE))
        found = builder.select(same, line, ir.Constant(several, [0] * LINE))
        kind = ir.FunctionType(number, [several])
        name = f"llvm.vector.reduce.or.v{LINE}i64"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [found])

    return types.uint64(slots, types.uint64, types.uint64, types.uint64), build


@instruction
def fetch_soon(typing: Any, array: Any, row: Any) -> Any:
    """fetch_soon(array, row): bring array[row] of a C-contiguous array near, and do not wait."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        at = values[1]
        for columns in cgutils.unpack_tuple(builder, data.shape)[1:]:
            at = builder.mul(at, columns)
        place = builder.bitcast(builder.gep(data.data, [at]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, keep, is_data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(prefetch, [place, to_read, keep, is_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), build


@instruction
def lowest_key(typing: Any, keys: Any, row: Any, at: Any) -> Any:
    """lowest_key(keys, row, at) -> int64: the lowest of keys[row, at : at + KEYS], C-contiguous
    numbers of 32 bits, taken as unsigned."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        number, several = ir.IntType(32), ir.VectorType(ir.IntType(32), KEYS)
        array = context.make_array(signature.args[0])(context, builder, values[0])
        columns = cgutils.unpack_tuple(builder, array.shape)[1]
        first = builder.add(builder.mul(values[1], columns), values[2])
        place = builder.gep(array.data, [first])
        line = builder.load(builder.bitcast(place, several.as_pointer()))
        line.align = 4
        kind = ir.FunctionType(number, [several])
        name = f"llvm.vector.reduce.umin.v{KEYS}i32"
        lowest = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [line])
        return builder.zext(lowest, ir.IntType(64))

    return types.int64(keys, types.int64, types.int64), build
