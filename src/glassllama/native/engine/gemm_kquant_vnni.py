"""K-quants whose superblocks are summed as integers: a few tokens at a time, on AVX-512 VNNI.

A superblock is 256 inputs. Its d and dmin are halves; within it scales and minima, of 32 or 16
inputs, are small whole numbers. So a weight is d · w, w = scale · code, less dmin · minimum. Where
256 inputs have one scale s, all products of a superblock are whole numbers and add up as such:

    y += s · (d · Σ w·x − dmin · Σ minimum·x)

Eight bits would be too coarse for inputs with one scale for so many; these have eleven, in two
parts: x = 8 · hi + lo. Processors multiply bytes, so every weight is multiplied twice. That is
worthwhile where prompts go through matrix registers (gemm_kquant_amx.py); elsewhere K-quants are
multiplied as all other weight types are (gemm_int8.py).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from glassllama.native.engine.gemm_int8 import (
    MIN_BLOCKS,
    ROWS,
    blocks_ahead,
    dot,
    quads_of,
    row_groups_at_once,
)
from glassllama.native.engine.layout import (
    LOW_STEPS,
    Q11_BYTES,
    Q11_HI,
    Q11_LO,
    Q11_SCALE,
    Q11_TOTALS,
    WeightType,
)
from glassllama.native.jit.compile import inlined
from glassllama.native.jit.intrinsics import (
    F32,
    I8,
    I16,
    I32,
    LINE,
    Vectors,
    instruction,
    number,
    vector,
)

BLOCKS = 8  # of a superblock
LOW_BITS = LOW_STEPS.bit_length() - 1
WORDS, INTS, FLOATS = vector(I16, 2 * ROWS), vector(I32, ROWS), vector(F32, ROWS)
MAX_VECTOR_TOKENS = 4  # tokens; more go through tiles
GROUPS_AT_ONCE = row_groups_at_once("vnni", WeightType.Q4_K)  # for a single token


def small(v: Vectors, address: Any, *, signed: bool) -> Any:
    """Sixteen bytes as int32."""
    some = v.load(address, vector(I8, ROWS), ROWS)
    return v.builder.sext(some, INTS) if signed else v.builder.zext(some, INTS)


def twice(v: Vectors, lanes: Any) -> Any:
    """Sixteen small numbers, each in both halves of its lane: as 32 words."""
    b = v.builder
    low = b.and_(lanes, v.same(INTS, 0xFFFF))
    return b.bitcast(b.or_(low, b.shl(lanes, v.same(INTS, 16))), WORDS)


def pairs_added(v: Vectors, left: Any, right: Any) -> Any:
    """Products of words, those of each lane added up."""
    return v.call("llvm.x86.avx512.pmaddw.d.512", INTS, left, right)


def add_scaled(v: Vectors, scales: list[Any], sums: list[Any], s: Any, y: Any) -> Any:
    """y + s · (d · Σ w·x − dmin · Σ minimum·x), of float32 sums; the second where there are two."""
    total = v.builder.fmul(scales[0], sums[0])
    if len(sums) > 1:
        total = v.multiply_add(scales[1], sums[1], total)
    return v.multiply_add(s, total, y)


def scales_of_superblock(v: Vectors, weight_type: WeightType, scales: Any) -> list[Any]:
    """d, and −dmin where there are minima."""
    d = v.halves(scales, ROWS)
    if not weight_type.has_minima:
        return [d]
    return [d, v.builder.fneg(v.halves(v.at(scales, 2 * ROWS), ROWS))]


def scale_of_token(v: Vectors, x: Any) -> Any:
    return v.splat(v.load(v.at(x, Q11_SCALE), F32, 4), ROWS)


def dots(v: Vectors, quads: list[tuple[int, Any]], x: Any, starts: list[Any]) -> list[Any]:
    """A block's codes times its inputs at `x`: of the whole block, or of either half."""
    b = v.builder
    low, high = list(starts), [v.same(INTS, 0)] * len(starts)
    for q, codes in quads:
        n = q * len(starts) // 8
        for sums, part in ((high, Q11_HI), (low, Q11_LO)):
            four = v.splat(v.load(v.at(x, part + 4 * q), I32, 4), ROWS)
            sums[n] = dot(v, "vnni", sums[n], codes, four)
    bits = v.same(INTS, LOW_BITS)
    return [b.add(b.shl(c, bits), f) for c, f in zip(high, low, strict=True)]


def totals_at(v: Vectors, x: Any, j: Any) -> Any:
    """Σ of the inputs of block j's halves, in the halves of every lane."""
    both = v.splat(v.load(v.step(v.at(x, Q11_TOTALS), j, 4), I32, 4), ROWS)
    return v.builder.bitcast(both, WORDS)


def block_with_minima(
    v: Vectors, weight_type: WeightType, values: Any, scales: Any, j: Any, inputs: list[Any]
) -> list[Any]:
    """Block j of a superblock and sixteen rows -> Σ w·x and Σ minimum·x of every token."""
    b, own = v.builder, v.step(v.at(scales, 4 * ROWS), j, 2 * ROWS)
    quads = quads_of(v, "vnni", weight_type, values)
    scale, minimum = (small(v, v.at(own, ROWS * n), signed=False) for n in (0, 1))
    sums = []
    for x in inputs:
        (total,) = dots(v, quads, v.step(x, j, 32), [v.same(INTS, 0)])
        sums += [b.mul(total, scale), pairs_added(v, totals_at(v, x, j), twice(v, minimum))]
    return sums


