"""Vector kernels for float weights: float32, and 16-bit ones widened on the way.

Inputs stay float32. Sums go in chains of inputs k, k+4, k+8, … so that one multiply-add need not
wait for the one before; weights are widened once for all tokens of a tile. Written in LLVM's own
vectors, for any processor with fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glassllama.engine.compiled import compiled, inlined, instruction_for_constants
from glassllama.engine.intrinsics import floats, types
from glassllama.engine.vectors import AHEAD, F16, F32, I16, I32, Vectors, number, vector

FLOATS = vector(F32, 16)
CHAINS = 4
F32_ZERO = np.float32(0)


def widen_bfloat(v: Vectors, address: Any) -> Any:
    """Sixteen bfloat16 in memory as float32: they are its upper halves."""
    words = v.builder.zext(v.load(address, vector(I16, 16), 32), vector(I32, 16))
    return v.builder.bitcast(v.builder.shl(words, v.same(words.type, 16)), FLOATS)


def widen_half(v: Vectors, address: Any) -> Any:
    return v.builder.fpext(v.load(address, vector(F16, 16), 32), FLOATS)


def as_they_are(v: Vectors, address: Any) -> Any:
    return v.load(address, FLOATS, 64)


WIDEN: dict[str, Callable[[Vectors, Any], Any]] = {
    "F32": as_they_are, "BF16": widen_bfloat, "F16": widen_half,
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
            results = list(sums)
            v.prefetch(v.at(v.step(values, index, width * ways), AHEAD), width * ways)
            for way in range(ways):
                w = widen(v, v.at(v.step(values, index, width * ways), width * way))
                for t, address in enumerate(inputs):
                    one = v.load(v.at(v.step(address, index, 4 * ways), 4 * way), F32, 4)
                    place = t * ways + way
                    results[place] = v.fused(w, v.splat(one, 16), results[place])
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
    even = columns // CHAINS * CHAINS
    for group in range(first, last):
        w, out, t = values + group * columns * 16 * size, y + group * 64, 0
        rest = w + even * 16 * size
        while t < tokens:
            inputs, outputs = x + t * x_stride, out + t * y_stride
            more = 4 if t + 4 <= tokens else 1
            for n in range(more):
                clear(outputs + n * y_stride)
            if more == 4:
                if even > 0:
                    tile(kind, size, 4, CHAINS, w, even, inputs, x_stride, outputs, y_stride)
                if even < columns:
                    tile(kind, size, 4, 1, rest, columns - even, inputs + even * 4, x_stride,
                         outputs, y_stride)  # fmt: skip
            else:
                if even > 0:
                    tile(kind, size, 1, CHAINS, w, even, inputs, x_stride, outputs, y_stride)
                if even < columns:
                    tile(kind, size, 1, 1, rest, columns - even, inputs + even * 4, x_stride,
                         outputs, y_stride)  # fmt: skip
            t += more


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
