"""Integer kernels of processors with matrix registers (Intel's AMX): sixteen tokens at a time.

A tile register holds sixteen rows of 64 bytes, and one instruction multiplies two of them: here
sixteen tokens times 32 inputs by 32 inputs times sixteen outputs, 8,192 products. What layout.py
calls a block of Q8_0 is the second factor as it stands; other formats are unpacked to that first.
Tiles are not forwarded from stores that are still on their way: bytes and sums are computed some
blocks before they are used, or every instruction would wait for the last.

    tile 0  16 tokens × 16 outputs  int32 sums
    tile 1  16 tokens × 32 inputs   int8, a row of it every `x_stride` bytes
    tile 2   8 vectors              uint8: vector q holds inputs 4q … 4q+3 of sixteen outputs
    tile 3, 4                       half as many inputs, where half blocks have scales of their own

The sums are whole numbers and what follows is in the order of integer_kernels.py, so a token's
numbers are the same to the bit in a tile of sixteen and alone. Fewer tokens go there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glassllama.engine.compiled import inlined, instruction, instruction_for_constants
from glassllama.engine.float_kernels import clear
from glassllama.engine.integer_kernels import FORMATS, HALVES, ROWS, SIDE_BY_SIDE, TILE, sweep
from glassllama.engine.intrinsics import cgutils, types
from glassllama.engine.matrix_registers import SHAPES, begin_tiles, end_tiles, tile_call
from glassllama.engine.vectors import AHEAD, F32, I8, I32, LINE, Vectors, number, vector

TOKENS = 16
BLOCK = 32  # inputs
BLOCK_BYTES, SUM_BYTES, FACTOR_BYTES = 512, 1024, 16
FEW = 32  # blocks at a time: their bytes and some sums take half of a core's nearest cache
LEAD = 1  # blocks from products to their use
RING = 2  # places for the sums of a block
SUMS, INPUTS, WEIGHTS, HALF_INPUTS, HALF_WEIGHTS = range(5)
BYTES = vector(I8, 64)
SAME_AS = "vnni"  # the tier whose vectors unpack and scale, and which the other tokens go to
SCRATCH_LINES = (FEW * BLOCK_BYTES + RING * 2 * SUM_BYTES) // LINE


@instruction
def scratch(context: Any) -> Any:
    """Room for FEW blocks' bytes and the sums, on the caller's own stack: () -> its address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = cgutils.alloca_once(builder, BYTES, size=SCRATCH_LINES)
        return builder.ptrtoint(place, context.get_value_type(types.int64))

    return types.int64(), emit


