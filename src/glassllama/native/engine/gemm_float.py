"""Vector kernels for float weights: float32, and 16-bit ones widened on the way.

Inputs stay float32. Sums go in chains of inputs k, k+4, k+8, … so that one multiply-add need not
wait for the one before; weights are widened once for all tokens of a tile. Written in LLVM's own
vectors, for any processor with fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glassllama.native.engine.layout import WeightType
from glassllama.native.jit.compile import compiled, inlined
from glassllama.native.jit.intrinsics import (
    AHEAD,
    F16,
    F32,
    I16,
    I32,
    Vectors,
    floats,
    instruction,
    number,
    vector,
)

FLOATS = vector(F32, 16)
CHAINS = 4
F32_ZERO = np.float32(0)


def widen_bf16(v: Vectors, address: Any, ways: int) -> list[Any]:
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
    locations = [v.at(address, 32 * way) for way in range(ways)]
    return [
        v.builder.fpext(v.load(location, vector(F16, 16), 32), FLOATS) for location in locations
    ]


def as_they_are(v: Vectors, address: Any, ways: int) -> list[Any]:
    return [v.load(v.at(address, 64 * way), FLOATS, 64) for way in range(ways)]


# The weights of the next inputs, `ways` of them: one (the last) or an even number.
WIDEN: dict[str, Callable[[Vectors, Any, int], list[Any]]] = {
    "F32": as_they_are, "BF16": widen_bf16, "F16": widen_halves,
}  # fmt: skip


@instruction(constants=3)
def tile(
    v: Vectors, kind: str, tokens: int, ways: int, values: Any, count: Any, x: Any, x_stride: Any,
    y: Any, y_stride: Any,
) -> None:  # fmt: skip
    """y += sixteen rows times `count` inputs, a multiple of `ways`, of some tokens."""
    builder, width = v.builder, WeightType[kind].value_bytes
    inputs = [builder.add(x, builder.mul(x_stride, number(t))) for t in range(tokens)]
    outputs = [builder.add(y, builder.mul(y_stride, number(t))) for t in range(tokens)]

    def some(index: Any, sums: list[Any]) -> list[Any]:
        results, location = list(sums), v.step(values, index, width * ways)
        v.prefetch(v.at(location, AHEAD), width * ways)
        for way, w in enumerate(WIDEN[kind](v, location, ways)):
            for t, address in enumerate(inputs):
                one = v.load(v.at(v.step(address, index, 4 * ways), 4 * way), F32, 4)
                chain = t * ways + way
                results[chain] = v.fused(w, v.splat(one, 16), results[chain])
        return results

    rounds = builder.udiv(count, number(ways))
    sums = v.count_up(rounds, [v.same(FLOATS, 0.0)] * (tokens * ways), some)
    for t, address in enumerate(outputs):
        total = v.load(address, FLOATS, 4)
        for way in range(ways):
            total = builder.fadd(total, sums[t * ways + way])
        v.store(total, address, 4)


@compiled
def clear(address: int) -> None:
    line = floats(address, 16)
    for i in range(16):
        line[i] = F32_ZERO


@inlined
def run_group(
    kind: str, size: int, tokens: int, w: int, columns: int, x: int, x_stride: int, y: int,
    y_stride: int,
) -> None:  # fmt: skip
    """All inputs of one group and a tile of tokens: by fours, then two, then one."""
    for n in range(tokens):
        clear(y + n * y_stride)
    fours, twos = columns // CHAINS * CHAINS, columns // 2 * 2
    if fours > 0:
        tile(kind, tokens, CHAINS, w, fours, x, x_stride, y, y_stride)
    if fours < twos:
        tile(kind, tokens, 2, w + fours * size, 2, x + fours * 4, x_stride, y, y_stride)
    if twos < columns:
        tile(kind, tokens, 1, w + twos * size, 1, x + twos * 4, x_stride, y, y_stride)


@inlined
def run_groups(
    kind: str, size: int, values: int, columns: int, x: int, x_stride: int, tokens: int, y: int,
    y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """Groups and tokens of a kernel: tiles of four tokens, then one by one."""
    for group in range(first, last):
        w, out, t = values + group * columns * size, y + group * 64, 0
        while t + 4 <= tokens:
            run_group(kind, size, 4, w, columns, x + t * x_stride, x_stride, out + t * y_stride,
                      y_stride)  # fmt: skip
            t += 4
        while t < tokens:
            run_group(kind, size, 1, w, columns, x + t * x_stride, x_stride, out + t * y_stride,
                      y_stride)  # fmt: skip
            t += 1


def kernel(weight_type: WeightType) -> Callable[..., None]:
    """The kernel of one weight type, for `callback_address`: see gemm_plain.py."""
    kind, size = weight_type.name, weight_type.value_bytes

    def run(
        values: int, scales: int, columns: int, x: int, x_stride: int, f: int, f_stride: int,
        tokens: int, y: int, y_stride: int, first: int, last: int,
    ) -> None:  # fmt: skip
        run_groups(kind, size, values, columns, x, x_stride, tokens, y, y_stride, first, last)

    return run
