"""Vector kernels for integer weights: sixteen rows at a time, with dot-product instructions.

Processors differ in what one instruction multiplies (`dot`) and in how many of the sixteen rows a
vector holds: all (AVX-512), eight (AVX2) or four (NEON). The layout (layout.py) fits all of them: a
vector holds four inputs of each of its rows, and the next vector holds the next rows.

    vnni     vpdpbusd, 64 bytes: unsigned weights times signed inputs, four products to a lane
    avxvnni  the same with 32 bytes
    avx2     vpmaddubsw adds two products to 16 bits, and saturates there: see `dot_avx2`
    neon     sdot, 16 bytes: signed times signed

The weights are unpacked once for all tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from glassllama.native.engine.layout import (
    CORRECTION_BYTES,
    FACTORS,
    SCALE,
    SCALE_BYTES,
    TOTAL,
    WeightType,
)
from glassllama.native.jit.compile import inlined
from glassllama.native.jit.intrinsics import (
    AHEAD,
    F32,
    I8,
    I16,
    I32,
    NEAR,
    Vectors,
    instruction,
    number,
    vector,
)

ROWS = 16
LANES = {"amx": 16, "vnni": 16, "avxvnni": 8, "avx2": 8, "neon": 4}  # rows of a vector
TILE = {"vnni": 8, "avxvnni": 4, "avx2": 4, "neon": 4}  # tokens at once, limited by registers
SIGNED = ("neon", "avx2", "amx")  # need Q8_0's bytes without the 128 that layout.py adds


def dot(v: Vectors, target: str, sums: Any, weights: Any, inputs: Any) -> Any:
    """sums += the products of bytes of weights and inputs, four for each lane."""
    b, kind = v.builder, sums.type
    if target == "avx2":
        return b.add(sums, dot_avx2(v, weights, inputs))
    if target == "neon":
        return v.call("llvm.aarch64.neon.sdot.v4i32.v16i8", kind, sums, weights, inputs)
    # LLVM 22 changed the operands' type to bytes; the old spelling is accepted before and after.
    name = f"llvm.x86.avx512.vpdpbusd.{32 * kind.count}"
    return v.call(name, kind, sums, b.bitcast(weights, kind), b.bitcast(inputs, kind))


def dot_avx2(v: Vectors, weights: Any, inputs: Any) -> Any:
    """The same without a dot-product instruction: sums of two in 16 bits, then of four in 32.

    The first instruction takes unsigned weights and saturates at 32,767. So it gets the magnitudes
    of the weights, at most 128, and the inputs with the signs of the weights: 2 · 128 · 127 =
    32,512.
    """
    b, pairs, quads = v.builder, vector(I16, 16), vector(I32, 8)
    zero = v.same(weights.type, 0)
    negative = b.icmp_signed("<", weights, zero)
    size = b.select(negative, b.sub(zero, weights), weights)
    signed = v.call("llvm.x86.avx2.psign.b", inputs.type, inputs, weights)
    halves = v.call("llvm.x86.avx2.pmadd.ub.sw", pairs, size, signed)
    return v.call("llvm.x86.avx2.pmadd.wd", quads, halves, v.same(pairs, 1))


def quads_of_bytes(v: Vectors, target: str, values: Any) -> list[tuple[int, Any]]:
    """A block of Q8_0 -> [(number of four inputs, their weights)]."""
    size = 4 * LANES[target]
    quads = [(q, v.load(v.at(values, 64 * q), vector(I8, size), size)) for q in range(8)]
    if target in SIGNED:
        return [(q, v.builder.xor(w, ir.Constant(w.type, [0x80] * size))) for q, w in quads]
    return quads


def quads_of_nibbles(v: Vectors, target: str, values: Any) -> list[tuple[int, Any]]:
    """The same for Q4_0 and Q4_1: low nibbles are inputs 0 … 15, high ones 16 … 31."""
    quads, size = [], 4 * LANES[target]
    for q in range(4):
        packed = v.load(v.at(values, 64 * q), vector(I8, size), size)
        quads += [(q, v.low_nibbles(packed)), (4 + q, v.high_nibbles(packed))]
    return quads


def quads_of_six_bits(v: Vectors, target: str, values: Any) -> list[tuple[int, Any]]:
    """The same for Q6_K: nibbles, and two upper bits from two more vectors."""
    b, size = v.builder, 4 * LANES[target]
    tops = [v.load(v.at(values, 256 + 64 * n), vector(I8, size), size) for n in range(2)]
    words, quads = vector(I16, size // 2), []
    for q, low in quads_of_nibbles(v, target, values):
        top, shift = b.bitcast(tops[q % 2], words), 4 - 2 * (q // 2)  # to bits 4 and 5
        moved = b.shl if shift > 0 else b.lshr
        top = b.bitcast(moved(top, v.same(words, abs(shift))), low.type)
        code = b.or_(low, b.and_(top, v.same(low.type, 0x30)))
        quads.append((q, b.sub(code, v.same(code.type, 32)) if target in SIGNED else code))
    return quads


def scales_of_bytes(v: Vectors, target: str, scales: Any, block: Any, row: int) -> list[Any]:
    """d of Q8_0 and Q4_0."""
    return [v.halves(v.at(v.step(scales, block, 32), 2 * row), LANES[target])]


def scale_and_minimum(v: Vectors, target: str, scales: Any, block: Any, row: int) -> list[Any]:
    """d and m of Q4_1."""
    location = v.at(v.step(scales, block, 64), 2 * row)
    return [v.halves(v.at(location, n), LANES[target]) for n in (0, 2 * ROWS)]


def in_superblock(v: Vectors, scales: Any, block: Any, size: int, own: int) -> tuple[Any, Any]:
    """Addresses of a superblock of eight blocks, and within it of this block's `own` bytes."""
    b = v.builder
    start = v.step(scales, b.lshr(block, number(3)), size)
    return start, v.step(v.at(start, size - 8 * own), b.and_(block, number(7)), own)


