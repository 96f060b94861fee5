"""Integer kernels of processors with matrix registers (Intel's AMX): sixteen tokens at a time.

A tile register holds sixteen rows of 64 bytes, and one instruction multiplies two of them: here
sixteen tokens times 32 inputs by 32 inputs times sixteen outputs, 8,192 products. The second factor
is a block of Q8_0 as layout.py has it, but signed; all formats are unpacked to that first, once for
all tokens. Then all products of some blocks are taken, and then scaled: while tiles are at work
512-bit vectors have one port less, and tiles are not forwarded from stores on their way.

    tile 0  16 tokens × 16 outputs  int32 sums
    tile 1  16 tokens × 32 inputs   int8, a row of it every `x_stride` bytes
    tile 2   8 vectors              int8: vector q holds inputs 4q … 4q+3 of sixteen outputs

In memory near by, the calling thread's stack:

    for each of GROUPS groups  FEW blocks' bytes (8, 64), then their scales (2, 16) float32
    sums                       (FEW, 16 tokens, 16 outputs) int32, of blocks

The sums are whole numbers and what follows is in the order of gemm_int8.py, so a token's
numbers are the same to the bit in a tile of sixteen and alone. Fewer tokens go there. K-quants
have a way of their own: gemm_kquant_amx.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glassllama.native.engine.amx import (
    begin_tiles,
    end_tiles,
    scratch,
    tile_at,
    tile_call,
)
from glassllama.native.engine.gemm_float import clear
from glassllama.native.engine.gemm_int8 import (
    FORMATS,
    MINIMA,
    ROW_GROUPS,
    ROWS,
    TILE,
    add_scaled,
    factors_at,
    run_groups,
)
from glassllama.native.engine.quantize_activations import SCALE_BYTES
from glassllama.native.jit.compile import inlined, instruction_for_constants
from glassllama.native.jit.intrinsics import types
from glassllama.native.jit.ir_builder import AHEAD, F32, I8, I32, LINE, Vectors, number, vector

TOKENS = 16
BLOCK = 32  # inputs
BLOCK_BYTES, SUM_BYTES = 512, 1024
CHUNK = 16  # blocks at a time, whose bytes and sums stay in a core's nearest cache
SCALES = 128  # bytes of a block's, once they are float32
SCALES_AT = CHUNK * BLOCK_BYTES
GROUP_BYTES = SCALES_AT + CHUNK * SCALES
GROUPS = 4  # groups at a time: inputs come from afar once for all of them
SUMS_AT = GROUPS * GROUP_BYTES
SUMS, INPUTS, WEIGHTS = range(3)
BYTES = vector(I8, 64)
SAME_AS = "vnni"  # the tier whose vectors unpack and scale, and which the other tokens go to
SCRATCH_LINES = (SUMS_AT + CHUNK * SUM_BYTES) // LINE


@instruction_for_constants
def unpack(context, kind, values, scales, first, count, out):  # type: ignore[no-untyped-def]
    """`count` blocks of a group, from the block `first` on: at `out` eight vectors of bytes each,
    and after all of these their scales as float32."""
    format = kind.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, scales, first, count, out = arguments[1:]
        v, (size, _, quads, scales_of) = Vectors(builder), FORMATS[format]

        def one(n: Any, nothing: list[Any]) -> list[Any]:
            block = builder.add(first, n)
            own = v.step(values, block, size)
            v.prefetch(v.at(own, AHEAD), size)
            for q, weights in quads(v, "amx", own):
                if format == "Q4_0":
                    weights = builder.sub(weights, v.same(BYTES, 8))
                v.store(weights, v.at(v.step(out, n, BLOCK_BYTES), LINE * q), LINE)
            for k, d in enumerate(scales_of(v, "amx", scales, block, 0)):
                v.store(d, v.at(v.step(out, n, SCALES), SCALES_AT + LINE * k), LINE)
            return nothing

        v.count_up(count, [], one)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), emit


def multiply_block(v: Vectors, weights: Any, inputs: Any, stride: Any, out: Any) -> None:
    """Products of one block: sums of sixteen tokens and outputs at `out`, int32."""
    tile_call(v.builder, "tilezero", SUMS)
    tile_at(v.builder, "tileloadd64", INPUTS, inputs, stride)
    tile_at(v.builder, "tileloadd64", WEIGHTS, weights)
    tile_call(v.builder, "tdpbssd", SUMS, INPUTS, WEIGHTS)
    tile_at(v.builder, "tilestored64", SUMS, out)


def add_block(
    v: Vectors, kind: str, n: Any, sums: Any, scales: Any, factors: list[Any], ys: list[Any]
) -> list[Any]:
    """The sums of block n, scaled and added to some tokens' ys."""
    whole, real = vector(I32, ROWS), vector(F32, ROWS)
    own, place = v.step(sums, n, SUM_BYTES), v.step(scales, n, SCALES)
    count = 2 if kind in MINIMA else 1
    d, results = [v.load(v.at(place, LINE * k), real, LINE) for k in range(count)], []
    for t, y in enumerate(ys):
        factor = factors_at(v, v.step(factors[t], n, SCALE_BYTES), ROWS)
        total = v.load(v.at(own, LINE * t), whole, LINE)
        results.append(add_scaled(v, kind, d, [total], factor, y))
    return results


@instruction_for_constants
def multiply_sixteen(  # type: ignore[no-untyped-def]
    context, kind, scratch_address, sums, count, x, x_stride, f, f_stride, y, y_stride
):
    """y += `count` blocks of sixteen rows, unpacked at `scratch_address`, times sixteen tokens."""
    format = kind.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scratch_address, sums, count, x, x_stride, f, f_stride, y, y_stride = arguments[1:]
        v, floats = Vectors(builder), vector(F32, ROWS)
        scales = v.at(scratch_address, SCALES_AT)

        def products(n: Any, nothing: list[Any]) -> list[Any]:
            w, inputs = v.step(scratch_address, n, BLOCK_BYTES), v.step(x, n, BLOCK)
            multiply_block(v, w, inputs, x_stride, v.step(sums, n, SUM_BYTES))
            return nothing

        v.count_up(count, [], products)
        factors = [builder.add(f, builder.mul(f_stride, number(t))) for t in range(TOKENS)]
        places = [builder.add(y, builder.mul(y_stride, number(t))) for t in range(TOKENS)]

        def scaled(n: Any, ys: list[Any]) -> list[Any]:
            return add_block(v, format, n, sums, scales, factors, ys)

        ys = v.count_up(count, [v.load(place, floats, 4) for place in places], scaled)
        for total, place in zip(ys, places, strict=True):
            v.store(total, place, 4)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 9), emit


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


def kernel(kind: str) -> Callable[..., None]:
    """The kernel of a packed format, for `cfunc`: see gemm_plain.py."""
    value_bytes, scale_bytes = FORMATS[kind][:2]
    target, tile_tokens = SAME_AS, TILE[SAME_AS]
    row_groups = ROW_GROUPS.get((target, kind), 1)

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
