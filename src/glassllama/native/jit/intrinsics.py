"""LLVM instructions for compiled code: addresses, bit patterns, atomics, calls by address, vectors.

Numba compiles Python; what Python cannot express is written here and in the kernels as functions
that emit LLVM's intermediate representation with llvmlite. `instruction` makes such a function
callable from compiled code. Addresses are plain integers that are passed as arguments: a compiled
function that is cached on disk must not contain one.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any, cast

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_process_triple
from numba.core import cgutils as untyped_cgutils
from numba.core import types as untyped_types
from numba.extending import intrinsic

from glassllama.native.jit.compile import inlined

# Numba's own annotations are incomplete.
cgutils: Any = untyped_cgutils
types: Any = untyped_types
carray: Any = numba.carray  # type: ignore[attr-defined]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
LINE = 64  # bytes of a cache line
NEAR = 1024  # prefetch distance in bytes, if memory is read at several places at once
AHEAD = 8192  # prefetch distance in bytes: two small pages; hardware prefetching stops at one
ARRAY = None  # type of an argument that is an array of any type


def instruction(
    *argument_types: Any, constants: int = 0, returns: Any = types.void
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a function that emits LLVM instructions becomes callable from compiled code.

    The function gets a `Vectors`, then its first arguments as Python values, `constants` of them
    (strings and integers that are compile-time constants in the caller), then LLVM values. Those
    are of `argument_types`; without any given they are 64-bit integers: addresses and counts. For
    an ARRAY it gets Numba's structure with the fields `data` and `shape`. It returns an LLVM value
    of the type `returns`, or nothing.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _, *names = signature(function).parameters
        formal = argument_types or (types.int64,) * (len(names) - constants)

        def typed(context: Any, *actual: Any) -> Any:
            literals = [argument.literal_value for argument in actual[:constants]]
            others = [
                own if kind is ARRAY else kind
                for own, kind in zip(actual[constants:], formal, strict=True)
            ]

            def emit(context: Any, builder: Any, form: Any, values: Any) -> Any:
                given = [
                    context.make_array(own)(context, builder, value) if kind is ARRAY else value
                    for own, kind, value in zip(others, formal, values[constants:], strict=True)
                ]
                if constants:  # part of a kernel
                    align_stack(builder.function)
                result = function(Vectors(builder), *literals, *given)
                return context.get_dummy_value() if returns is types.void else result

            return returns(*actual[:constants], *others), emit

        parameters = [Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in ("context", *names)]
        typed.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        typed.__name__, typed.__doc__ = function.__name__, function.__doc__
        made: Callable[..., Any] = intrinsic(prefer_literal=constants > 0)(typed)
        return made

    return decorate


def align_stack(function: Any) -> None:
    """Let a function begin its stack frame at a cache line.

    A kernel keeps vectors on the stack that do not fit into registers. At an address that is only a
    multiple of 16 every second one of 32 bytes would lie in two cache lines.
    """
    function.attributes.alignstack = LINE
    function.attributes.add("nounwind")  # llvmlite writes no attributes if this set is empty


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

    def word(self, address: Any) -> Any:
        """An address as a pointer to a 64-bit word."""
        return self.builder.inttoptr(address, I64.as_pointer())

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
            location = b.inttoptr(self.at(address, line), byte)
            b.call(function, [location, read, second_level, data])

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

    def from_bfloat16(self, address: Any, lanes: int) -> Any:
        """Bfloat16 numbers in memory as float32."""
        b, wide = self.builder, vector(I32, lanes)
        upper = b.zext(self.load(address, vector(I16, lanes), 2 * lanes), wide)
        return b.bitcast(b.shl(upper, self.same(wide, 16)), vector(F32, lanes))

    def whole(self, small: Any, *, signed: bool) -> Any:
        """Bytes as float32."""
        b, wide = self.builder, vector(I32, small.type.count)
        floats = vector(F32, small.type.count)
        return b.sitofp(b.sext(small, wide) if signed else b.zext(small, wide), floats)

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


@instruction(returns=types.voidptr)
def pointer(v: Vectors, address: Any) -> Any:
    """An address as a pointer for `carray`: (int) -> void*."""
    return v.builder.inttoptr(address, I8.as_pointer())


@instruction(constants=1, returns=types.voidptr)
def stack_words(v: Vectors, lines: int) -> Any:
    """So many cache lines on the caller's stack, of sixteen 32-bit words: (int) -> void*."""
    line = cgutils.alloca_once(v.builder, vector(I32, 16), size=lines)
    return v.builder.bitcast(line, I8.as_pointer())


