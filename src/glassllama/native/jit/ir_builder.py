"""Operations on vectors on top of llvmlite's IR builder, for the vector kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from glassllama.native.jit.intrinsics import cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
LINE = 64  # bytes of a cache line
NEAR = 1024  # prefetch distance in bytes, if memory is read at several places at once
AHEAD = 8192  # prefetch distance in bytes: two small pages; hardware prefetching stops at one


def vector(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes)


def number(value: int) -> Any:
    return ir.Constant(I64, value)


class Vectors:
    """An LLVM builder with the operations that the kernels need."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, address: Any, offset: int) -> Any:
        return self.builder.add(address, number(offset))

    def step(self, address: Any, index: Any, size: int) -> Any:
        """address + index · size."""
        return self.builder.add(address, self.builder.mul(index, number(size)))

    def multiples(self, stride: Any, count: int) -> list[Any]:
        """0, stride, 2 · stride, …; odd multiples go through an empty assembler statement.

        Otherwise the compiler, to save registers, computes the address of every token's input from
        that of the token before: as many instructions as there are products. Even multiples need no
        register: addressing modes multiply by two, four or eight.
        """
        alone = ir.FunctionType(stride.type, [stride.type])
        odd = {
            n: self.builder.asm(alone, "", "=r,0", [self.builder.mul(stride, number(n))], False)
            for n in range(1, count, 2)
        }
        times = {n: n & -n for n in range(1, count)}  # the power of two in n
        return [number(0)] + [
            self.builder.mul(odd[n // twos], number(twos)) for n, twos in times.items()
        ]

    def load(self, address: Any, kind: Any, align: int) -> Any:
        loaded = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        loaded.align = align
        return loaded

    def prefetch(self, address: Any, nbytes: int) -> None:
        """Prefetch `nbytes` of memory into the second-level cache."""
        byte, b = I8.as_pointer(), self.builder
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        read, second_level, data = (ir.Constant(I32, n) for n in (0, 2, 1))
        for line in range(0, nbytes, LINE):
            place = b.inttoptr(self.at(address, line), byte)
            b.call(function, [place, read, second_level, data])

    def store(self, value: Any, address: Any, align: int) -> None:
        stored = self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()))
        stored.align = align

    def splat(self, scalar: Any, lanes: int) -> Any:
        """The same number in every lane."""
        kind = vector(scalar.type, lanes)
        one = self.builder.insert_element(
            ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0)
        )
        lanes_of_first = ir.Constant(vector(I32, lanes), [0] * lanes)
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), lanes_of_first)

    def same(self, kind: Any, value: float) -> Any:
        """A constant in every lane of a vector type."""
        return ir.Constant(kind, [value] * kind.count)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """x · y + z with one rounding."""
        return self.call(f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)

    def fused(self, x: Any, y: Any, z: Any) -> Any:
        """x · y + z, with one rounding if the processor has the instruction."""
        flags = ("contract",)
        return self.builder.fadd(self.builder.fmul(x, y, flags=flags), z, flags=flags)

    def halves(self, address: Any, lanes: int) -> Any:
        """Half-precision numbers in memory as float32."""
        return self.builder.fpext(
            self.load(address, vector(F16, lanes), 2 * lanes), vector(F32, lanes)
        )

    def whole(self, address: Any, lanes: int, *, signed: bool) -> Any:
        """Bytes in memory as float32."""
        small, b = self.load(address, vector(I8, lanes), lanes), self.builder
        wide = vector(I32, lanes)
        return b.sitofp(b.sext(small, wide) if signed else b.zext(small, wide), vector(F32, lanes))

    def low_nibbles(self, packed: Any) -> Any:
        return self.builder.and_(packed, self.same(packed.type, 15))

    def high_nibbles(self, packed: Any) -> Any:
        """Shifted in 16-bit lanes: there is no shift of bytes. The mask drops other bits."""
        words = vector(I16, packed.type.count // 2)
        shifted = self.builder.lshr(self.builder.bitcast(packed, words), self.same(words, 4))
        return self.low_nibbles(self.builder.bitcast(shifted, packed.type))

    def count_up(
        self, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """A loop of `count` ≥ 1 iterations: body(index, values) -> values of the next iteration."""
        b = self.builder
        before, loop = b.block, b.append_basic_block("loop")
        after = b.append_basic_block("after")
        b.branch(loop)
        b.position_at_end(loop)
        index = b.phi(I64)
        index.add_incoming(number(0), before)
        values = [b.phi(value.type) for value in carried]
        for value, start in zip(values, carried, strict=True):
            value.add_incoming(start, before)
        results = body(index, values)
        following = b.add(index, number(1))
        index.add_incoming(following, b.block)
        for value, result in zip(values, results, strict=True):
            value.add_incoming(result, b.block)
        b.cbranch(b.icmp_signed("<", following, count), loop, after)
        b.position_at_end(after)
        return results

    def reduce(self, name: str, x: Any) -> Any:
        """Reduce all lanes to one: umax or add of integers."""
        letter = "f" if isinstance(x.type.element, ir.FloatType) else "i"
        suffix = f"v{x.type.count}{letter}32"
        return self.call(f"llvm.vector.reduce.{name}.{suffix}", x.type.element, x)

    def folded(self, x: Any, join: Callable[[Any, Any], Any]) -> Any:
        """Reduce all lanes to one by halving: lane n with lane n + half, until one is left."""
        while x.type.count > 1:
            half = x.type.count // 2
            low, high = (
                ir.Constant(vector(I32, half), list(range(start, start + half)))
                for start in (0, half)
            )
            nothing, b = ir.Constant(x.type, ir.Undefined), self.builder
            x = join(b.shuffle_vector(x, nothing, low), b.shuffle_vector(x, nothing, high))
        return self.builder.extract_element(x, ir.Constant(I32, 0))

    def total(self, x: Any) -> Any:
        """The sum of all lanes."""
        return self.folded(x, self.builder.fadd)

    def largest(self, x: Any) -> Any:
        """The largest of all lanes, one instruction per step; the result for NaN is undefined."""
        b = self.builder
        return self.folded(x, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))

    def rounded(self, x: Any) -> Any:
        """To the nearest whole number, ties to even."""
        return self.call(f"llvm.rint.v{x.type.count}f32", x.type, x)
