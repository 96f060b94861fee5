"""Tables in memory as a processor fetches it: lines of 64 bytes, and huge pages."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from glassllama.tokenizers.compiled import instruction
from glassllama.tokenizers.eight_bytes import cgutils, everywhere

HUGE_PAGE = 2**21  # bytes
LINE = 8  # numbers of 64 bits


def table_of_zeros(rows: int, columns: int) -> NDArray[np.uint64]:
    """(rows, columns) zeros for a table that is read here and there: in huge pages if it fills any.

    NumPy asks Linux for huge pages where an array is large; they have to begin at multiples of
    their size. With usual pages every other look into the table waits for its address, too.
    """
    size = rows * columns * 8
    if size < HUGE_PAGE:
        return np.zeros((rows, columns), np.uint64)
    memory = np.empty(-(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    memory.fill(0)  # now, not page by page in the middle of a text
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
    """fetch_soon(array, row): bring a row of a C-contiguous 2-D array near, and do not wait."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0])
        columns = cgutils.unpack_tuple(builder, data.shape)[1]
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = builder.bitcast(builder.gep(data.data, [builder.mul(values[1], columns)]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, keep, is_data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(prefetch, [place, to_read, keep, is_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), build
