"""Kernels of processors with matrix registers (Intel's AMX): sixteen tokens at a time.

Integers. A tile register holds sixteen rows of 64 bytes, and one instruction multiplies two of
them: here sixteen tokens times 32 inputs by 32 inputs times sixteen outputs, 8,192 products. The
second factor is a block of Q8_0 as in layout.py, but signed; all types are unpacked to that first,
once for all tokens. All products of some blocks are computed first, and then scaled: while tiles
multiply, 512-bit vectors have one port less, and tiles are not forwarded from pending stores.

    tile 0  16 tokens × 16 outputs  int32 sums
    tile 1  16 tokens × 32 inputs   int8, a row of it every `x_stride` bytes
    tile 2   8 vectors              int8: vector q holds inputs 4q … 4q+3 of sixteen outputs

On the calling thread's stack:

    for each of GROUPS groups  CHUNK blocks' bytes (8, 64), then their scales (2, 16) float32
    sums                       (CHUNK, 16 tokens, 16 outputs) int32, of blocks

The sums are whole numbers and what follows is in the order of gemm_int8.py, so a token's
numbers are the same to the bit in a tile of sixteen and alone. Fewer tokens go there. K-quants
have kernels of their own: gemm_kquant_amx.py.

Bfloat16. Products are summed in the tiles, in float32; inputs are bfloat16, too. Two groups of
sixteen outputs meet up to 32 tokens:

    tile 0 … 3  sums of tokens' tile n // 2 and group n % 2
    tile 4, 5   tokens × 32 inputs
    tile 6, 7   32 inputs × 16 outputs: sixteen vectors of pairs, as in layout.py

Up to sixteen tokens may meet four groups, whose sums are tiles 0 … 3 then; for long groups that is
faster. There are four sums at a time, because one instruction must not wait for the last. A token's
sum goes through its inputs from first to last, 32 at a time, whichever tokens are computed with it.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from glassllama.native.engine.gemm_float import clear
from glassllama.native.engine.gemm_int8 import (
    ROWS,
    TILE,
    add_scaled,
    is_signed,
    quads_of,
    row_groups_at_once,
    run_groups,
    scales_of,
)
from glassllama.native.engine.layout import BLOCK, SCALE_BYTES, WeightType
from glassllama.native.jit.compile import inlined
from glassllama.native.jit.intrinsics import (
    AHEAD,
    F32,
    I8,
    I32,
    LINE,
    NEAR,
    Vectors,
    cgutils,
    instruction,
    number,
    types,
    vector,
)

ROWS_OFFSET = 48  # of the rows of tile 0 in a configuration
# Rows and bytes of a row of each tile; 0: as many rows as there are tokens.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "integers": ((16, 64), (16, 32), (8, 64)),  # see gemm_amx.py
    "floats": ((16, 64),) * 8,  # see gemm_amx.py and gemm_kquant_amx.py
    "floats of few": (*((0, 64),) * 5, *((16, 64),) * 3),
}
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


@cache
def permitted() -> bool:
    """Ask the system for the registers: they are large, so Linux requires a request."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)


def configuration(shapes: tuple[tuple[int, int], ...]) -> Any:
    """The 64 bytes of a tile configuration, as a constant of sixteen words."""
    none = [0] * (16 - len(shapes))
    rows, widths = ([shape[n] for shape in shapes] + none for n in (0, 1))
    words = struct.unpack("<16I", struct.pack("<BB14x16H16B", 1, 0, *widths, *rows))
    return ir.Constant(vector(I32, 16), list(words))


def tile_call(v: Vectors, name: str, *arguments: Any) -> None:
    """An AMX instruction; tiles are named by constants of eight bits."""
    values = [ir.Constant(I8, a) if isinstance(a, int) else a for a in arguments]
    v.call(f"llvm.x86.{name}", ir.VoidType(), *values)


def tile_at(v: Vectors, name: str, tile: int, address: Any, stride: Any = LINE) -> None:
    """Load or store a tile, whose rows are so many bytes apart."""
    apart = number(stride) if isinstance(stride, int) else stride
    tile_call(v, name, tile, v.builder.inttoptr(address, I8.as_pointer()), apart)