def scales_of_q4_k(v: Vectors, target: str, scales: Any, block: Any, row: int) -> list[Any]:
    """d · scale, and −dmin · minimum."""
    lanes, b = LANES[target], v.builder
    start, own = in_superblock(v, scales, block, 320, 32)
    d, dmin = (v.halves(v.at(start, 2 * row + n), lanes) for n in (0, 2 * ROWS))
    scale, minimum = (v.whole(v.at(own, row + n), lanes, signed=False) for n in (0, ROWS))
    return [b.fmul(d, scale), b.fneg(b.fmul(dmin, minimum))]


def scales_of_q6_k(v: Vectors, target: str, scales: Any, block: Any, row: int) -> list[Any]:
    """d · scale, for each half of a block."""
    lanes, b = LANES[target], v.builder
    start, own = in_superblock(v, scales, block, 288, 32)
    d = v.halves(v.at(start, 2 * row), lanes)
    return [b.fmul(d, v.whole(v.at(own, row + n), lanes, signed=True)) for n in (0, ROWS)]


Factor = Callable[[int], Any]
Unpack = Callable[[Vectors, str, Any], list[tuple[int, Any]]]
Scales = Callable[[Vectors, str, Any, Any, int], list[Any]]
# How to unpack values and scales of a block.
UNPACK: dict[WeightType, tuple[Unpack, Scales]] = {
    WeightType.Q8_0: (quads_of_bytes, scales_of_bytes),
    WeightType.Q4_0: (quads_of_nibbles, scales_of_bytes),
    WeightType.Q4_1: (quads_of_nibbles, scale_and_minimum),
    WeightType.Q4_K: (quads_of_nibbles, scales_of_q4_k),
    WeightType.Q6_K: (quads_of_six_bits, scales_of_q6_k),
}
MIN_BLOCKS = 64  # of a row, for several groups at once; for shorter rows no gain (docs/log.md)


def row_groups_at_once(target: str, weight_type: WeightType) -> int:
    """Groups computed together for a single token.

    Memory is read faster at several places, and the products of different groups do not wait for
    each other.
    """
    return 4 if target == "vnni" and weight_type is not WeightType.Q8_0 else 1


def add_scaled(
    v: Vectors, weight_type: WeightType, scales: list[Any], sums: list[Any], factor: Factor, y: Any
) -> Any:
    """y + Σ weights · inputs of a block, from its one or two integer sums."""
    for d, total in zip(scales, sums, strict=False):
        scale = v.builder.fmul(d, factor(SCALE))
        y = v.multiply_add(v.builder.sitofp(total, y.type), scale, y)
    return v.multiply_add(scales[1], factor(TOTAL), y) if weight_type.has_minima else y


