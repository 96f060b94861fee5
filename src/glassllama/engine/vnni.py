"""Integer kernels for processors with AVX-512 VNNI: one instruction does 64 products and 48 sums.

`vpdpbusd` takes 64 unsigned bytes (weights: four inputs of each of sixteen rows) and 64 signed ones
(the four inputs, repeated for every row), and adds the products of each four to a 32-bit lane: the
plain loop over rows in kernels.py, whole. Weights are unpacked once for all tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glassllama.engine.compiled import inlined, instruction_for_constants
from glassllama.engine.intrinsics import types
from glassllama.engine.vectors import F32, I8, I32, Vectors, number, vector

BYTES, SUMS, FLOATS = vector(I8, 64), vector(I32, 16), vector(F32, 16)


def dot(v: Vectors, sums: Any, weights: Any, inputs: Any) -> Any:
    """sums += the products of unsigned and signed bytes, four to a lane.

    LLVM 22 changed the operands' type to bytes; the old spelling is accepted before and after.
    """
    b = v.builder
    return v.call(
        "llvm.x86.avx512.vpdpbusd.512", SUMS, sums, b.bitcast(weights, SUMS),
        b.bitcast(inputs, SUMS),
    )  # fmt: skip


def quads_of_bytes(v: Vectors, values: Any) -> list[tuple[int, Any]]:
    """(which four inputs, their weights) of a block of Q8_0."""
    return [(q, v.load(v.at(values, 64 * q), BYTES, 64)) for q in range(8)]


def quads_of_nibbles(v: Vectors, values: Any) -> list[tuple[int, Any]]:
    """The same of Q4_0 and Q4_1: low nibbles are inputs 0 … 15, high ones 16 … 31."""
    quads = []
    for q in range(4):
        packed = v.load(v.at(values, 64 * q), BYTES, 64)
        quads += [(q, v.low_nibbles(packed)), (4 + q, v.high_nibbles(packed))]
    return quads


Scale = Callable[[Vectors, Any], Callable[[Any, Any, Any, Any], Any]]


def centred(offset: float) -> Scale:
    """Weights d · (code − offset): the offset meets the sum of the inputs."""

    def prepare(v: Vectors, scales: Any) -> Callable[[Any, Any, Any, Any], Any]:
        d, minus = v.halves(scales, 16), v.same(FLOATS, -offset)

        def apply(sums: Any, scale: Any, total: Any, y: Any) -> Any:
            shifted = v.builder.fmul(minus, total)
            return v.multiply_add(d, v.multiply_add(sums, scale, shifted), y)

        return apply

    return prepare


def with_minimum(v: Vectors, scales: Any) -> Callable[[Any, Any, Any, Any], Any]:
    """Weights d · code + m."""
    d, m = v.halves(scales, 16), v.halves(v.at(scales, 32), 16)

    def apply(sums: Any, scale: Any, total: Any, y: Any) -> Any:
        return v.multiply_add(m, total, v.multiply_add(sums, v.builder.fmul(d, scale), y))

    return apply


# kind: bytes of values and scales per block, how to unpack, how to scale
FORMATS: dict[str, tuple[int, int, Callable[[Vectors, Any], list[tuple[int, Any]]], Scale]] = {
    "Q8_0": (512, 32, quads_of_bytes, centred(128)),
    "Q4_0": (256, 32, quads_of_nibbles, centred(8)),
    "Q4_1": (256, 64, quads_of_nibbles, with_minimum),
}


def block_step(v: Vectors, kind: str, addresses: Any, block: Any, ys: list[Any]) -> list[Any]:
    """One block of sixteen rows times that block of every token, added to the tokens' sums."""
    values, scales, inputs, factors = addresses
    value_bytes, scale_bytes, unpack, scale = FORMATS[kind]
    chains = 2 if len(ys) == 1 else 1  # one token alone would wait for each sum before the next
    sums = [[v.same(SUMS, 0)] * chains for _ in ys]
    for q, weights in unpack(v, v.step(values, block, value_bytes)):
        for t, address in enumerate(inputs):
            four = v.load(v.at(v.step(address, block, 32), 4 * q), I32, 4)
            chain = q * chains // 8
            sums[t][chain] = dot(v, sums[t][chain], weights, v.splat(four, 16))
    apply = scale(v, v.step(scales, block, scale_bytes))
    results = []
    for t, address in enumerate(factors):
        total = sums[t][0] if chains == 1 else v.builder.add(*sums[t])
        pair = v.step(address, block, 8)
        s = v.splat(v.load(pair, F32, 4), 16)
        s_sum = v.splat(v.load(v.at(pair, 4), F32, 4), 16)
        results.append(apply(v.builder.sitofp(total, FLOATS), s, s_sum, ys[t]))
    return results