@instruction(constants=1, returns=types.int64)
def scratch(v: Vectors, lines: int) -> Any:
    """So many cache lines of the caller's own stack -> their address."""
    location = cgutils.alloca_once(v.builder, vector(I8, LINE), size=lines)
    return v.builder.ptrtoint(location, number(0).type)


@instruction(constants=1)
def begin_tiles(v: Vectors, name: str, tokens: Any) -> None:
    """Give the tiles the shapes of this name."""
    location = cgutils.alloca_once(v.builder, vector(I32, 16))
    v.builder.store(configuration(SHAPES[name]), location)
    start = v.builder.bitcast(location, I8.as_pointer())
    for tile, (rows, _) in enumerate(SHAPES[name]):
        if rows == 0:
            own = v.builder.gep(start, [ir.Constant(I32, ROWS_OFFSET + tile)])
            v.builder.store(v.builder.trunc(tokens, I8), own)
    tile_call(v, "ldtilecfg", start)


@instruction()
def end_tiles(v: Vectors) -> None:
    """Release the registers: the system need not save them any more."""
    tile_call(v, "tilerelease")


# --- matrix registers -----------------------------------------------------------------------------


TOKENS = 16
BLOCK_BYTES, SUM_BYTES = 512, 1024
CHUNK = 16  # blocks at a time, whose bytes and sums stay in the first-level cache
SCALES = 128  # bytes of a block's scales as float32
SCALES_AT = CHUNK * BLOCK_BYTES
GROUP_BYTES = SCALES_AT + CHUNK * SCALES
GROUPS = 4  # groups at a time: inputs are read once for all of them
SUMS_AT = GROUPS * GROUP_BYTES
SUMS, INPUTS, WEIGHTS = range(3)
SAME_AS = "vnni"  # the tier whose vectors unpack and scale, and that computes the other tokens
SCRATCH_LINES = (SUMS_AT + CHUNK * SUM_BYTES) // LINE
STEP, STEP_BYTES = 32, 1024  # inputs of one product of bfloat16; bytes of a group's weights
MANY, LONG = 4, 64  # groups at once, if they have so many steps


@instruction(constants=1)
def unpack(
    v: Vectors, kind: str, values: Any, scales: Any, first: Any, count: Any, out: Any
) -> None:
    """`count` blocks of a group, from the block `first` on: at `out` eight vectors of bytes each,
    and after all of these their scales as float32."""
    weight_type = WeightType[kind]
    size, zero_point = weight_type.value_bytes, weight_type.zero_point

    def one(n: Any, nothing: list[Any]) -> list[Any]:
        block = v.builder.add(first, n)
        own = v.step(values, block, size)
        v.prefetch(v.at(own, AHEAD), size)
        for q, weights in quads_of(v, "amx", weight_type, own):
            if not is_signed("amx", weight_type):
                weights = v.builder.sub(weights, v.same(weights.type, zero_point))
            v.store(weights, v.at(v.step(out, n, BLOCK_BYTES), LINE * q), LINE)
        for k, d in enumerate(scales_of(v, "amx", weight_type, scales, block, 0)):
            v.store(d, v.at(v.step(out, n, SCALES), SCALES_AT + LINE * k), LINE)
        return nothing

    v.count_up(count, [], one)


def multiply_block(v: Vectors, weights: Any, inputs: Any, stride: Any, out: Any) -> None:
    """Products of one block: sums of sixteen tokens and outputs at `out`, int32."""
    tile_call(v, "tilezero", SUMS)
    tile_at(v, "tileloadd64", INPUTS, inputs, stride)
    tile_at(v, "tileloadd64", WEIGHTS, weights)
    tile_call(v, "tdpbssd", SUMS, INPUTS, WEIGHTS)
    tile_at(v, "tilestored64", SUMS, out)


def add_block(
    v: Vectors, weight_type: WeightType, n: Any, sums: Any, scales: Any, factors: list[Any],
    ys: list[Any],
) -> list[Any]:  # fmt: skip
    """The sums of block n, scaled and added to some tokens' ys."""
    whole, real = vector(I32, ROWS), vector(F32, ROWS)
    own, location = v.step(sums, n, SUM_BYTES), v.step(scales, n, SCALES)
    count = 2 if weight_type.has_minima else 1
    d, results = [v.load(v.at(location, LINE * k), real, LINE) for k in range(count)], []
    for t, y in enumerate(ys):
        factor = v.step(factors[t], n, SCALE_BYTES)
        total = v.load(v.at(own, LINE * t), whole, LINE)
        results.append(add_scaled(v, weight_type, d, [total], factor, None, y))
    return results


