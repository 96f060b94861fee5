"""Numba intrinsics for what Python cannot express: addresses, bit patterns, atomics, calls by
address.

Each function is one or two instructions. Addresses are plain integers that are passed as arguments:
a compiled function that is cached on disk must not contain one.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_process_triple
from numba.core import cgutils as untyped_cgutils
from numba.core import types as untyped_types

from glassllama.native.jit.compile import inlined, instruction

WORD = ir.IntType(64)
# Numba's own annotations are incomplete.
cgutils: Any = untyped_cgutils
types: Any = untyped_types
carray: Any = numba.carray  # type: ignore[attr-defined]


@instruction
def pointer(context: Any, address: Any) -> Any:
    """An address as a pointer for `carray`: (int) -> void*."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), emit


@instruction
def stack_words(context: Any) -> Any:
    """Sixteen 32-bit words on the caller's stack, one cache line: () -> void*."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = cgutils.alloca_once(builder, ir.VectorType(ir.IntType(32), 16))
        return builder.bitcast(line, context.get_value_type(types.voidptr))

    return types.voidptr(), emit


@instruction
def float_from_bits(context: Any, bits: Any) -> Any:
    """(int32) -> the float32 with these bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), emit


@instruction
def bits_from_float(context: Any, number: Any) -> Any:
    """(float32) -> its bits as int32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), emit


@instruction
def atomic_add(context: Any, address: Any, amount: Any) -> Any:
    """Add to a shared 64-bit word -> its value before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], WORD.as_pointer())
        return builder.atomic_rmw("add", word, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@instruction
def atomic_swap(context: Any, address: Any, value: Any) -> Any:
    """Write a shared word -> its value before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], WORD.as_pointer())
        return builder.atomic_rmw("xchg", word, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@instruction
def compare_and_swap(context: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write a shared word if it still has the expected value -> whether it had."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], WORD.as_pointer())
        pair = builder.cmpxchg(word, arguments[1], arguments[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), emit


@instruction
def atomic_load(context: Any, address: Any) -> Any:
    """Read a shared word; everything that its writer wrote before is visible afterwards."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], WORD.as_pointer())
        return builder.load_atomic(word, "acquire", 8)

    return types.int64(types.int64), emit


@instruction
def atomic_store(context: Any, address: Any, value: Any) -> Any:
    """Write a shared word, after everything that was written before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], WORD.as_pointer())
        builder.store_atomic(arguments[1], word, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@instruction
def relax(context: Any) -> Any:
    """Tell the processor that this is a spin loop: it saves power."""
    triple = get_process_triple()

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if triple.startswith("x86_64"):
            name, words = "llvm.x86.sse2.pause", []
        elif triple.startswith(("aarch64", "arm64")):
            name, words = "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]  # YIELD
        else:
            return context.get_dummy_value()
        kind = ir.FunctionType(ir.VoidType(), [word.type for word in words])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), words)
        return context.get_dummy_value()

    return types.void(), emit


@instruction
def call_system(context: Any, address: Any) -> Any:
    """Call a C function without arguments, such as sched_yield, by its address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@instruction
def call_kernel(context: Any, address: Any, arguments: Any) -> Any:
    """Call a kernel (native/engine/gemm_plain.py, native/engine/get_rows.py) or a C function by its
    address.

    `arguments` is a tuple of integers.
    """
    count = len(arguments)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words = cgutils.unpack_tuple(builder, values[1], count)
        kind = ir.FunctionType(ir.VoidType(), [WORD] * count)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), words)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, count)), emit


@inlined
def float_from_half(half: int) -> Any:
    """The float32 of an IEEE half's 16 bits; also infinities and NaN."""
    bits = np.int32(half)
    shifted = np.int32((bits & np.int32(0x7FFF)) << np.int32(13))
    magnitude = float_from_bits(shifted) * np.float32(
        2.0**112
    )  # the exponent biases differ by 127 - 15
    if shifted >= np.int32(0x0F800000):  # the largest exponent: infinity or NaN
        magnitude = float_from_bits(np.int32(shifted | np.int32(0x7F800000)))
    return -magnitude if bits & np.int32(0x8000) else magnitude


@inlined
def float_from_bfloat(upper: int) -> Any:
    """The float32 whose upper half these 16 bits are."""
    return float_from_bits(np.int32(np.int32(upper) << np.int32(16)))


@inlined
def bfloat_from_float(number: float) -> Any:
    """The 16 bits of the nearest bfloat16, ties to even, as int32."""
    bits = bits_from_float(number)
    odd = (bits >> np.int32(16)) & np.int32(1)
    return np.int32((bits + np.int32(0x7FFF) + odd) >> np.int32(16))


@inlined
def floats(address: int, shape: Any) -> Any:
    """A float32 array at an address: no copy, no bounds check."""
    return carray(pointer(address), shape, np.float32)


@inlined
def bytes8(address: int, shape: Any) -> Any:
    return carray(pointer(address), shape, np.uint8)


@inlined
def integers8(address: int, shape: Any) -> Any:
    return carray(pointer(address), shape, np.int8)


@inlined
def words16(address: int, shape: Any) -> Any:
    return carray(pointer(address), shape, np.uint16)


@inlined
def integers16(address: int, shape: Any) -> Any:
    return carray(pointer(address), shape, np.int16)


@inlined
def integers64(address: int, shape: Any) -> Any:
    return carray(pointer(address), shape, np.int64)
