"""Instructions of other processors, emulated: their kernels run on any machine, slowly.

`emulate` replaces `Vectors.call` while kernels are compiled. Dot products and table lookups become
ordinary vector instructions; instructions of matrix registers become calls of Python functions
that compute with NumPy (Intel's Software Developer's Manual, volume 1, chapter 18).
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llvmlite import ir
from numpy.typing import NDArray

from glassllama.native.jit.intrinsics import I8, I32, I64, Vectors, vector

ADDRESS_AND_STRIDE = ("tileloadd64", "tilestored64")
real_call = Vectors.call


class Tiles:
    """The eight matrix registers."""

    def __init__(self) -> None:
        self.bytes = np.zeros((8, 16, 64), np.uint8)
        self.rows, self.widths = [0] * 8, [0] * 8

    def ldtilecfg(self, address: int, *_: int) -> None:
        content = ctypes.string_at(address, 64)
        self.widths = list(struct.unpack_from("<8H", content, 16))
        self.rows = list(struct.unpack_from("<8B", content, 48))
        self.bytes[:] = 0

    def tilerelease(self, *_: int) -> None:
        self.rows, self.widths = [0] * 8, [0] * 8

    def tilezero(self, tile: int, *_: int) -> None:
        self.bytes[tile] = 0

    def tileloadd64(self, tile: int, address: int, stride: int) -> None:
        self.bytes[tile] = 0
        for row in range(self.rows[tile]):
            line = ctypes.string_at(address + row * stride, self.widths[tile])
            self.bytes[tile, row, : self.widths[tile]] = np.frombuffer(line, np.uint8)

    def tilestored64(self, tile: int, address: int, stride: int) -> None:
        for row in range(self.rows[tile]):
            line = self.bytes[tile, row, : self.widths[tile]].tobytes()
            ctypes.memmove(address + row * stride, line, len(line))

    def factors(self, sums: int, left: int, right: int, dtype: Any) -> tuple[NDArray, NDArray]:
        """(rows, words, parts of a word) and (words, columns, parts)."""
        assert self.rows[sums] == self.rows[left]
        assert self.widths[sums] == self.widths[right]
        assert self.widths[left] == 4 * self.rows[right]
        parts = 4 // np.dtype(dtype).itemsize
        return tuple(self.bytes[n].view(dtype).reshape(16, 16, parts) for n in (left, right))

    def tdpbssd(self, sums: int, left: int, right: int) -> None:
        a, b = (x.astype(np.int32) for x in self.factors(sums, left, right, np.int8))
        self.bytes[sums].view(np.int32)[:] += np.einsum("mki,kni->mn", a, b)

    def tdpbf16ps(self, sums: int, left: int, right: int) -> None:
        a, b = (x.astype(np.float32) for x in self.factors(sums, left, right, ml_dtypes.bfloat16))
        self.bytes[sums].view(np.float32)[:] += np.einsum("mki,kni->mn", a, b)


TILES = Tiles()
WORDS = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)
CALLBACKS = {
    name: WORDS(getattr(TILES, name))
    for name in ("ldtilecfg", "tilerelease", "tilezero", "tileloadd64", "tilestored64", "tdpbssd",
                 "tdpbf16ps")
}  # fmt: skip


def call(v: Vectors, name: str, result: Any, *arguments: Any) -> Any:
    """In place of `Vectors.call`."""
    operation = name.removeprefix("llvm.x86.").removeprefix("llvm.aarch64.neon.")
    if operation in CALLBACKS:
        return call_python(v, operation, arguments)
    if operation.startswith("avx512.vpdpbusd"):
        return dot(v, *arguments, unsigned=True)
    if operation.startswith("sdot"):
        return dot(v, *arguments, unsigned=False)
    if operation.startswith(("avx512.pshuf.b", "tbl1")):
        return look_up(v, *arguments)
    if operation == "avx512.pmaddw.d.512":
        return products_added(v, result, *arguments, count=2, unsigned=False)
    return real_call(v, name, result, *arguments)


def call_python(v: Vectors, operation: str, arguments: tuple[Any, ...]) -> None:
    b, words = v.builder, list[Any]()
    for argument in arguments:
        is_pointer = isinstance(argument.type, ir.PointerType)
        words.append(b.ptrtoint(argument, I64) if is_pointer else b.zext(argument, I64))
    words += [ir.Constant(I64, 0)] * (3 - len(words))
    form = ir.FunctionType(ir.VoidType(), [I64] * 3)
    address = ctypes.cast(CALLBACKS[operation], ctypes.c_void_p).value
    b.call(b.inttoptr(ir.Constant(I64, address), form.as_pointer()), words)


def dot(v: Vectors, sums: Any, weights: Any, inputs: Any, *, unsigned: bool) -> Any:
    b, size = v.builder, vector(I8, 4 * sums.type.count)
    factors = b.bitcast(weights, size), b.bitcast(inputs, size)
    return b.add(sums, products_added(v, sums.type, *factors, count=4, unsigned=unsigned))


def products_added(
    v: Vectors, result: Any, left: Any, right: Any, *, count: int, unsigned: bool
) -> Any:
    """`count` products of neighbors, added up in each lane."""
    b, wide, nothing = v.builder, vector(I32, left.type.count), ir.Constant(I32, ir.Undefined)
    products = b.mul((b.zext if unsigned else b.sext)(left, wide), b.sext(right, wide))
    nothing = ir.Constant(wide, ir.Undefined)
    total = v.same(result, 0)
    for n in range(count):
        lanes = ir.Constant(result, list(range(n, left.type.count, count)))
        total = b.add(total, b.shuffle_vector(products, nothing, lanes))
    return total


def look_up(v: Vectors, table: Any, codes: Any) -> Any:
    b, found = v.builder, v.same(codes.type, 0)
    for code, step in enumerate(table.constant[:16]):
        here = b.icmp_unsigned("==", codes, v.same(codes.type, code))
        found = b.select(here, v.same(codes.type, step), found)
    return found


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vectors, "call", call)