@instruction(constants=1)
def multiply_sixteen(
    v: Vectors, kind: str, scratch_address: Any, sums: Any, count: Any, x: Any, x_stride: Any,
    f: Any, f_stride: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    """y += `count` blocks of sixteen rows, unpacked at `scratch_address`, times sixteen tokens."""
    builder, floats, weight_type = v.builder, vector(F32, ROWS), WeightType[kind]
    scales = v.at(scratch_address, SCALES_AT)

    def products(n: Any, nothing: list[Any]) -> list[Any]:
        w, inputs = v.step(scratch_address, n, BLOCK_BYTES), v.step(x, n, BLOCK)
        multiply_block(v, w, inputs, x_stride, v.step(sums, n, SUM_BYTES))
        return nothing

    v.count_up(count, [], products)
    factors = [builder.add(f, builder.mul(f_stride, number(t))) for t in range(TOKENS)]
    locations = [builder.add(y, builder.mul(y_stride, number(t))) for t in range(TOKENS)]

    def scaled(n: Any, ys: list[Any]) -> list[Any]:
        return add_block(v, weight_type, n, sums, scales, factors, ys)

    ys = v.count_up(count, [v.load(location, floats, 4) for location in locations], scaled)
    for total, location in zip(ys, locations, strict=True):
        v.store(total, location, 4)


@inlined
def run_tiles(
    kind: str, value_bytes: int, scale_bytes: int,
    values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """All whole sixteens of tokens, for some groups; a few blocks at a time, which stay near."""
    scratch_address = scratch(SCRATCH_LINES)
    begin_tiles("integers", TOKENS)
    for group in range(first, last):
        for t in range(tokens):
            clear(y + group * LINE + t * y_stride)
    for start in range(first, last, GROUPS):
        row_groups = min(GROUPS, last - start)
        for block in range(0, blocks, CHUNK):
            count = min(CHUNK, blocks - block)
            for g in range(row_groups):
                w = values + (start + g) * blocks * value_bytes
                d = scales + (start + g) * blocks * scale_bytes
                unpack(kind, w, d, block, count, scratch_address + g * GROUP_BYTES)
            for t in range(0, tokens, TOKENS):
                for g in range(row_groups):
                    multiply_sixteen(
                        kind, scratch_address + g * GROUP_BYTES, scratch_address + SUMS_AT, count,
                        x + t * x_stride + block * BLOCK, x_stride,
                        f + t * f_stride + block * SCALE_BYTES, f_stride,
                        y + (start + g) * LINE + t * y_stride, y_stride)  # fmt: skip
    end_tiles()


def kernel(weight_type: WeightType) -> Callable[..., None]:
    """The kernel of a packed format, for `callback_address`: see gemm_plain.py."""
    kind, target, tile_tokens = weight_type.name, SAME_AS, TILE[SAME_AS]
    value_bytes, scale_bytes = weight_type.value_bytes, weight_type.scale_bytes
    row_groups = row_groups_at_once(target, weight_type)

    def run(
        values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
        tokens: int, y: int, y_stride: int, first: int, last: int,
    ) -> None:  # fmt: skip
        t = tokens // TOKENS * TOKENS
        if t > 0:
            run_tiles(kind, value_bytes, scale_bytes, values, scales, blocks, x, x_stride,
                      f, f_stride, t, y, y_stride, first, last)  # fmt: skip
        if t < tokens:
            run_groups(target, kind, row_groups, tile_tokens, value_bytes, scale_bytes,
                       values, scales, blocks, x + t * x_stride, x_stride, f + t * f_stride,
                       f_stride, tokens - t, y + t * y_stride, y_stride, first, last)  # fmt: skip

    return run


# --- bfloat16 -------------------------------------------------------------------------------------


def bytes_ahead(v: Vectors, n: Any, steps: Any, group_bytes: Any) -> Any:
    """Prefetch distance from a step: a short one, then the first steps of the groups after these.

    For MANY groups at once.
    """
    inside = v.builder.icmp_signed("<", v.builder.add(n, number(NEAR // STEP_BYTES)), steps)
    others = v.builder.mul(group_bytes, number(MANY - 1))
    return v.builder.add(number(NEAR), v.builder.select(inside, number(0), others))


@instruction(constants=2)
def multiply_bf16(
    v: Vectors, tiles: int, groups: int, values: Any, group_bytes: Any, steps: Any, x: Any,
    x_stride: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    """Sums of one or two tiles of tokens and some groups, stored at y."""
    b, rows = v.builder, number(TOKENS)

    def inputs(n: Any, t: int) -> None:
        own = b.add(x, b.mul(x_stride, b.mul(rows, number(t))))
        tile_at(v, "tileloadd64", 4 + t, v.step(own, n, 2 * STEP), x_stride)

    def weights(n: Any, g: int, ahead: Any) -> None:
        w = v.step(b.add(values, b.mul(group_bytes, number(g))), n, STEP_BYTES)
        v.prefetch(b.add(w, ahead), STEP_BYTES)
        tile_at(v, "tileloadd64", 6 + g % 2, w)

    def one(n: Any, nothing: list[Any]) -> list[Any]:
        for g in range(groups):
            weights(n, g, number(AHEAD))
        for t in range(tiles):
            inputs(n, t)
            for g in range(groups):
                tile_call(v, "tdpbf16ps", 2 * t + g, 4 + t, 6 + g)
        return nothing

    def one_of_many(n: Any, nothing: list[Any]) -> list[Any]:
        inputs(n, 0)
        for g in range(groups):
            weights(n, g, bytes_ahead(v, n, steps, group_bytes))
            tile_call(v, "tdpbf16ps", g, 4, 6 + g % 2)
        return nothing

    for t in range(tiles):
        for g in range(groups):
            tile_call(v, "tilezero", 2 * t + g)
    v.count_up(steps, [], one_of_many if groups == MANY else one)
    for t in range(tiles):
        for g in range(groups):
            out = b.add(y, b.mul(y_stride, b.mul(rows, number(t))))
            tile_at(v, "tilestored64", 2 * t + g, v.at(out, g * LINE), y_stride)


@inlined
def run_bfloat_groups(
    tiles: int, values: int, size: int, steps: int, x: int, x_stride: int, y: int, y_stride: int,
    first: int, last: int,
) -> None:  # fmt: skip
    """All groups for one or two tiles of tokens: in twos, and one that is left; or in fours."""
    group = first
    while tiles == 1 and steps >= LONG and group + MANY <= last:
        multiply_bf16(1, MANY, values + group * size, size, steps, x, x_stride,
                         y + group * LINE, y_stride)  # fmt: skip
        group += MANY
    while group + 2 <= last:
        multiply_bf16(tiles, 2, values + group * size, size, steps, x, x_stride,
                         y + group * LINE, y_stride)  # fmt: skip
        group += 2
    if group < last:
        multiply_bf16(tiles, 1, values + group * size, size, steps, x, x_stride,
                         y + group * LINE, y_stride)  # fmt: skip


def bf16(
    values: int, scales: int, columns: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """The kernel for bfloat16 inputs, a multiple of 32 of them: see gemm_plain.py."""
    size, steps, t = columns * 32, columns // STEP, 0
    if tokens >= TOKENS:
        begin_tiles("floats", TOKENS)
        while t + 2 * TOKENS <= tokens:
            run_bfloat_groups(2, values, size, steps, x + t * x_stride, x_stride, y + t * y_stride,
                         y_stride, first, last)  # fmt: skip
            t += 2 * TOKENS
        if t + TOKENS <= tokens:
            run_bfloat_groups(1, values, size, steps, x + t * x_stride, x_stride, y + t * y_stride,
                         y_stride, first, last)  # fmt: skip
            t += TOKENS
    if t < tokens:
        begin_tiles("floats of few", tokens - t)
        run_bfloat_groups(1, values, size, steps, x + t * x_stride, x_stride, y + t * y_stride,
                     y_stride, first, last)  # fmt: skip
    end_tiles()
