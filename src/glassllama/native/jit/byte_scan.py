"""What loops over text cannot say: many bytes at once, and where in them something begins."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, instruction, raw_inlined

cgutils: Any = untyped_cgutils
Bytes = NDArray[np.uint8]

PADDING = 16  # bytes behind a text, so that reading eight at its end stays within it
WINDOW = 64  # bytes that are looked at together: one bit of a machine word for each
# In each of eight bytes: the sign bit, all others, the bit between a capital and its small letter.
SIGNS, OTHERS = np.uint64(0x8080808080808080), np.uint64(0x7F7F7F7F7F7F7F7F)
TO_LOWER = np.uint64(0x2020202020202020)
FROM_A = np.uint64(0x0101010101010101 * (0x80 - ord("a")))  # added: the sign says whether ≥ a
BEHIND_Z = np.uint64(0x0101010101010101 * (0x80 - ord("z") - 1))


def padded(text: str) -> Bytes:
    """The UTF-8 of a text, and PADDING zeros; writable, as all texts of compiled loops.

    (A loop is compiled for each kind of array that it is given.)
    """
    return np.frombuffer(bytearray().join([text.encode(), bytes(PADDING)]), np.uint8)


@instruction
def eight_bytes(typing: Any, text: Any, at: Any) -> Any:
    """eight_bytes(text, at) -> uint64: text[at : at + 8], the first in the lowest place."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, values[0])
        place = builder.gep(array.data, [values[1]])
        word = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(text, types.int64), build


@instruction
def put_eight_bytes(typing: Any, text: Any, at: Any, word: Any) -> Any:
    """put_eight_bytes(text, at, uint64): text[at : at + 8] becomes what eight_bytes reads."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, values[0])
        place = builder.gep(array.data, [values[1]])
        stored = builder.store(values[2], builder.bitcast(place, ir.IntType(64).as_pointer()))
        stored.align = 1
        return context.get_dummy_value()

    return types.void(text, types.int64, types.uint64), build


@instruction
def bytes_within(typing: Any, text: Any, at: Any, first: Any, count: Any) -> Any:
    """bytes_within(text, at, first, count) -> uint64: a bit for each byte of text[at : at + 64],
    the first in the lowest place, set where it is one of `count` values from `first` on."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        byte = ir.IntType(8)
        array = context.make_array(signature.args[0])(context, builder, values[0])
        place = builder.gep(array.data, [values[1]])
        window = builder.load(builder.bitcast(place, ir.VectorType(byte, WINDOW).as_pointer()))
        window.align = 1
        first, count = (builder.trunc(value, byte) for value in values[2:])
        above = builder.sub(window, everywhere(builder, first, byte, WINDOW))
        inside = builder.icmp_unsigned("<", above, everywhere(builder, count, byte, WINDOW))
        return builder.bitcast(inside, ir.IntType(WINDOW))

    return types.uint64(text, types.int64, types.int64, types.int64), build


def everywhere(builder: Any, number: Any, kind: Any, times: int) -> Any:
    """A vector of the same number."""
    empty = ir.Constant(ir.VectorType(kind, times), ir.Undefined)
    one = builder.insert_element(empty, number, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), times), [0] * times)
    return builder.shuffle_vector(one, empty, places)


@instruction
def leading_zeros(typing: Any, word: Any) -> Any:
    """leading_zeros(uint64) -> int64; 64 of zero."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.ctlz(values[0], cgutils.false_bit)

    return types.int64(types.uint64), build


@instruction
def trailing_zeros(typing: Any, word: Any) -> Any:
    """trailing_zeros(uint64) -> int64; 64 of zero."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.cttz(values[0], cgutils.false_bit)

    return types.int64(types.uint64), build


@raw_inlined
def letters_in(word: Int) -> Int:
    """How many of eight bytes, from the first on, are ASCII letters."""
    low = (word | TO_LOWER) & OTHERS
    letters = (low + FROM_A) & ~(low + BEHIND_Z) & ~word & SIGNS
    return trailing_zeros(letters ^ SIGNS) >> 3
