"""One step of a Llama, as every thread of the crew runs it: from embeddings to logits.

Read it from the bottom up, `forward` first: it is the forward pass. Tokens of all rows of a batch
stand in one list; each knows its row and its position. Every part of a layer is a phase whose items
the threads share out (crew.py): groups of sixteen rows of a matrix, tokens, or heads. No sum is
ever split between threads, so the numbers depend neither on their number nor on the batch.

All numbers lie in the room (room.py), and functions get at them by address: an array as an argument
is seven words to Numba, and a step handed twenty of them took 20 seconds to compile.

Shapes: N tokens of this step, C model width, H query heads, K kv heads, D head width, F ffn width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from glassllama.engine.attention import PAGE, attend, finish, merge, place, store
from glassllama.engine.compiled import compiled, entry, inlined
from glassllama.engine.crew import (
    ORDERS,
    STOP,
    YIELD,
    Member,
    complete,
    done,
    next_epoch,
    take,
)
from glassllama.engine.intrinsics import (
    atomic_load,
    call_kernel,
    floats,
    integers8,
    integers64,
)
from glassllama.engine.room import (
    BLOCKS,
    DOWN,
    FIELDS,
    GATE,
    GROUPS,
    INTEGERS,
    KERNEL,
    MATRICES,
    SCALES,
    UP,
    VALUES,
    WK,
    WO,
    WQ,
    WV,
)
from glassllama.engine.rows import BLOCK, add, encode, gate, normalise

LANES = 16  # rows of a group
PAIR = BLOCK // LANES  # groups that make a block of the next matrix's inputs

# Phases of a layer; after the last layer come the two of the logits.
NORM, QKV, PLACE, HEADS, MERGE, OUT, FFN_NORM, HIDDEN, DOWNWARD = range(9)
PHASES = 9
LOGITS_PHASES = 2

SPAN = 4 * PAGE  # tokens of one item of attention: long contexts are shared between threads
FEW_GROUPS = 4  # no smaller piece of a matrix is worth a trip to the board


class Step(NamedTuple):
    """What is asked of one step: the board's orders."""

    tokens: int
    wanted: int  # how many logits
    first: int  # layers first … last-1; the logits follow the last layer
    last: int
    table: int  # address of the cache's table of pages
    pages: int  # columns of that table
    spans: int  # of the longest row, SPAN tokens each
    wide: int  # pages of float32 instead of bfloat16


class Inputs(NamedTuple):
    """Rows that go into a matrix, `width` numbers each: float32 and, where wanted, int8."""

    numbers: int
    codes: int
    factors: int
    width: int


@compiled
def inputs_of(room: Any) -> Any:
    """Inputs of the matrices that read C or H·D numbers."""
    return Inputs(room.numbers, room.codes, room.factors, room.width)


@compiled
def inputs_of_down(room: Any) -> Any:
    return Inputs(room.hidden_numbers, room.hidden_codes, room.hidden_factors, room.hidden_width)


@compiled
def row(address: int, t: int, width: int) -> Any:
    """Row t of a float32 table."""
    return floats(address + t * width * 4, width)


@compiled
def field(room: Any, matrix: int, name: int) -> Any:
    """What the room's table says of a matrix."""
    return integers64(room.matrices + (matrix * FIELDS + name) * 8, 1)[0]


@compiled
def multiply(
    room: Any, matrix: int, inputs: Any, slot: int, tokens: int, groups: Any, out: int, width: int
) -> None:
    """Groups (first, last + 1) of a matrix times the inputs from `slot` on -> rows at `out`."""
    w = inputs.width
    address, stride = inputs.numbers + slot * w * 4, w * 4
    if field(room, matrix, INTEGERS):
        address, stride = inputs.codes + slot * w, w
    factor_stride = w // BLOCK * 8
    arguments = (
        field(room, matrix, VALUES), field(room, matrix, SCALES), field(room, matrix, BLOCKS),
        address, stride, inputs.factors + slot * factor_stride, factor_stride,
        tokens, out, width * 4, groups[0], groups[1],
    )  # fmt: skip
    call_kernel(field(room, matrix, KERNEL), arguments)


