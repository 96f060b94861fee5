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
    FACTORS,
    INT8_MAX,
    NEGATED,
    NEGATED_BYTES,
    NEGATED_HIGH,
    NEGATED_LOW,
    SCALE,
    SCALE_BYTES,
    TOTAL,
    ScaleLayout,
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
SIGNED = ("neon", "avx2", "amx")  # cannot multiply and add up unsigned bytes above 127
SIGN = 128  # the zero point of bytes that become signed without it


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
    b, zero = v.builder, v.same(weights.type, 0)
    negative = b.icmp_signed("<", weights, zero)
    size = b.select(negative, b.sub(zero, weights), weights)
    signed = v.call("llvm.x86.avx2.psign.b", inputs.type, inputs, weights)
    return fours(v, pairs(v, size, signed))


def pairs(v: Vectors, weights: Any, inputs: Any) -> Any:
    """Products of unsigned weights and signed inputs, two for each 16-bit lane."""
    return v.call("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), weights, inputs)


def fours(v: Vectors, words: Any) -> Any:
    """Two words added for each 32-bit lane."""
    return v.call("llvm.x86.avx2.pmadd.wd", vector(I32, 8), words, v.same(words.type, 1))


def pairs_at_once(target: str, weight_type: WeightType) -> int:
    """How many products of `pairs` a word can hold, a power of two; 0: use `dot`."""
    if target != "avx2" or is_signed(target, weight_type):
        return 0
    codes = [step + weight_type.zero_point for step in weight_type.steps]
    largest = max(codes, default=2 ** sum(weight_type.planes) - 1)
    return 1 << (32767 // (2 * INT8_MAX * largest)).bit_length() - 1


def is_signed(target: str, weight_type: WeightType) -> bool:
    """Whether codes are multiplied as signed bytes: some targets need that for eight-bit codes."""
    return weight_type.zero_point == SIGN and target in SIGNED


def quads_of(
    v: Vectors, target: str, weight_type: WeightType, values: Any
) -> list[tuple[int, Any]]:
    """A block -> [(number q of four inputs, their weights)], `zero_point` too large if unsigned."""
    size, planes, first = 4 * LANES[target], list[list[Any]](), 0
    for bits in weight_type.planes:
        lines = range(first, first + bits)
        planes.append([v.load(v.at(values, 64 * n), vector(I8, size), size) for n in lines])
        first += bits
    quads, signed = [], is_signed(target, weight_type)
    for q in sorted(range(8), key=lambda q: q % len(planes[0])):
        code, low = bits_of(v, planes[0], q, 0), len(planes[0])
        for plane in planes[1:]:
            code = v.builder.or_(code, bits_of(v, plane, q, low))
        if weight_type.steps:
            zero_point = 0 if signed else weight_type.zero_point
            code = look_up(v, target, [step + zero_point for step in weight_type.steps], code)
        elif signed:
            code = v.builder.xor(code, v.same(code.type, SIGN))
        quads.append((q, code))
    return quads


def bits_of(v: Vectors, plane: list[Any], q: int, to: int) -> Any:
    """The bits of inputs 4q … 4q+3 in a plane, moved to bit `to`. There is no shift of bytes: words
    are shifted, and a mask drops what came from the byte beside."""
    b, count = v.builder, len(plane)
    packed, shift = plane[q % count], q // count * count - to
    if count == 8:
        return packed
    if shift:
        words = vector(I16, packed.type.count // 2)
        move = b.lshr if shift > 0 else b.shl
        moved = move(b.bitcast(packed, words), v.same(words, abs(shift)))
        packed = b.bitcast(moved, packed.type)
    return b.and_(packed, v.same(packed.type, (2**count - 1) << to))


def look_up(v: Vectors, target: str, steps: list[int], codes: Any) -> Any:
    """The steps of codes 0 … 15, byte by byte."""
    table = ir.Constant(codes.type, [step & 255 for step in steps] * (codes.type.count // 16))
    if target == "neon":
        return v.call("llvm.aarch64.neon.tbl1.v16i8", codes.type, table, codes)
    name = "avx512.pshuf.b.512" if codes.type.count == 64 else "avx2.pshuf.b"
    return v.call(f"llvm.x86.{name}", codes.type, table, codes)


def scales_of(
    v: Vectors, target: str, weight_type: WeightType, scales: Any, block: Any, row: int
) -> list[Any]:
    """Scales of a block, one or two, then their minima: see ScaleLayout."""
    lanes, b, form = LANES[target], v.builder, weight_type.scales
    count = 2 if form.has_minima else 1
    if not form.is_super:
        location = v.at(v.step(scales, block, form.bytes), 2 * row)
        if form.is_bf16:
            return [v.from_bfloat16(location, lanes)]
        return [v.halves(v.at(location, 2 * ROWS * n), lanes) for n in range(count)]
    own_bytes = form.bytes - 4 * count
    start = v.step(scales, b.lshr(block, number(3)), 8 * form.bytes)
    own = v.step(v.at(start, 2 * ROWS * count + row), b.and_(block, number(7)), own_bytes)
    factors = [v.halves(v.at(start, 2 * (row + ROWS * n)), lanes) for n in range(count)]
    if form.has_minima:
        factors[1] = b.fneg(factors[1])
    lines = [
        v.load(v.at(own, ROWS * n), vector(I8, lanes), lanes) for n in range(own_bytes // ROWS)
    ]
    if form is ScaleLayout.SUPER_16M:
        lines = [v.low_nibbles(x) for x in lines] + [v.high_nibbles(x) for x in lines]
    small = [v.whole(x, signed=not form.has_minima) for x in lines]
    return [b.fmul(factors[n // form.sums], x) for n, x in enumerate(small)]


MIN_BLOCKS = 64  # of a row, for several groups at once; for shorter rows no gain (docs/log.md)


def row_groups_at_once(target: str, weight_type: WeightType) -> int:
    """Groups computed together for a single token.

    Memory is read faster at several places, and the products of different groups do not wait for
    each other.
    """
    return 4 if target == "vnni" and weight_type is not WeightType.Q8_0 else 1


def add_scaled(
    v: Vectors, weight_type: WeightType, scales: list[Any], sums: list[Any], factors: Any,
    negated: Any, y: Any,
) -> Any:  # fmt: skip
    """y + Σ weights · inputs of a block, from its one or two integer sums.

    At `factors` and `negated` are the token's factors of the block.
    """
    b, lanes = v.builder, y.type.count
    s = in_every_lane(v, v.at(factors, 4 * SCALE), F32, lanes)
    for d, total in zip(scales, sums, strict=False):
        y = v.multiply_add(b.sitofp(total, y.type), b.fmul(d, s), y)
    if weight_type.has_minima and len(sums) == 1:
        return v.multiply_add(scales[1], in_every_lane(v, v.at(factors, 4 * TOTAL), F32, lanes), y)
    for half, minimum in enumerate(scales[2:]):
        total = in_every_lane(v, v.at(negated, 4 * (NEGATED_LOW + half)), I32, lanes)
        y = v.multiply_add(b.fmul(minimum, b.fneg(s)), b.sitofp(total, y.type), y)
    return y


def in_every_lane(v: Vectors, address: Any, kind: Any, lanes: int) -> Any:
    return v.splat(v.load(address, kind, 4), lanes)


def first_sums(v: Vectors, target: str, weight_type: WeightType, negated: Any) -> list[Any]:
    """Initial sums of a token and block: zero, or the zero-point corrections."""
    lanes, b = LANES[target], v.builder
    whole = vector(I32, lanes)
    if weight_type.zero_point == 0 or is_signed(target, weight_type):
        return [v.same(whole, 0)] * weight_type.sums
    bits = v.same(whole, weight_type.zero_point.bit_length() - 1)
    parts = (NEGATED,) if weight_type.sums == 1 else (NEGATED_LOW, NEGATED_HIGH)
    return [b.shl(in_every_lane(v, v.at(negated, 4 * n), I32, lanes), bits) for n in parts]


def block_sums(
    v: Vectors, target: str, weight_type: WeightType, values: Any, inputs: list[Any],
    negated: list[Any],
) -> list[Any]:  # fmt: skip
    """One block of the rows of a vector times that block of every token -> int32 sums."""
    sums = [first_sums(v, target, weight_type, address) for address in negated]
    if len(inputs) == 1 and weight_type.sums == 1:
        # A single token would wait for each sum before the next: two chains of sums instead.
        sums[0].append(v.same(sums[0][0].type, 0))
    words: dict[tuple[int, int], tuple[Any, int]] = {}  # by token and chain: pairs, and how many
    most, b = pairs_at_once(target, weight_type), v.builder
    for q, weights in quads_of(v, target, weight_type, values):
        for t, address in enumerate(inputs):
            four = v.splat(v.load(v.at(address, 4 * q), I32, 4), LANES[target])
            chain = q * len(sums[t]) // 8
            some = b.bitcast(four, weights.type)
            if most == 0:
                sums[t][chain] = dot(v, target, sums[t][chain], weights, some)
                continue
            before, count = words.get((t, chain), (None, 0))
            products = pairs(v, weights, some)
            words[t, chain] = (products if count == 0 else b.add(before, products), count + 1)
            if count + 1 == min(most, 8 // len(sums[t])):
                sums[t][chain] = b.add(sums[t][chain], fours(v, words.pop((t, chain))[0]))
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
    values, scales, (x, x_rows), (f, f_rows), negated_at = addresses
    value_bytes, scale_bytes = weight_type.value_bytes, weight_type.scale_bytes
    lanes = LANES[target]
    later = v.builder.add(block, ahead)
    v.prefetch(v.step(values, later, value_bytes), value_bytes)
    v.prefetch(v.step(scales, later, scale_bytes), scale_bytes)
    add, first_negated = v.builder.add, v.step(negated_at, block, NEGATED_BYTES)
    inputs = [add(v.step(x, block, 32), row) for row in x_rows]
    factors = [add(v.step(f, block, SCALE_BYTES), row) for row in f_rows]
    negated = [add(first_negated, row) for row in f_rows]
    results: list[Any] = []
    for first in range(0, ROWS, lanes):
        some = v.at(v.step(values, block, value_bytes), 4 * first)
        own = scales_of(v, target, weight_type, scales, block, first)
        for t, sums in enumerate(block_sums(v, target, weight_type, some, inputs, negated)):
            y = ys[len(results)]
            results.append(add_scaled(v, weight_type, own, sums, factors[t], negated[t], y))
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
    before_negated = builder.udiv(builder.mul(f_stride, number(SCALE_BYTES)), number(4 * FACTORS))
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
              builder.add(f, before_negated))  # fmt: skip
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
