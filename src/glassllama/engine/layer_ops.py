"""What the phases of a step share: its orders, inputs of matrices, and multiplication by one.

All numbers lie in the room (engine/workspace.py), and functions get at them by address: an array as an argument
is seven words to Numba, and a step handed twenty of them took 20 seconds to compile.

Shapes: N tokens of this step, C model width, H query heads, K kv heads, D head width, F ffn width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from glassllama.engine.compiled import compiled
from glassllama.engine.elementwise import BLOCK, encode, normalise
from glassllama.engine.intrinsics import (
    bfloat_from_float,
    call_kernel,
    floats,
    integers8,
    integers64,
    words16,
)
from glassllama.engine.layout import BFLOAT16, INT8, WIDE
from glassllama.engine.quantize_activations import (
    FACTORS,
    SUPERBLOCK,
    WIDE_BYTES,
    encode_superblock,
)
from glassllama.engine.thread_pool import complete, take
from glassllama.engine.workspace import (
    BLOCKS,
    FIELDS,
    KERNEL,
    READS,
    SCALES,
    TOLD,
    VALUES,
)


class Step(NamedTuple):
    """What is asked of one step: the board's orders."""

    tokens: int
    tiles: int  # tokens of one row, next to each other: see attention
    wanted: int  # how many logits
    first: int  # layers first … last-1; the logits follow the last layer
    last: int
    table: int  # address of the cache's table of pages
    pages: int  # columns of that table
    spans: int  # of the longest row, SPAN tokens each
    kind: int  # of the numbers in the cache: pages.INT16, FLOAT32, INT8
    logits: int  # address of the table that takes them: (wanted, padded V)


class Inputs(NamedTuple):
    """Rows that go into a matrix, `width` numbers each: float32 and, where wanted, more."""

    numbers: int
    codes: int
    factors: int
    bfloats: int
    wides: int
    wide_next: int  # bytes from a superblock of a row to the next
    width: int


@compiled
def inputs_of(room: Any) -> Any:
    """Inputs of the matrices that read C or H·D numbers."""
    return Inputs(
        room.numbers, room.codes, room.factors, room.bfloats, room.wides, room.seats * WIDE_BYTES,
        room.width,
    )  # fmt: skip


@compiled
def inputs_of_down(room: Any) -> Any:
    return Inputs(
        room.hidden_numbers, room.hidden_codes, room.hidden_factors, room.hidden_bfloats,
        room.hidden_wides, room.slots * WIDE_BYTES, room.hidden_width,
    )  # fmt: skip


@compiled
def row(address: int, t: int, width: int) -> Any:
    """Row t of a float32 table."""
    return floats(address + t * width * 4, width)


@compiled
def field(room: Any, matrix: int, name: int) -> Any:
    """What the room's table says of a matrix."""
    return integers64(room.matrices + (matrix * FIELDS + name) * 8, 1)[0]


@compiled
def told(room: Any, t: int) -> Any:
    """What the step was told of a token: id, row, position."""
    return integers64(room.told + t * TOLD * 8, TOLD)


@compiled
def multiply(
    room: Any, matrix: int, inputs: Any, slot: int, tokens: int, groups: Any, out: int, width: int
) -> None:
    """Groups (first, last + 1) of a matrix times the inputs from `slot` on -> rows at `out`."""
    w = inputs.width
    address, stride = inputs.numbers + slot * w * 4, w * 4
    reads = field(room, matrix, READS)
    if reads == INT8:
        address, stride = inputs.codes + slot * w, w
    elif reads == BFLOAT16:
        address, stride = inputs.bfloats + slot * w * 2, w * 2
    factor_stride = w // BLOCK * FACTORS * 4
    factors = inputs.factors + slot * factor_stride
    if reads == WIDE:
        address, stride = inputs.wides + slot * WIDE_BYTES, WIDE_BYTES
        factors, factor_stride = address, inputs.wide_next
    arguments = (
        field(room, matrix, VALUES), field(room, matrix, SCALES), field(room, matrix, BLOCKS),
        address, stride, factors, factor_stride,
        tokens, out, width * 4, groups[0], groups[1],
    )  # fmt: skip
    call_kernel(field(room, matrix, KERNEL), arguments)


@compiled
def convert(reads: int, inputs: Any, slot: int, numbers: Any, first: int, last: int) -> None:
    """Columns first … last-1 of a row, whole blocks, in the forms that matrices read.

    Whole superblocks, where one of these forms is WIDE.
    """
    if reads & INT8:
        codes = integers8(inputs.codes + slot * inputs.width, inputs.width)
        blocks = inputs.width // BLOCK
        factors = floats(inputs.factors + slot * blocks * FACTORS * 4, (blocks, FACTORS))
        encode(numbers, first // BLOCK, last // BLOCK, codes, factors)
    if reads & BFLOAT16:
        bfloats = words16(inputs.bfloats + slot * inputs.width * 2, inputs.width)
        for i in range(first, last):
            bfloats[i] = bfloat_from_float(numbers[i])
    if reads & WIDE:
        for n in range(first // SUPERBLOCK, last // SUPERBLOCK):
            out = inputs.wides + n * inputs.wide_next + slot * WIDE_BYTES
            encode_superblock(numbers.ctypes.data + n * SUPERBLOCK * 4, out)


@compiled
def norm_row(room: Any, norm: int, t: int, reads: int, slot: int) -> None:
    """RMSNorm of one row of the residual stream becomes inputs."""
    inputs = inputs_of(room)
    numbers = row(inputs.numbers, slot, inputs.width)
    normalise(row(room.x, t, room.dim), row(room.norms, norm, room.dim), room.eps, numbers)
    convert(reads, inputs, slot, numbers, 0, room.dim)


@compiled
def prepare_norms(
    me: Any, phase: int, room: Any, norm: int, reads: int, tokens: int, count: int
) -> Any:
    """RMSNorm at `count` tokens, whose numbers are at `tokens` -> slot of the first one's inputs.

    A single token's inputs are made by every thread for itself: cheaper than to wait for one. In
    a slot of its own, for a late thread may still be at it when the next step has begun.
    """
    which = integers64(tokens, count)
    if count == 1:
        norm_row(room, norm, which[0], reads, room.slots + me.thread)
        return room.slots + me.thread
    first, last = take(me, phase, count, 1)
    mine = 0
    while first < last:
        for t in range(first, last):
            norm_row(room, norm, which[t], reads, t)
        mine += last - first
        first, last = take(me, phase, count, 1)
    complete(me, phase, count, mine)
    return 0