@compiled
def encode_blocks(inputs: Any, slot: int, numbers: Any, first: int, last: int) -> None:
    """Columns first … last-1 of a row become int8 inputs."""
    codes = integers8(inputs.codes + slot * inputs.width, inputs.width)
    blocks = inputs.width // BLOCK
    factors = floats(inputs.factors + slot * blocks * 8, (blocks, 2))
    encode(numbers, first // BLOCK, last // BLOCK, codes, factors)


@compiled
def norm_row(room: Any, norm: int, t: int, integers: int, slot: int) -> None:
    """RMSNorm of one row of the residual stream becomes inputs."""
    inputs = inputs_of(room)
    numbers = row(inputs.numbers, slot, inputs.width)
    normalise(row(room.x, t, room.dim), row(room.norms, norm, room.dim), room.eps, numbers)
    if integers:
        encode_blocks(inputs, slot, numbers, 0, room.dim)


@compiled
def prepare_norms(
    me: Any, phase: int, room: Any, norm: int, integers: int, tokens: int, count: int
) -> Any:
    """RMSNorm at `count` tokens, whose numbers are at `tokens` -> slot of the first one's inputs.

    A single token's inputs are made by every thread for itself: cheaper than to wait for one. In
    a slot of its own, for a late thread may still be at it when the next step has begun.
    """
    which = integers64(tokens, count)
    if count == 1:
        norm_row(room, norm, which[0], integers, room.slots + me.thread)
        return room.slots + me.thread
    first, last = take(me, phase, count, 1)
    while first < last:
        for t in range(first, last):
            norm_row(room, norm, which[t], integers, t)
        done(me, phase, last - first)
        first, last = take(me, phase, count, 1)
    complete(me, phase, count)
    return 0


@compiled
def project(me: Any, phase: int, room: Any, layer: int, slot: int, step: Any) -> None:
    """Queries, keys and values of all tokens: three matrices whose groups count through."""
    m = layer * MATRICES
    wk = field(room, m + WQ, GROUPS)
    wv = wk + field(room, m + WK, GROUPS)
    groups = wv + field(room, m + WV, GROUPS)
    starts = (0, wk, wv, groups)
    first, last = take(me, phase, groups, FEW_GROUPS)
    while first < last:
        for n in range(3):
            low, high = max(first, starts[n]), min(last, starts[n + 1])
            if low < high:
                some = (low - starts[n], high - starts[n])
                out = room.qkv + starts[n] * LANES * 4
                width = room.qkv_width
                multiply(room, m + n, inputs_of(room), slot, step.tokens, some, out, width)
        done(me, phase, last - first)
        first, last = take(me, phase, groups, FEW_GROUPS)
    complete(me, phase, groups)


@compiled
def page_offsets(room: Any, layer: int, kv_head: int, wide: int) -> Any:
    """Bytes from a page's start to the keys and to the values of one layer and kv head."""
    head_bytes = room.head_dim * PAGE * (4 if wide else 2)
    keys = (layer * room.kv_heads + kv_head) * head_bytes
    return keys, keys + room.layers * room.kv_heads * head_bytes


@compiled
def row_pages(room: Any, step: Any, t: int) -> Any:
    """Addresses of the pages of a token's row."""
    batch_row = integers64(room.rows, step.tokens)[t]
    return integers64(step.table + batch_row * step.pages * 8, step.pages)


@compiled
def position_of(room: Any, t: int) -> Any:
    return integers64(room.positions + t * 8, 1)[0]


@compiled
def place_token(room: Any, layer: int, step: Any, t: int) -> None:
    """Turn a token's queries and keys by its position; keys and values go into the cache."""
    width, pairs, unit, m = room.head_dim, room.pairs, room.qk_norm, layer * MATRICES
    cos, sin = row(room.cos, t, width // 2), row(room.sin, t, width // 2)
    queries = room.qkv + t * room.qkv_width * 4
    for head in range(room.heads):
        place(row(queries, head, width), cos, sin, pairs, unit, room.eps)
    position = position_of(room, t)
    page, slot = row_pages(room, step, t)[position // PAGE], position % PAGE
    first_key = queries + field(room, m + WQ, GROUPS) * LANES * 4
    first_value = first_key + field(room, m + WK, GROUPS) * LANES * 4
    for head in range(room.kv_heads):
        key, value = row(first_key, head, width), row(first_value, head, width)
        place(key, cos, sin, pairs, unit, room.eps)
        keys, values = page_offsets(room, layer, head, step.wide)
        store(key, value, page + keys, page + values, slot, step.wide)


@compiled
def place_all(me: Any, phase: int, room: Any, layer: int, step: Any) -> None:
    """`place_token` for all tokens."""
    first, last = take(me, phase, step.tokens, 1)
    while first < last:
        for t in range(first, last):
            place_token(room, layer, step, t)
        done(me, phase, last - first)
        first, last = take(me, phase, step.tokens, 1)
    complete(me, phase, step.tokens)


@compiled
def look(
    me: Any, room: Any, layer: int, step: Any, t: int, head: int, span: int, part: Any
) -> None:
    """A query head looks at one span of its row."""
    keys, values = page_offsets(room, layer, head // room.group_size, step.wide)
    query = row(room.qkv + t * room.qkv_width * 4, head, room.head_dim)
    last = min((span + 1) * SPAN, position_of(room, t) + 1)
    scores, pages = row(room.scores, me.thread, PAGE), row_pages(room, step, t)
    attend(query, pages, span * SPAN, last, keys, values, step.wide, scores, part)


@compiled
def look_at_all(me: Any, room: Any, layer: int, step: Any, t: int, head: int) -> None:
    """A query head looks at its row, span after span -> `mixed`."""
    width = room.head_dim
    whole = row(room.part, 2 * me.thread, width + 2)
    part = row(room.part, 2 * me.thread + 1, width + 2)
    look(me, room, layer, step, t, head, 0, whole)
    for span in range(1, position_of(room, t) // SPAN + 1):
        look(me, room, layer, step, t, head, span, part)
        merge(whole, part, width)
    finish(whole, row(room.mixed + t * room.heads * width * 4, head, width))


@compiled
def spans_shared(room: Any, step: Any) -> Any:
    """Whether there are few enough spans to keep each one's result: then threads share them."""
    return step.spans > 1 and step.tokens * room.heads * step.spans <= room.parts_room


@compiled
def attend_heads(me: Any, phase: int, room: Any, layer: int, step: Any) -> None:
    """Every query head of every token looks at its row's keys up to its own position."""
    heads = room.heads
    spans = step.spans if spans_shared(room, step) else 1
    items = step.tokens * heads * spans
    first, last = take(me, phase, items, 1)
    while first < last:
        for item in range(first, last):
            t, head, span = item // (heads * spans), item // spans % heads, item % spans
            if spans == 1:
                look_at_all(me, room, layer, step, t, head)
            elif span * SPAN <= position_of(room, t):
                part = row(room.parts, item, room.head_dim + 2)
                look(me, room, layer, step, t, head, span, part)
        done(me, phase, last - first)
        first, last = take(me, phase, items, 1)
    complete(me, phase, items)


@compiled
def merge_spans(me: Any, room: Any, step: Any, t: int, out: int) -> None:
    """The shared spans of a token's heads become what the heads saw, at `out`."""
    width = room.head_dim
    spans = min(position_of(room, t) // SPAN + 1, step.spans)
    whole = row(room.part, 2 * me.thread, width + 2)
    for head in range(room.heads):
        first = (t * room.heads + head) * step.spans
        part = row(room.parts, first, width + 2)
        for i in range(width + 2):
            whole[i] = part[i]
        for span in range(1, spans):
            merge(whole, row(room.parts, first + span, width + 2), width)
        finish(whole, row(out, head, width))


@compiled
def merge_token(me: Any, room: Any, step: Any, t: int, integers: int, slot: int) -> None:
    """What a token's heads saw becomes inputs."""
    inputs, width = inputs_of(room), room.heads * room.head_dim
    numbers, seen = row(inputs.numbers, slot, inputs.width), row(room.mixed, t, width)
    if spans_shared(room, step):
        merge_spans(me, room, step, t, inputs.numbers + slot * inputs.width * 4)
    else:
        for i in range(width):
            numbers[i] = seen[i]
    if integers:
        encode_blocks(inputs, slot, numbers, 0, width)


@compiled
def prepare_mixed(me: Any, phase: int, room: Any, integers: int, step: Any) -> Any:
    """What the heads saw becomes inputs -> slot of the first token's: see `prepare_norms`."""
    if step.tokens == 1:
        merge_token(me, room, step, 0, integers, room.slots + me.thread)
        return room.slots + me.thread
    first, last = take(me, phase, step.tokens, 1)
    while first < last:
        for t in range(first, last):
            merge_token(me, room, step, t, integers, t)
        done(me, phase, last - first)
        first, last = take(me, phase, step.tokens, 1)
    complete(me, phase, step.tokens)
    return 0


@compiled
def add_product(
    me: Any, phase: int, room: Any, matrix: int, inputs: Any, slot: int, step: Any
) -> None:
    """x += matrix · inputs, at all tokens."""
    groups, width = field(room, matrix, GROUPS), room.added_width
    first, last = take(me, phase, groups, FEW_GROUPS)
    while first < last:
        multiply(room, matrix, inputs, slot, step.tokens, (first, last), room.added, width)
        start, count = first * LANES * 4, min(last * LANES, room.dim) - first * LANES
        for t in range(step.tokens):
            x = floats(room.x + t * room.dim * 4 + start, count)
            add(x, floats(room.added + t * width * 4 + start, count))
        done(me, phase, last - first)
        first, last = take(me, phase, groups, FEW_GROUPS)
    complete(me, phase, groups)


@compiled
def gate_groups(room: Any, layer: int, slot: int, step: Any, groups: Any) -> None:
    """Some groups of gate and up, SwiGLU between them, and what comes out made inputs of `down`."""
    m, inputs, down = layer * MATRICES, inputs_of(room), inputs_of_down(room)
    ups, width = room.hidden + room.hidden_columns * 4, 2 * room.hidden_columns
    multiply(room, m + GATE, inputs, slot, step.tokens, groups, room.hidden, width)
    multiply(room, m + UP, inputs, slot, step.tokens, groups, ups, width)
    first, last = groups[0] * LANES, min(groups[1] * LANES, room.ffn_dim)
    for t in range(step.tokens):
        numbers = row(down.numbers, t, down.width)
        gate(row(room.hidden, t, width), row(ups, t, width), first, last, numbers)
        if field(room, m + DOWN, INTEGERS):
            encode_blocks(down, t, numbers, first, last)


@compiled
def gate_all(me: Any, phase: int, room: Any, layer: int, slot: int, step: Any) -> None:
    """`gate_groups` for all groups, two at a time: a block of 32 inputs of `down`."""
    groups = field(room, layer * MATRICES + GATE, GROUPS)
    pairs = (groups + PAIR - 1) // PAIR
    first, last = take(me, phase, pairs, FEW_GROUPS // PAIR)
    while first < last:
        gate_groups(room, layer, slot, step, (first * PAIR, min(last * PAIR, groups)))
        done(me, phase, last - first)
        first, last = take(me, phase, pairs, FEW_GROUPS // PAIR)
    complete(me, phase, pairs)


@compiled
def attention(me: Any, room: Any, layer: int, step: Any) -> None:
    """x += wo · heads(norm(x))."""
    m, phase = layer * MATRICES, layer * PHASES
    integers = field(room, m + WQ, INTEGERS) | field(room, m + WK, INTEGERS)
    integers |= field(room, m + WV, INTEGERS)
    slot = prepare_norms(me, phase + NORM, room, 2 * layer, integers, room.everyone, step.tokens)
    project(me, phase + QKV, room, layer, slot, step)
    place_all(me, phase + PLACE, room, layer, step)
    attend_heads(me, phase + HEADS, room, layer, step)
    slot = prepare_mixed(me, phase + MERGE, room, field(room, m + WO, INTEGERS), step)
    add_product(me, phase + OUT, room, m + WO, inputs_of(room), slot, step)


@compiled
def feed_forward(me: Any, room: Any, layer: int, step: Any) -> None:
    """x += down · (silu(gate · norm(x)) · (up · norm(x)))."""
    m, phase = layer * MATRICES, layer * PHASES
    integers = field(room, m + GATE, INTEGERS) | field(room, m + UP, INTEGERS)
    slot = prepare_norms(
        me, phase + FFN_NORM, room, 2 * layer + 1, integers, room.everyone, step.tokens
    )
    gate_all(me, phase + HIDDEN, room, layer, slot, step)
    add_product(me, phase + DOWNWARD, room, m + DOWN, inputs_of_down(room), 0, step)


@compiled
def output(me: Any, room: Any, step: Any) -> None:
    """Logits of the wanted tokens: output · norm(x)."""
    layers = room.layers
    m, phase = layers * MATRICES, layers * PHASES
    integers, groups = field(room, m, INTEGERS), field(room, m, GROUPS)
    slot = prepare_norms(me, phase, room, 2 * layers, integers, room.wanted, step.wanted)
    inputs, width = inputs_of(room), groups * LANES
    first, last = take(me, phase + 1, groups, FEW_GROUPS)
    while first < last:
        multiply(room, m, inputs, slot, step.wanted, (first, last), room.logits, width)
        done(me, phase + 1, last - first)
        first, last = take(me, phase + 1, groups, FEW_GROUPS)
    complete(me, phase + 1, groups)


@inlined
def forward(me: Any, room: Any, step: Any) -> None:
    """Layers first … last-1 for all tokens of the step, and the logits after the last layer."""
    for layer in range(step.first, step.last):
        attention(me, room, layer, step)
        feed_forward(me, room, layer, step)
    if step.last == room.layers and step.wanted > 0:
        output(me, room, step)


@inlined
def take_part(
    thread: int, threads: int, board: int, first_phase: int, epoch: int, room: Any
) -> None:
    """One thread's part of the step on the board, unless that is over already."""
    orders = board + ORDERS * 8
    step = Step(
        atomic_load(orders), atomic_load(orders + 8), atomic_load(orders + 16),
        atomic_load(orders + 24), atomic_load(orders + 32), atomic_load(orders + 40),
        atomic_load(orders + 48), atomic_load(orders + 56),
    )  # fmt: skip
    if atomic_load(board) == epoch:
        offer = atomic_load(board + YIELD * 8)
        me = Member(thread, threads, board + first_phase * 8, epoch, offer)
        forward(me, room, step)


@entry
def serve(thread: int, threads: int, board: int, first_phase: int, epoch: int, room: Any) -> int:
    """A crew thread's life between two sleeps -> the last epoch it has seen.

    Thread 0 is the caller, who has just announced the step `epoch`, and returns when it is done.
    """
    while atomic_load(board + STOP * 8) == 0:
        if thread > 0:
            following = next_epoch(board, thread, epoch)
            if following < 0:
                break
            epoch = following
        take_part(thread, threads, board, first_phase, epoch, room)
        if thread == 0:
            break
    return epoch