@instruction(types.int32, returns=types.float32)
def float_from_bits(v: Vectors, bits: Any) -> Any:
    """(int32) -> the float32 with these bits."""
    return v.builder.bitcast(bits, F32)


@instruction(types.float32, returns=types.int32)
def bits_from_float(v: Vectors, value: Any) -> Any:
    """(float32) -> its bits as int32."""
    return v.builder.bitcast(value, I32)


@instruction(returns=types.int64)
def atomic_add(v: Vectors, address: Any, amount: Any) -> Any:
    """Add to a shared 64-bit word -> its value before."""
    return v.builder.atomic_rmw("add", v.word(address), amount, "seq_cst")


@instruction(returns=types.int64)
def atomic_swap(v: Vectors, address: Any, value: Any) -> Any:
    """Write a shared word -> its value before."""
    return v.builder.atomic_rmw("xchg", v.word(address), value, "seq_cst")


@instruction(returns=types.boolean)
def compare_and_swap(v: Vectors, address: Any, expected: Any, value: Any) -> Any:
    """Write a shared word if it still has the expected value -> whether it had."""
    pair = v.builder.cmpxchg(v.word(address), expected, value, "acq_rel", "acquire")
    return v.builder.extract_value(pair, 1)


@instruction(returns=types.int64)
def atomic_load(v: Vectors, address: Any) -> Any:
    """Read a shared word; everything that its writer wrote before is visible afterwards."""
    return v.builder.load_atomic(v.word(address), "acquire", 8)


@instruction()
def atomic_store(v: Vectors, address: Any, value: Any) -> None:
    """Write a shared word, after everything that was written before."""
    v.builder.store_atomic(value, v.word(address), "release", 8)


@instruction()
def relax(v: Vectors) -> None:
    """Tell the processor that this is a spin loop: it saves power."""
    triple = get_process_triple()
    if triple.startswith("x86_64"):
        v.call("llvm.x86.sse2.pause", ir.VoidType())
    elif triple.startswith(("aarch64", "arm64")):
        v.call("llvm.aarch64.hint", ir.VoidType(), ir.Constant(I32, 1))  # YIELD


@instruction()
def call_system(v: Vectors, address: Any) -> None:
    """Call a C function without arguments, such as sched_yield, by its address."""
    kind = ir.FunctionType(I32, [])
    v.builder.call(v.builder.inttoptr(address, kind.as_pointer()), [])


@cast(Callable[[Callable[..., Any]], Callable[..., Any]], intrinsic)
def call_kernel(context: Any, address: Any, arguments: Any) -> Any:
    """Call a kernel (native/engine/gemm_plain.py) or a C function by its address.

    `arguments` is a tuple of integers.
    """
    count = len(arguments)

    def emit(context: Any, builder: Any, form: Any, values: Any) -> Any:
        words = cgutils.unpack_tuple(builder, values[1], count)
        kind = ir.FunctionType(ir.VoidType(), [I64] * count)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), words)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, count)), emit


@inlined
def float_from_half(half: int) -> Any:
    """The float32 of an IEEE half's 16 bits; also infinities and NaN."""
    bits = np.int32(half)
    shifted = np.int32((bits & np.int32(0x7FFF)) << np.int32(13))
    magnitude = float_from_bits(shifted) * np.float32(2.0**112)  # biases differ by 127 - 15
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
