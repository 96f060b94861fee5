"""K-quants in matrix registers: whole superblocks of many tokens are summed as integers.

The sums are those of gemm_kquant_vnni.py. Tiles multiply bytes; inputs are x = 8 · hi + lo, here
8 · X + Y, and weights have two parts as well, w = base · H + L. So there are four products:

    Σ w·x = base · (8 · Σ H·X + Σ H·Y) + 8 · Σ L·X + Σ L·Y

    a tile of tokens   X and Y of eight tokens in turn: sixteen rows of 64 inputs
    a tile of weights  sixteen vectors, of inputs 4q … 4q+3 of sixteen outputs each
    a tile of sums     HX and HY, or LX and LY, of eight tokens in turn × sixteen outputs, int32

Four tiles of sums at a time, for one instruction must not wait for the last: those of sixteen
tokens and one group of outputs, or of eight tokens and two groups. Tiles 0 … 3 are sums, 4 and 5
tokens, 5 … 7 weights. Sums of half blocks' inputs meet the minima in a tile too, as bfloat16 that
are whole numbers: a sum is split in two of them, and all stays below 2²⁴, where float32 is exact.

On the calling thread's stack:

    of each of GROUPS groups  H and L (16 · 4, 64), minima (16, 64), d and −dmin (2, 16) float32
    sums                      (4, 16, 16), then those of the minima: (16 tokens, 16 outputs)

All sums are exact, so a token's numbers are the same to the bit whichever tokens are computed with
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from glassllama.native.engine.gemm_amx import begin_tiles, end_tiles, scratch, tile_at, tile_call
from glassllama.native.engine.gemm_float import clear
from glassllama.native.engine.gemm_int8 import ROWS, quads_of
from glassllama.native.engine.gemm_kquant_vnni import (
    BLOCKS,
    FLOATS,
    INTS,
    LOW_BITS,
    MAX_VECTOR_TOKENS,
    WORDS,
    add_scaled,
    run_few_tokens,
    scale_of_token,
    scales_of_superblock,
    small,
    twice,
)
from glassllama.native.engine.layout import (
    LOW_STEPS,
    Q11_BYTES,
    Q11_HI,
    Q11_LO,
    Q11_SUMS,
    SUPERBLOCK,
    WeightType,
)
from glassllama.native.jit.compile import inlined
from glassllama.native.jit.intrinsics import I8, LINE, Vectors, instruction, number, vector

TOKENS, TILE = 16, 8  # at a time; of a tile
BASE = {WeightType.Q4_K: 8, WeightType.Q3_K: 128, WeightType.Q6_K: 128}
PART_BYTES, TILE_BYTES, STEPS = ROWS * SUPERBLOCK, 16 * LINE, SUPERBLOCK // LINE
MINIMA_AT = 2 * PART_BYTES
SCALES_AT = MINIMA_AT + TILE_BYTES
GROUP_BYTES = SCALES_AT + 2 * LINE
GROUPS = 2  # groups at a time: inputs are read once for both of them
CHUNK = 4  # superblocks whose inputs, of all tokens, stay in a core's second-level cache
SUMS_AT = GROUPS * GROUP_BYTES
SUMS, INPUTS, WEIGHTS = 4, 4, 7  # tiles
MINIMA_SUMS = SUMS * TILE_BYTES
HALF = TILE * LINE  # of those
SCRATCH_LINES = (SUMS_AT + MINIMA_SUMS + TILE_BYTES + HALF) // LINE


# --- one superblock of a group, unpacked ----------------------------------------------------------


def unpack_with_minima(
    v: Vectors, weight_type: WeightType, values: Any, scales: Any, out: Any
) -> None:
    """H and L: scale = 8 · upper + lower, and neither times a nibble is more than 105. So a word of
    two nibbles, a byte each, is multiplied at once."""
    b = v.builder

    def block(j: Any, nothing: list[Any]) -> list[Any]:
        own = v.step(v.at(scales, 4 * ROWS), j, 2 * ROWS)
        scale = small(v, own, signed=False)
        parts = (b.lshr(scale, v.same(INTS, 3)), b.and_(scale, v.same(INTS, 7)))
        pairs = [twice(v, part) for part in parts]
        location = v.step(out, j, 8 * LINE)
        own_values = v.step(values, j, weight_type.value_bytes)
        for q, codes in quads_of(v, "amx", weight_type, own_values):
            for n, part in enumerate(pairs):
                product = b.mul(b.bitcast(codes, WORDS), part)
                v.store(product, v.at(location, PART_BYTES * n + LINE * q), LINE)
        minimum = v.load(v.at(own, ROWS), vector(I8, ROWS), ROWS)
        minimum = b.bitcast(v.whole(minimum, signed=False), INTS)
        both = b.or_(minimum, b.lshr(minimum, v.same(INTS, 16)))  # as bfloat16, twice
        for half in (0, 1):
            v.store(both, v.step(v.at(out, MINIMA_AT + LINE * half), j, 2 * LINE), LINE)
        return nothing

    v.count_up(number(BLOCKS), [], block)


def unpack_halves(v: Vectors, weight_type: WeightType, values: Any, scales: Any, out: Any) -> None:
    """H and L of w = scale · (code − zero point), thirteen bits: seven lower ones, and what is
    above."""
    b, byte, seven = v.builder, v.same(WORDS, 8), v.same(WORDS, 7)

    def joined(even: Any, odd: Any) -> Any:
        return b.or_(b.and_(even, v.same(WORDS, 0xFF)), b.shl(odd, byte))

    def block(j: Any, nothing: list[Any]) -> list[Any]:
        own = v.step(v.at(scales, 2 * ROWS), j, 2 * ROWS)
        pairs = [twice(v, small(v, v.at(own, ROWS * n), signed=True)) for n in (0, 1)]
        location = v.step(out, j, 8 * LINE)
        own_values = v.step(values, j, weight_type.value_bytes)
        for q, codes in quads_of(v, "amx", weight_type, own_values):
            zero_points = v.same(codes.type, weight_type.zero_point)
            words = b.bitcast(b.sub(codes, zero_points), WORDS)
            both = (b.ashr(b.shl(words, byte), byte), b.ashr(words, byte))
            even, odd = (b.mul(part, pairs[q // 4]) for part in both)
            lower = (b.and_(w, v.same(WORDS, 127)) for w in (even, odd))
            upper = (b.ashr(w, seven) for w in (even, odd))
            for n, parts in enumerate((upper, lower)):
                v.store(joined(*parts), v.at(location, PART_BYTES * n + LINE * q), LINE)
        return nothing

    v.count_up(number(BLOCKS), [], block)


@instruction(constants=1)
def unpack(v: Vectors, kind: str, values: Any, scales: Any, out: Any) -> None:
    """A superblock of a group at `out`, ready for tiles."""
    weight_type = WeightType[kind]
    for n, d in enumerate(scales_of_superblock(v, weight_type, scales)):
        v.store(d, v.at(out, SCALES_AT + LINE * n), LINE)
    form = unpack_with_minima if weight_type.has_minima else unpack_halves
    form(v, weight_type, values, scales, out)


# --- products of tiles ----------------------------------------------------------------------------


@instruction()
def begin_sums(v: Vectors) -> None:
    for n in range(SUMS):
        tile_call(v, "tilezero", n)


@instruction(constants=1)
def multiply(v: Vectors, groups: int, scratch_address: Any, x: Any) -> None:
    """Sums += 64 inputs of a superblock: two tiles of tokens times a group, unpacked at
    `scratch_address`, or one tile times two groups."""

    def tokens(tile: int) -> None:
        location = v.at(x, Q11_HI + tile * TILE * Q11_BYTES)
        tile_at(v, "tileloadd64", INPUTS + tile, location, Q11_LO - Q11_HI)

    tokens(0)
    for n in range(2 * groups):  # of each group H, then L
        weights = WEIGHTS - n % 3
        part = v.at(scratch_address, n // 2 * GROUP_BYTES + n % 2 * PART_BYTES)
        tile_at(v, "tileloadd64", weights, part)
        tile_call(v, "tdpbssd", n, INPUTS, weights)
        if groups == 1:
            if n == 0:
                tokens(1)
            tile_call(v, "tdpbssd", 2 + n, INPUTS + 1, weights)


@instruction(constants=2)
def end_sums(v: Vectors, kind: str, groups: int, scratch_address: Any, x: Any, sums: Any) -> None:
    """Sums go to memory, with those of the minima."""
    locations = {tile: tile * TILE_BYTES for tile in range(SUMS)}
    if WeightType[kind].has_minima:
        tile_at(v, "tileloadd64", INPUTS, v.at(x, Q11_SUMS), Q11_BYTES)
        for g in range(groups):
            own = INPUTS + 1 + g
            tile_call(v, "tilezero", own)
            minima = v.at(scratch_address, g * GROUP_BYTES + MINIMA_AT)
            tile_at(v, "tileloadd64", WEIGHTS, minima)
            tile_call(v, "tdpbf16ps", own, INPUTS, WEIGHTS)
            locations[own] = MINIMA_SUMS + g * HALF  # of two groups eight tokens count
    for tile, location in locations.items():
        tile_at(v, "tilestored64", tile, v.at(sums, location))


def whole_sum(v: Vectors, base: int, sums: Any) -> Any:
    """Σ w·x of a token, from its HX and HY, LX and LY."""
    b, bits = v.builder, v.same(INTS, LOW_BITS)
    hx, hy, lx, ly = (
        v.load(v.at(sums, tile * TILE_BYTES + n * LINE), INTS, LINE)
        for tile in (0, 1)
        for n in (0, 1)
    )
    if base == LOW_STEPS:
        return b.add(b.shl(b.add(b.shl(hx, bits), b.add(hy, lx)), bits), ly)
    upper, lower = b.add(b.shl(hx, bits), hy), b.add(b.shl(lx, bits), ly)
    return b.add(b.shl(upper, v.same(INTS, base.bit_length() - 1)), lower)


@instruction(constants=1)
def add_tokens(
    v: Vectors, kind: str, scratch_address: Any, sums: Any, minima: Any, first: Any, last: Any,
    x: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    """Sums of the tokens first … last-1 > first of a tile, scaled and added to y."""
    b, weight_type = v.builder, WeightType[kind]
    count = 2 if weight_type.has_minima else 1
    scales = [
        v.load(v.at(scratch_address, SCALES_AT + LINE * n), FLOATS, LINE) for n in range(count)
    ]

    def token(n: Any, nothing: list[Any]) -> list[Any]:
        t = b.add(first, n)
        found = [b.sitofp(whole_sum(v, BASE[weight_type], v.step(sums, t, 2 * LINE)), FLOATS)]
        if count > 1:
            found.append(v.load(v.step(minima, t, LINE), FLOATS, LINE))
        s, out = scale_of_token(v, v.step(x, t, Q11_BYTES)), b.add(y, b.mul(t, y_stride))
        v.store(add_scaled(v, scales, found, s, v.load(out, FLOATS, 4)), out, 4)
        return nothing

    v.count_up(b.sub(last, first), [], token)


@instruction(constants=2)
def prefetch_part(
    v: Vectors, kind: str, groups: int, values: Any, scales: Any, blocks: Any, cell: Any, k: Any
) -> None:
    """Prefetch part k of STEPS of a superblock of some groups, which begins with block `cell`."""
    weight_type, b = WeightType[kind], v.builder
    for g in range(groups):
        own = b.add(cell, b.mul(blocks, number(g)))
        for location, block in (
            (values, weight_type.value_bytes),
            (scales, weight_type.scale_bytes),
        ):
            part = BLOCKS * block // STEPS
            v.prefetch(v.step(v.step(location, own, block), k, part), part)


# --- all groups and tokens ------------------------------------------------------------------------


class KernelArgs(NamedTuple):
    """A kernel's arguments: see `kernel`."""

    values: int
    scales: int
    blocks: int
    x: int
    x_next: int
    tokens: int
    y: int
    y_stride: int


