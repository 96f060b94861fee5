"""What loops over text cannot say: eight bytes at once, and where in them something begins."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray

from glassllama.tokenizers.compiled import Int, inlined, instruction

Bytes = NDArray[np.uint8]

PADDING = 16  # bytes behind a text, so that reading eight at its end stays within it
# In each of eight bytes: the sign bit, all others, the bit between a capital and its small letter.
SIGNS, OTHERS = np.uint64(0x8080808080808080), np.uint64(0x7F7F7F7F7F7F7F7F)
TO_LOWER = np.uint64(0x2020202020202020)
FROM_A = np.uint64(0x0101010101010101 * (0x80 - ord("a")))  # added: the sign says whether ≥ a
BEHIND_Z = np.uint64(0x0101010101010101 * (0x80 - ord("z") - 1))


def padded(text: str) -> Bytes:
    """The UTF-8 of a text, and PADDING zeros."""
    return np.frombuffer(text.encode() + bytes(PADDING), np.uint8)


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
def trailing_zeros(typing: Any, word: Any) -> Any:
    """trailing_zeros(uint64) -> int64; 64 of zero."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.cttz(values[0], cgutils.false_bit)

    return types.int64(types.uint64), build


@inlined
def letters_in(word: Int) -> Int:
    """How many of eight bytes, from the first on, are ASCII letters."""
    low = (word | TO_LOWER) & OTHERS
    letters = (low + FROM_A) & ~(low + BEHIND_Z) & ~word & SIGNS
    return trailing_zeros(letters ^ SIGNS) >> 3