def factors_at(v: Vectors, address: Any, lanes: int) -> Factor:
    """The scales of a token's block, by number, in every lane."""
    return lambda n: v.splat(v.load(v.at(address, 4 * n), F32, 4), lanes)


def first_sums(v: Vectors, target: str, weight_type: WeightType, corrections: Any) -> list[Any]:
    """Initial sums of a token and block: zero, or the zero-point corrections."""
    whole = vector(I32, LANES[target])
    too_large = weight_type is WeightType.Q4_0 or target not in SIGNED
    if weight_type.corrections and too_large:
        return [
            v.splat(v.load(v.at(corrections, 4 * n), I32, 4), LANES[target])
            for n in weight_type.corrections
        ]
    return [v.same(whole, 0)] * weight_type.sums


def block_sums(
    v: Vectors, target: str, weight_type: WeightType, values: Any, inputs: list[Any],
    corrections: list[Any],
) -> list[Any]:  # fmt: skip
    """One block of the rows of a vector times that block of every token -> int32 sums."""
    sums = [first_sums(v, target, weight_type, address) for address in corrections]
    if len(inputs) == 1 and weight_type.sums == 1:
        # A single token would wait for each sum before the next: two chains of sums instead.
        sums[0].append(v.same(sums[0][0].type, 0))
    for q, weights in UNPACK[weight_type][0](v, target, values):
        for t, address in enumerate(inputs):
            four = v.splat(v.load(v.at(address, 4 * q), I32, 4), LANES[target])
            chain = q * len(sums[t]) // 8
            some = v.builder.bitcast(four, weights.type)
            sums[t][chain] = dot(v, target, sums[t][chain], weights, some)
    return sums if weight_type.sums > 1 else [[sum_of(v, s)] for s in sums]


def sum_of(v: Vectors, sums: list[Any]) -> Any:
    return sums[0] if len(sums) == 1 else v.builder.add(*sums)


