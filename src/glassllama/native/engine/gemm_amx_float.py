"""Bfloat16 weights in matrix registers: products summed where they are made, in float32.

Two groups of sixteen outputs meet up to 32 tokens, whose inputs are bfloat16 as well:

    tile 0 … 3  sums of tokens' tile n // 2 and group n % 2
    tile 4, 5   tokens × 32 inputs
    tile 6, 7   32 inputs × 16 outputs: sixteen vectors of pairs, as layout.py has them

Up to sixteen tokens may meet four groups, whose sums are tiles 0 … 3 then. Of long groups that is
faster: see SIDE_BY_SIDE of gemm_int8.py.

Four sums at a time, for one instruction must not wait for the last. A token's sum goes through its
inputs from first to last, 32 at a time, in any company; so it is the same to the bit.
"""

from __future__ import annotations

from typing import Any

from glassllama.native.engine.amx import begin_tiles, end_tiles, tile_at, tile_call
from glassllama.native.jit.compile import inlined, instruction_for_constants
from glassllama.native.jit.intrinsics import types
from glassllama.native.jit.ir_builder import AHEAD, LINE, NEAR, Vectors, number

TOKENS, STEP = 16, 32  # of a tile; inputs of one product
STEP_BYTES = 1024  # of a group's weights
MANY, LONG = 4, 64  # groups side by side, where they have so many steps


def soon(v: Vectors, n: Any, steps: Any, group_bytes: Any) -> Any:
    """From a step in use to the one that is asked for: near, then the first of the groups after."""
    inside = v.builder.icmp_signed("<", v.builder.add(n, number(NEAR // STEP_BYTES)), steps)
    others = v.builder.mul(group_bytes, number(MANY - 1))
    return v.builder.add(number(NEAR), v.builder.select(inside, number(0), others))


@instruction_for_constants
def products(  # type: ignore[no-untyped-def]
    context, tiles, groups, values, group_bytes, steps, x, x_stride, y, y_stride
):
    """Sums of one or two tiles of tokens and some groups (constants), stored at y."""
    token_tiles, both = range(tiles.literal_value), range(groups.literal_value)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, group_bytes, steps, x, x_stride, y, y_stride = arguments[2:]
        v, rows = Vectors(builder), number(TOKENS)

        def inputs(n: Any, t: int) -> None:
            own = builder.add(x, builder.mul(x_stride, builder.mul(rows, number(t))))
            tile_at(builder, "tileloadd64", 4 + t, v.step(own, n, 2 * STEP), x_stride)

        def weights(n: Any, g: int, ahead: Any) -> None:
            w = v.step(builder.add(values, builder.mul(group_bytes, number(g))), n, STEP_BYTES)
            v.prefetch(builder.add(w, ahead), STEP_BYTES)
            tile_at(builder, "tileloadd64", 6 + g % 2, w)

        def one(n: Any, nothing: list[Any]) -> list[Any]:
            for g in both:
                weights(n, g, number(AHEAD))
            for t in token_tiles:
                inputs(n, t)
                for g in both:
                    tile_call(builder, "tdpbf16ps", 2 * t + g, 4 + t, 6 + g)
            return nothing

        def one_of_many(n: Any, nothing: list[Any]) -> list[Any]:
            inputs(n, 0)
            for g in both:
                weights(n, g, soon(v, n, steps, group_bytes))
                tile_call(builder, "tdpbf16ps", g, 4, 6 + g % 2)
            return nothing

        for t in token_tiles:
            for g in both:
                tile_call(builder, "tilezero", 2 * t + g)
        v.count_up(steps, [], one_of_many if len(both) == MANY else one)
        for t in token_tiles:
            for g in both:
                out = builder.add(y, builder.mul(y_stride, builder.mul(rows, number(t))))
                tile_at(builder, "tilestored64", 2 * t + g, v.at(out, g * LINE), y_stride)
        return context.get_dummy_value()

    return types.void(tiles, groups, *[types.int64] * 7), emit


@inlined
def sweep_groups(
    tiles: int, values: int, size: int, steps: int, x: int, x_stride: int, y: int, y_stride: int,
    first: int, last: int,
) -> None:  # fmt: skip
    """All groups for one or two tiles of tokens: in twos, and one that is left; or in fours."""
    group = first
    while tiles == 1 and steps >= LONG and group + MANY <= last:
        products(1, MANY, values + group * size, size, steps, x, x_stride, y + group * LINE,
                 y_stride)  # fmt: skip
        group += MANY
    while group + 2 <= last:
        products(tiles, 2, values + group * size, size, steps, x, x_stride, y + group * LINE,
                 y_stride)  # fmt: skip
        group += 2
    if group < last:
        products(tiles, 1, values + group * size, size, steps, x, x_stride, y + group * LINE,
                 y_stride)  # fmt: skip


def bf16(
    values: int, scales: int, columns: int, x: int, x_stride: int, f: int, f_stride: int,
    tokens: int, y: int, y_stride: int, first: int, last: int,
) -> None:  # fmt: skip
    """The kernel, for `cfunc`: see gemm_plain.py. Inputs are bfloat16, a multiple of 32 of them."""
    size, steps, t = columns * 32, columns // STEP, 0
    if tokens >= TOKENS:
        begin_tiles("floats", TOKENS)
        while t + 2 * TOKENS <= tokens:
            sweep_groups(2, values, size, steps, x + t * x_stride, x_stride, y + t * y_stride,
                         y_stride, first, last)  # fmt: skip
            t += 2 * TOKENS
        if t + TOKENS <= tokens:
            sweep_groups(1, values, size, steps, x + t * x_stride, x_stride, y + t * y_stride,
                         y_stride, first, last)  # fmt: skip
            t += TOKENS
    if t < tokens:
        begin_tiles("floats of few", tokens - t)
        sweep_groups(1, values, size, steps, x + t * x_stride, x_stride, y + t * y_stride,
                     y_stride, first, last)  # fmt: skip
    end_tiles()