class PendingSums(NamedTuple):
    """Sums in memory of a tile's tokens, which are to be scaled and added to y."""

    tokens: int
    scratch_address: int
    x: int
    y: int


@inlined
def add_pending(
    kind: str, sums: int, tile: int, pending: Any, first: int, last: int, w: Any
) -> None:
    """Some tokens of the first or second tile that was made."""
    last = min(last, pending.tokens)
    if first < last:
        own, minima = sums + tile * 2 * TILE_BYTES, sums + MINIMA_SUMS + tile * HALF
        add_tokens(kind, pending.scratch_address, own, minima, first, last, pending.x, pending.y,
                   w.y_stride)  # fmt: skip


@inlined
def multiply_tiles(
    kind: str, groups: int, scratch_address: int, x: int, sums: int, one: Any, two: Any, w: Any,
    next_block: int,
) -> None:  # fmt: skip
    """A superblock of one group times sixteen tokens, or of two times eight.

    While tiles are multiplied, vectors add what was made before, one tile's tokens and another's,
    and the superblock that begins with block `next_block` is asked for; −1: none.
    """
    begin_sums()
    for k in range(STEPS):
        multiply(groups, scratch_address + k * TILE_BYTES, x + k * LINE)
        if next_block >= 0:
            prefetch_part(kind, groups, w.values, w.scales, w.blocks, next_block, k)
        first = k % 2 * TILE // 2
        add_pending(kind, sums, k // 2, one if k < 2 else two, first, first + TILE // 2, w)
    end_sums(kind, groups, scratch_address, x, sums)


@inlined
def multiply_superblock(
    kind: str, scratch_address: int, n: int, group: int, row_groups: int, w: Any, next_block: int
) -> None:
    """Superblock n of one or two groups, unpacked at `scratch_address`, times all tokens."""
    sums, y = scratch_address + SUMS_AT, w.y + group * LINE
    one = two = PendingSums(0, scratch_address, w.x, y)
    for t in range(0, w.tokens, TOKENS):
        x, out, left = w.x + n * w.x_next + t * Q11_BYTES, y + t * w.y_stride, w.tokens - t
        if left > TILE:
            for g in range(row_groups):
                own, last = scratch_address + g * GROUP_BYTES, left <= TOKENS
                next_own = next_block + g * w.blocks if last and next_block >= 0 else -1
                multiply_tiles(kind, 1, own, x, sums, one, two, w, next_own)
                one = PendingSums(TILE, own, x, out + g * LINE)
                two = PendingSums(min(left, TOKENS) - TILE, own, x + TILE * Q11_BYTES,
                           out + g * LINE + TILE * w.y_stride)  # fmt: skip
        else:
            multiply_tiles(kind, 2, scratch_address, x, sums, one, two, w, next_block)
            one = PendingSums(left, scratch_address, x, out)
            two = PendingSums(
                left if row_groups > 1 else 0, scratch_address + GROUP_BYTES, x, out + LINE
            )
    add_pending(kind, sums, 0, one, 0, TILE, w)
    add_pending(kind, sums, 1, two, 0, TILE, w)


@inlined
def run_tiles(kind: str, value_bytes: int, scale_bytes: int, w: Any, first: int, last: int) -> None:
    """More than a few tokens times all groups: chunk by chunk of the inputs, two by two groups."""
    scratch_address, supers = scratch(SCRATCH_LINES), w.blocks // BLOCKS
    begin_tiles("floats", TOKENS)
    for group in range(first, last):
        for t in range(w.tokens):
            clear(w.y + group * LINE + t * w.y_stride)
    for chunk in range(0, supers, CHUNK):
        end = min(chunk + CHUNK, supers)
        for group in range(first, last, GROUPS):
            row_groups = min(GROUPS, last - group)
            for n in range(chunk, end):
                for g in range(row_groups):
                    cell = (group + g) * w.blocks + n * BLOCKS
                    unpack(kind, w.values + cell * value_bytes, w.scales + cell * scale_bytes,
                           scratch_address + g * GROUP_BYTES)  # fmt: skip
                next_block = -1
                if n + 1 < end:
                    next_block = group * w.blocks + (n + 1) * BLOCKS
                elif group + 2 * GROUPS <= last:
                    next_block = (group + GROUPS) * w.blocks + chunk * BLOCKS
                multiply_superblock(kind, scratch_address, n, group, row_groups, w, next_block)
    end_tiles()


def kernel(weight_type: WeightType) -> Callable[..., None]:
    """The kernel of a packed format, for `callback_address`: see gemm_plain.py.

    Inputs are in format Q11 (layout.py): a superblock of all tokens at `x`, then `x_next` bytes
    further the next superblock.
    """
    kind = weight_type.name
    value_bytes, scale_bytes = weight_type.value_bytes, weight_type.scale_bytes

    def run(
        values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, x_next: int,
        tokens: int, y: int, y_stride: int, first: int, last: int,
    ) -> None:  # fmt: skip
        if tokens <= MAX_VECTOR_TOKENS:
            run_few_tokens(kind, value_bytes, scale_bytes, values, scales, blocks, x, x_next,
                           tokens, y, y_stride, first, last)  # fmt: skip
        else:
            w = KernelArgs(values, scales, blocks, x, x_next, tokens, y, y_stride)
            run_tiles(kind, value_bytes, scale_bytes, w, first, last)

    return run