@instruction_for_constants
def tile(  # type: ignore[no-untyped-def]
    context, kind, tokens, values, scales, blocks, x, x_stride, f, f_stride, y, y_stride
):
    """One group of sixteen rows times some tokens; `kind` and `tokens` are constants.

    Everything else is of the group and of the first token, as in kernels.py.
    """
    name, count = kind.literal_value, tokens.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, scales, blocks, x, x_stride, f, f_stride, y, y_stride = arguments[2:]
        v = Vectors(builder)

        def rows(address: Any, stride: Any) -> list[Any]:
            return [builder.add(address, builder.mul(stride, number(t))) for t in range(count)]

        addresses = (values, scales, rows(x, x_stride), rows(f, f_stride))
        start = [v.same(FLOATS, 0.0)] * count
        sums = v.count_up(blocks, start, lambda k, ys: block_step(v, name, addresses, k, ys))
        for total, address in zip(sums, rows(y, y_stride), strict=True):
            v.store(total, address, 4)
        return context.get_dummy_value()

    return types.void(kind, tokens, *[types.int64] * 9), emit


@inlined
def sweep(
    kind: str, value_bytes: int, scale_bytes: int, values: int, scales: int, blocks: int,
    x: int, x_stride: int, f: int, f_stride: int, tokens: int, y: int, y_stride: int,
    first: int, last: int,
) -> None:  # fmt: skip
    """Groups and tokens of a kernel: tiles of twelve tokens, then of four, then one by one."""
    for group in range(first, last):
        w, d = values + group * blocks * value_bytes, scales + group * blocks * scale_bytes
        out, t = y + group * 64, 0
        while t + 12 <= tokens:
            tile(kind, 12, w, d, blocks, x + t * x_stride, x_stride, f + t * f_stride, f_stride,
                 out + t * y_stride, y_stride)  # fmt: skip
            t += 12
        while t + 4 <= tokens:
            tile(kind, 4, w, d, blocks, x + t * x_stride, x_stride, f + t * f_stride, f_stride,
                 out + t * y_stride, y_stride)  # fmt: skip
            t += 4
        while t < tokens:
            tile(kind, 1, w, d, blocks, x + t * x_stride, x_stride, f + t * f_stride, f_stride,
                 out + t * y_stride, y_stride)  # fmt: skip
            t += 1


# One function for each format, at the top of a module: what Numba can keep on disk.


def q8_0(
    values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    sweep("Q8_0", 512, 32, values, scales, blocks, x, x_stride, f, f_stride, tokens, y, y_stride,
          first, last)  # fmt: skip


def q4_0(
    values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    sweep("Q4_0", 256, 32, values, scales, blocks, x, x_stride, f, f_stride, tokens, y, y_stride,
          first, last)  # fmt: skip


def q4_1(
    values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    sweep("Q4_1", 256, 64, values, scales, blocks, x, x_stride, f, f_stride, tokens, y, y_stride,
          first, last)  # fmt: skip


VNNI: dict[str, Callable[..., None]] = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1}
