"""Vector kernels for float weights: float32, and 16-bit ones widened on the way.

Inputs stay float32. Sums go in chains of inputs k, k+4, k+8, … so that one multiply-add need not
wait for the one before; weights are widened once for all tokens of a tile. Written in LLVM's own
vectors, for any processor with fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glassllama.native.jit.compile import compiled, inlined, instruction_for_constants
from glassllama.native.jit.intrinsics import floats, types
from glassllama.native.jit.ir_builder import AHEAD, F16, F32, I16, I32, Vectors, number, vector

FLOATS = vector(F32, 16)
CHAINS = 4
F32_ZERO = np.float32(0)


def widen_bfloats(v: Vectors, address: Any, ways: int) -> list[Any]:
    """Bfloat16 are the upper halves of float32: pairs are a mask and a shift away."""
    b, words = v.builder, vector(I32, 16)
    if ways == 1:
        alone = b.zext(v.load(address, vector(I16, 16), 32), words)
        return [b.bitcast(b.shl(alone, v.same(words, 16)), FLOATS)]
    numbers = []
    for pair in range(ways // 2):
        both = v.load(v.at(address, 64 * pair), words, 32)  # after an odd group
        numbers.append(b.bitcast(b.shl(both, v.same(words, 16)), FLOATS))
        numbers.append(b.bitcast(b.and_(both, v.same(words, 0xFFFF0000)), FLOATS))
    return numbers


def widen_halves(v: Vectors, address: Any, ways: int) -> list[Any]:
    places = [v.at(address, 32 * way) for way in range(ways)]
    return [v.builder.fpext(v.load(place, vector(F16, 16), 32), FLOATS) for place in places]


def as_they_are(v: Vectors, address: Any, ways: int) -> list[Any]:
    return [v.load(v.at(address, 64 * way), FLOATS, 64) for way in range(ways)]


# The weights of the next inputs, `ways` of them: one (the last) or an even number.
WIDEN: dict[str, Callable[[Vectors, Any, int], list[Any]]] = {
    "F32": as_they_are, "BF16": widen_bfloats, "F16": widen_halves,
}  # fmt: skip


@instruction_for_constants
def tile(  # type: ignore[no-untyped-def]
    context, kind, size, tokens, chains, values, count, x, x_stride, y, y_stride
):
    """y += sixteen rows times `count` inputs (a multiple of `chains`) of some tokens.

    `kind`, `size` (bytes of a weight), `tokens` and `chains` are constants.
    """
    widen, width = WIDEN[kind.literal_value], 16 * size.literal_value
    many, ways = tokens.literal_value, chains.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, count, x, x_stride, y, y_stride = arguments[4:]
        v = Vectors(builder)
        inputs = [builder.add(x, builder.mul(x_stride, number(t))) for t in range(many)]
        outputs = [builder.add(y, builder.mul(y_stride, number(t))) for t in range(many)]

        def some(index: Any, sums: list[Any]) -> list[Any]:
            results, place = list(sums), v.step(values, index, width * ways)
            v.prefetch(v.at(place, AHEAD), width * ways)
            for way, w in enumerate(widen(v, place, ways)):
                for t, address in enumerate(inputs):
                    one = v.load(v.at(v.step(address, index, 4 * ways), 4 * way), F32, 4)
                    chain = t * ways + way
                    results[chain] = v.fused(w, v.splat(one, 16), results[chain])
            return results

        rounds = builder.udiv(count, number(ways))
        sums = v.count_up(rounds, [v.same(FLOATS, 0.0)] * (many * ways), some)
        for t, address in enumerate(outputs):
            total = v.load(address, FLOATS, 4)
            for way in range(ways):
                total = builder.fadd(total, sums[t * ways + way])
            v.store(total, address, 4)
        return context.get_dummy_value()

    return types.void(kind, size, tokens, chains, *[types.int64] * 6), emit


@compiled
def clear(address: int) -> None:
    line = floats(address, 16)
    for i in range(16):
        line[i] = F32_ZERO


@inlined
def sweep(
    kind: str, size: int, values: int, columns: int, x: int, x_stride: int, tokens: int, y: int,
    y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Groups and tokens of a kernel: tiles of four tokens, then one by one."""
    for group in range(first, last):
        w, out, t = values + group * columns * 16 * size, y + group * 64, 0
        while t + 4 <= tokens:
            some(kind, size, 4, w, columns, x + t * x_stride, x_stride, out + t * y_stride,
                 y_stride)  # fmt: skip
            t += 4
        while t < tokens:
            some(kind, size, 1, w, columns, x + t * x_stride, x_stride, out + t * y_stride,
                 y_stride)  # fmt: skip
            t += 1


@inlined
def some(
    kind: str, size: int, tokens: int, w: int, columns: int, x: int, x_stride: int, y: int,
    y_stride: int,
) -> None:  # fmt: skip
    """All inputs of one group and a tile of tokens: by fours, then two, then one."""
    for n in range(tokens):
        clear(y + n * y_stride)
    fours, twos = columns // CHAINS * CHAINS, columns // 2 * 2
    if fours > 0:
        tile(kind, size, tokens, CHAINS, w, fours, x, x_stride, y, y_stride)
    if fours < twos:
        tile(kind, size, tokens, 2, w + fours * 16 * size, 2, x + fours * 4, x_stride, y, y_stride)
    if twos < columns:
        tile(kind, size, tokens, 1, w + twos * 16 * size, 1, x + twos * 4, x_stride, y, y_stride)


def f32(
    values: int, scales: int, columns: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    sweep("F32", 4, values, columns, x, x_stride, tokens, y, y_stride, first, last)


def f16(
    values: int, scales: int, columns: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    sweep("F16", 2, values, columns, x, x_stride, tokens, y, y_stride, first, last)


def bf16(
    values: int, scales: int, columns: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    sweep("BF16", 2, values, columns, x, x_stride, tokens, y, y_stride, first, last)


FLOAT_KERNELS: dict[str, Callable[..., None]] = {"F32": f32, "F16": f16, "BF16": bf16}