@instruction_for_constants
def unpack(context, kind, values, count, out):  # type: ignore[no-untyped-def]
    """`count` blocks of a group from `values` on -> eight vectors of bytes each at `out`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, count, out = arguments[1:]
        v, (size, _, quads, _) = Vectors(builder), FORMATS[kind.literal_value]

        def one(n: Any, nothing: list[Any]) -> list[Any]:
            own = v.step(values, n, size)
            v.prefetch(v.at(own, AHEAD), size)
            for q, weights in quads(v, SAME_AS, own):
                v.store(weights, v.at(v.step(out, n, BLOCK_BYTES), LINE * q), LINE)
            return nothing

        v.count_up(count, [], one)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3), emit


def multiply_block(v: Vectors, kind: str, weights: Any, inputs: Any, stride: Any, out: Any) -> None:
    """Products of one block: sums of sixteen tokens and outputs at `out`, int32, one or two."""
    left, right = (HALF_INPUTS, HALF_WEIGHTS) if kind in HALVES else (INPUTS, WEIGHTS)
    vectors, width = SHAPES["integers"][right][0], SHAPES["integers"][left][1]
    parts = 2 if kind in HALVES else 1
    b, byte, line = v.builder, I8.as_pointer(), number(LINE)
    for part in range(parts):
        x, w = v.at(inputs, part * width), v.at(weights, part * vectors * LINE)
        tile_call(b, "tilezero", SUMS)
        tile_call(b, "tileloadd64", left, b.inttoptr(x, byte), stride)
        tile_call(b, "tileloadd64", right, b.inttoptr(w, byte), line)
        tile_call(b, "tdpbsud", SUMS, left, right)  # signed inputs, unsigned weights
        tile_call(b, "tilestored64", SUMS, b.inttoptr(v.at(out, part * SUM_BYTES), byte), line)


def add_block(
    v: Vectors, kind: str, sums: Any, scales: Any, block: Any, factors: list[Any], ys: list[Any]
) -> list[Any]:
    """A block's sums, scaled and added to sixteen tokens' ys."""
    parts, wanted = (2, (0, 2, 3)) if kind in HALVES else (1, (0, 1))
    whole, real, results = vector(I32, ROWS), vector(F32, ROWS), []
    apply = FORMATS[kind][3](v, SAME_AS, scales, block, 0)
    for t in range(TOKENS):
        place = v.step(factors[t], block, FACTOR_BYTES)
        mine = {k: v.splat(v.load(v.at(place, 4 * k), F32, 4), ROWS) for k in wanted}
        lines = [v.at(sums, SUM_BYTES * part + LINE * t) for part in range(parts)]
        totals = [v.builder.sitofp(v.load(line, whole, LINE), real) for line in lines]
        results.append(apply(totals, mine, ys[t]))
    return results


@instruction_for_constants
def multiply_sixteen(  # type: ignore[no-untyped-def]
    context, kind, weights, scales, first, count, x, x_stride, f, f_stride, ring, y, y_stride
):
    """y += `count` blocks of sixteen rows, from the block `first` on, times sixteen tokens.

    Products run LEAD blocks before what is made of them: both units of the processor have work.
    """
    format = kind.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, scales, first, count, x, x_stride, f, f_stride, ring, y, y_stride = arguments[1:]
        v = Vectors(builder)
        factors = [builder.add(f, builder.mul(f_stride, number(t))) for t in range(TOKENS)]
        places = [builder.add(y, builder.mul(y_stride, number(t))) for t in range(TOKENS)]

        def sums(n: Any) -> Any:
            return v.step(ring, builder.and_(n, number(RING - 1)), 2 * SUM_BYTES)

        def products(n: Any, carried: list[Any]) -> list[Any]:
            # Beyond the last block the last once more, into a place that nobody reads.
            some = builder.select(builder.icmp_signed("<", n, last), n, last)
            w, inputs = v.step(weights, some, BLOCK_BYTES), v.step(x, some, BLOCK)
            multiply_block(v, format, w, inputs, x_stride, sums(n))
            return carried

        def both(n: Any, ys: list[Any]) -> list[Any]:
            products(builder.add(n, number(LEAD)), [])
            return add_block(v, format, sums(n), scales, builder.add(first, n), factors, ys)

        last = builder.sub(count, number(1))
        v.count_up(number(LEAD), [], products)
        ys = v.count_up(count, [v.load(place, vector(F32, ROWS), 4) for place in places], both)
        for total, place in zip(ys, places, strict=True):
            v.store(total, place, 4)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 11), emit


@inlined
def sweep_sixteens(
    kind: str, value_bytes: int, scale_bytes: int,
    values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """All whole sixteens of tokens, for some groups; a few blocks at a time, which stay near."""
    space = scratch()
    ring = space + FEW * BLOCK_BYTES
    begin_tiles("integers", TOKENS)
    for group in range(first, last):
        out = y + group * LINE
        for t in range(tokens):
            clear(out + t * y_stride)
        w, d = values + group * blocks * value_bytes, scales + group * blocks * scale_bytes
        for block in range(0, blocks, FEW):
            count, own = min(FEW, blocks - block), w + block * value_bytes
            unpack(kind, own, count, space)
            for t in range(0, tokens, TOKENS):
                multiply_sixteen(kind, space, d, block, count, x + t * x_stride + block * BLOCK,
                                 x_stride, f + t * f_stride, f_stride, ring,
                                 out + t * y_stride, y_stride)  # fmt: skip
    end_tiles()


def kernel(kind: str) -> Callable[..., None]:
    """The kernel of a packed format, for `cfunc`: see kernels.py."""
    value_bytes, scale_bytes = FORMATS[kind][:2]
    target, many = SAME_AS, TILE[SAME_AS]
    beside = SIDE_BY_SIDE.get((target, kind), 1)

    def run(
        values: int, scales: int, blocks: int, x: int, x_stride: int, f: int, f_stride: int,
        tokens: int, y: int, y_stride: int, first: int, last: int,
    ) -> None:  # fmt: skip
        t = tokens // TOKENS * TOKENS
        if t > 0:
            sweep_sixteens(kind, value_bytes, scale_bytes, values, scales, blocks, x, x_stride,
                           f, f_stride, t, y, y_stride, first, last)  # fmt: skip
        if t < tokens:
            sweep(target, kind, beside, many, value_bytes, scale_bytes, values, scales, blocks,
                  x + t * x_stride, x_stride, f + t * f_stride, f_stride,
                  tokens - t, y + t * y_stride, y_stride, first, last)  # fmt: skip

    return run