def block_of_halves(
    v: Vectors, weight_type: WeightType, values: Any, scales: Any, j: Any, inputs: list[Any]
) -> list[Any]:
    """Σ w·x of every token. Codes are stored too large: sums begin with a correction."""
    b, own = v.builder, v.step(v.at(scales, 2 * ROWS), j, 2 * ROWS)
    quads, less = quads_of(v, "vnni", weight_type, values), -weight_type.zero_point
    scale = [small(v, v.at(own, ROWS * n), signed=True) for n in (0, 1)]
    offsets = [ir.Constant(WORDS, half * ROWS) for half in ([less, 0], [0, less])]
    sums = []
    for x in inputs:
        starts = [pairs_added(v, totals_at(v, x, j), half) for half in offsets]
        low, high = dots(v, quads, v.step(x, j, 32), starts)
        sums.append(b.add(b.mul(low, scale[0]), b.mul(high, scale[1])))
    return sums


@instruction(constants=3)
def multiply(
    v: Vectors, kind: str, groups: int, tokens: int, values: Any, scales: Any, blocks: Any, x: Any,
    x_next: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    """Some groups side by side times some tokens.

    Addresses are those of the first group and token, as in gemm_kquant_amx.kernel.
    """
    b, weight_type = v.builder, WeightType[kind]
    value_bytes, scale_bytes = weight_type.value_bytes, weight_type.scale_bytes
    sums_per_token = 2 if weight_type.has_minima else 1
    block_of = block_with_minima if weight_type.has_minima else block_of_halves
    cells = [b.mul(blocks, number(g)) for g in range(groups)]
    own_values = [v.step(values, cell, value_bytes) for cell in cells]
    own_scales = [v.step(scales, cell, scale_bytes) for cell in cells]

    def superblock(n: Any, ys: list[Any]) -> list[Any]:
        start, first = b.add(x, b.mul(n, x_next)), b.mul(n, number(BLOCKS))
        inputs = [v.at(start, t * Q11_BYTES) for t in range(tokens)]
        locations = [v.step(own, first, scale_bytes) for own in own_scales]

        def block(j: Any, sums: list[Any]) -> list[Any]:
            at, found = b.add(first, j), list[Any]()
            later = b.add(at, blocks_ahead(v, weight_type, groups, at, blocks))
            for g in range(groups):
                v.prefetch(v.step(own_values[g], later, value_bytes), value_bytes)
                v.prefetch(v.step(own_scales[g], later, scale_bytes), scale_bytes)
                some = v.step(own_values[g], at, value_bytes)
                found += block_of(v, weight_type, some, locations[g], j, inputs)
            return [b.add(*pair) for pair in zip(sums, found, strict=True)]

        zeros = [v.same(INTS, 0)] * (sums_per_token * len(ys))
        sums = v.count_up(number(BLOCKS), zeros, block)
        results = []
        for n, y in enumerate(ys):
            d = scales_of_superblock(v, weight_type, locations[n // tokens])
            own = sums[n * sums_per_token : (n + 1) * sums_per_token]
            real = [b.sitofp(total, FLOATS) for total in own]
            results.append(add_scaled(v, d, real, scale_of_token(v, inputs[n % tokens]), y))
        return results

    supers = b.udiv(blocks, number(BLOCKS))
    ys = v.count_up(supers, [v.same(FLOATS, 0.0)] * (groups * tokens), superblock)
    for n, total in enumerate(ys):
        row = b.add(y, b.mul(y_stride, number(n % tokens)))
        v.store(total, v.at(row, LINE * (n // tokens)), 4)


@inlined
def run_few_tokens(
    kind: str, value_bytes: int, scale_bytes: int, values: int, scales: int, blocks: int,
    x: int, x_next: int, tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """All groups times up to MAX_VECTOR_TOKENS tokens; a single one meets several groups at once,
    if they are long."""
    while tokens == 1 and blocks >= MIN_BLOCKS and first + GROUPS_AT_ONCE <= last:
        w, d = values + first * blocks * value_bytes, scales + first * blocks * scale_bytes
        multiply(kind, GROUPS_AT_ONCE, 1, w, d, blocks, x, x_next, y + first * LINE, y_stride)
        first += GROUPS_AT_ONCE
    for group in range(first, last):
        w, d = values + group * blocks * value_bytes, scales + group * blocks * scale_bytes
        t = 0
        if tokens == MAX_VECTOR_TOKENS:
            multiply(
                kind, 1, MAX_VECTOR_TOKENS, w, d, blocks, x, x_next, y + group * LINE, y_stride
            )
            t = MAX_VECTOR_TOKENS
        if tokens - t >= 2:
            multiply(kind, 1, 2, w, d, blocks, x, x_next, y + group * LINE, y_stride)
            t = 2
        if t < tokens:
            multiply(kind, 1, 1, w, d, blocks, x + t * Q11_BYTES, x_next,
                     y + group * LINE + t * y_stride, y_stride)  # fmt: skip