def blocks_ahead(v: Vectors, weight_type: WeightType, groups: int, block: Any, blocks: Any) -> Any:
    """How many blocks further on to prefetch.

    For several groups at once the distance is short, and the last blocks of one set of groups are
    followed by the next set.
    """
    if groups == 1:
        return number(AHEAD // weight_type.value_bytes)
    b, few = v.builder, number(NEAR // weight_type.value_bytes)
    inside = b.icmp_signed("<", b.add(block, few), blocks)
    return b.add(few, b.select(inside, number(0), b.mul(blocks, number(groups - 1))))


def block_step(
    v: Vectors, target: str, weight_type: WeightType, addresses: Any, block: Any, ahead: Any,
    ys: list[Any],
) -> list[Any]:  # fmt: skip
    """Add one block of all sixteen rows and every token to `ys`, vector by vector."""
    values, scales, (x, x_rows), (f, f_rows), corrections_at = addresses
    value_bytes, scale_bytes = weight_type.value_bytes, weight_type.scale_bytes
    lanes = LANES[target]
    later = v.builder.add(block, ahead)
    v.prefetch(v.step(values, later, value_bytes), value_bytes)
    v.prefetch(v.step(scales, later, scale_bytes), scale_bytes)
    add, first_correction = v.builder.add, v.step(corrections_at, block, CORRECTION_BYTES)
    inputs = [add(v.step(x, block, 32), row) for row in x_rows]
    factors = [add(v.step(f, block, SCALE_BYTES), row) for row in f_rows]
    corrections = [add(first_correction, row) for row in f_rows]
    results: list[Any] = []
    for first in range(0, ROWS, lanes):
        some = v.at(v.step(values, block, value_bytes), 4 * first)
        own = UNPACK[weight_type][1](v, target, scales, block, first)
        for t, sums in enumerate(block_sums(v, target, weight_type, some, inputs, corrections)):
            factor = factors_at(v, factors[t], lanes)
            results.append(add_scaled(v, weight_type, own, sums, factor, ys[len(results)]))
    return results


@instruction(constants=4)
def tile(
    v: Vectors, target: str, kind: str, groups: int, tokens: int, values: Any, scales: Any,
    blocks: Any, x: Any, x_stride: Any, f: Any, f_stride: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    """Some groups of sixteen rows times some tokens.

    All addresses are those of the first group and token, as in gemm_plain.py.
    """
    write_tile(v, target, kind, groups, tokens,
               values, scales, blocks, x, x_stride, f, f_stride, y, y_stride)  # fmt: skip


def write_tile(
    v: Vectors, target: str, kind: str, groups: int, tokens: int, values: Any, scales: Any,
    blocks: Any, x: Any, x_stride: Any, f: Any, f_stride: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    """The instructions of `tile`."""
    builder, lanes, weight_type = v.builder, LANES[target], WeightType[kind]
    before_corrections = builder.udiv(
        builder.mul(f_stride, number(SCALE_BYTES)), number(4 * FACTORS)
    )
    value_bytes, scale_bytes = weight_type.value_bytes, weight_type.scale_bytes
    size = tokens * ROWS // lanes  # vectors of sums, of one group

    def some(block: Any, ys: list[Any]) -> list[Any]:
        ahead, results = blocks_ahead(v, weight_type, groups, block, blocks), list[Any]()
        for g in range(groups):
            own = (v.step(values, cells[g], value_bytes), v.step(scales, cells[g], scale_bytes))
            group_sums = ys[g * size : (g + 1) * size]
            addresses = (*own, *inputs)
            results += block_step(v, target, weight_type, addresses, block, ahead, group_sums)
        return results

    cells = [builder.mul(blocks, number(g)) for g in range(groups)]
    inputs = ((x, v.multiples(x_stride, tokens)), (f, v.multiples(f_stride, tokens)),
              builder.add(f, before_corrections))  # fmt: skip
    outputs = [builder.add(y, builder.mul(y_stride, number(t))) for t in range(tokens)]
    sums = v.count_up(blocks, [v.same(vector(F32, lanes), 0.0)] * (groups * size), some)
    locations = [v.at(row, 64 * g + 4 * n) for g in range(groups) for n in range(0, ROWS, lanes)
              for row in outputs]  # fmt: skip
    for total, location in zip(sums, locations, strict=True):
        v.store(total, location, 4)


@inlined
def run_groups(
    target: str, kind: str, row_groups: int, tile_tokens: int, value_bytes: int, scale_bytes: int,
    values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """All groups and tokens of a kernel, in tiles of `tile_tokens` tokens, then one by one.

    For a single token `row_groups` groups at once, if rows are long.
    """
    while tokens == 1 and blocks >= MIN_BLOCKS and first + row_groups <= last:
        w, d = values + first * blocks * value_bytes, scales + first * blocks * scale_bytes
        tile(target, kind, row_groups, 1, w, d, blocks, x, 0, f, f_stride, y + first * 64, 0)
        first += row_groups
    for group in range(first, last):
        w, d = values + group * blocks * value_bytes, scales + group * blocks * scale_bytes
        out, t = y + group * 64, 0
        while t + tile_tokens <= tokens:
            tile(target, kind, 1, tile_tokens, w, d, blocks, x + t * x_stride, x_stride,
                 f + t * f_stride, f_stride, out + t * y_stride, y_stride)  # fmt: skip
            t += tile_tokens
        while t + 4 <= tokens:
            tile(target, kind, 1, 4, w, d, blocks, x + t * x_stride, x_stride,
                 f + t * f_stride, f_stride, out + t * y_stride, y_stride)  # fmt: skip
            t += 4
        while t < tokens:
            tile(target, kind, 1, 1, w, d, blocks, x + t * x_stride, x_stride,
                 f + t * f_stride, f_stride, out + t * y_stride, y_stride)  # fmt: skip
            t += 1


def kernel(target: str, weight_type: WeightType) -> Callable[..., None]:
    """The kernel of one tier and weight type, for `cfunc`: see gemm_plain.py.

    It closes over strings and numbers only, so that Numba can distinguish the kernels on disk.
    """
    kind, tile_tokens = weight_type.name, TILE[target]
    value_bytes, scale_bytes = weight_type.value_bytes, weight_type.scale_bytes
    row_groups = row_groups_at_once(target, weight_type)

    def run(
        values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
        tokens: int, y: int, y_stride: int, first: int, last: int,
    ) -> None:  # fmt: skip
        run_groups(target, kind, row_groups, tile_tokens, value_bytes, scale_bytes,
                   values, scales, blocks, x, x_stride, f, f_stride,
                   tokens, y, y_stride, first, last)  # fmt: skip

    return run
