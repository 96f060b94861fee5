"""One step of a Llama, as every thread of the crew runs it: from embeddings to logits.

Read it from the bottom up, `forward` first: it is the forward pass. Tokens of all rows of a batch
stand in one list; each knows its row and its position. Every part of a layer is a phase whose items
the threads share out (engine/thread_pool.py): groups of sixteen rows of a matrix, tokens, or heads. No sum is
ever split between threads, so the numbers depend neither on their number nor on the batch.
"""

from __future__ import annotations

from typing import Any

from glassllama.engine.attention import attend_heads, place_all, prepare_mixed
from glassllama.engine.compiled import compiled, entry, inlined
from glassllama.engine.elementwise import BLOCK, add, gate
from glassllama.engine.intrinsics import atomic_load, floats
from glassllama.engine.layer_ops import (
    Step,
    convert,
    field,
    inputs_of,
    inputs_of_down,
    multiply,
    prepare_norms,
    row,
)
from glassllama.engine.layout import WIDE
from glassllama.engine.quantize_activations import SUPERBLOCK
from glassllama.engine.thread_pool import (
    ORDERS,
    STOP,
    YIELD,
    Member,
    announce,
    complete,
    next_epoch,
    take,
)
from glassllama.engine.workspace import (
    DOWN,
    GATE,
    GROUPS,
    LANES,
    MATRICES,
    READS,
    UP,
    WK,
    WO,
    WQ,
    WV,
)

# Phases of a layer; after the last layer come the two of the logits.
NORM, QKV, PLACE, HEADS, MERGE, OUT, FFN_NORM, HIDDEN, DOWNWARD = range(9)
PHASES = 9
LOGITS_PHASES = 2

FEW_GROUPS = 4  # no smaller piece of a matrix is worth a trip to the board
MORE_GROUPS = 8  # where many tokens' inputs, in two digits, come from afar for every piece


@compiled
def project(me: Any, phase: int, room: Any, layer: int, slot: int, step: Any) -> None:
    """Queries, keys and values of all tokens: three matrices whose groups count through."""
    m = layer * MATRICES
    wk = field(room, m + WQ, GROUPS)
    wv = wk + field(room, m + WK, GROUPS)
    groups = wv + field(room, m + WV, GROUPS)
    starts = (0, wk, wv, groups)
    first, last = take(me, phase, groups, FEW_GROUPS)
    mine = 0
    while first < last:
        for n in range(3):
            low, high = max(first, starts[n]), min(last, starts[n + 1])
            if low < high:
                some = (low - starts[n], high - starts[n])
                out = room.qkv + starts[n] * LANES * 4
                width = room.qkv_width
                multiply(room, m + n, inputs_of(room), slot, step.tokens, some, out, width)
        mine += last - first
        first, last = take(me, phase, groups, FEW_GROUPS)
    complete(me, phase, groups, mine)


@compiled
def add_product(
    me: Any, phase: int, room: Any, matrix: int, inputs: Any, slot: int, step: Any
) -> None:
    """x += matrix · inputs, at all tokens."""
    groups, width, few = field(room, matrix, GROUPS), room.added_width, FEW_GROUPS
    if step.tokens > 1 and field(room, matrix, READS) == WIDE:
        few = MORE_GROUPS
    first, last = take(me, phase, groups, few)
    mine = 0
    while first < last:
        multiply(room, matrix, inputs, slot, step.tokens, (first, last), room.added, width)
        start, count = first * LANES * 4, min(last * LANES, room.dim) - first * LANES
        for t in range(step.tokens):
            x = floats(room.x + t * room.dim * 4 + start, count)
            add(x, floats(room.added + t * width * 4 + start, count))
        mine += last - first
        first, last = take(me, phase, groups, few)
    complete(me, phase, groups, mine)


@inlined
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
        convert(field(room, m + DOWN, READS), down, t, numbers, first, last)


@compiled
def gate_all(me: Any, phase: int, room: Any, layer: int, slot: int, step: Any) -> None:
    """`gate_groups` for all groups: as many at a time as make a block of `down`'s inputs."""
    m = layer * MATRICES
    groups, beside = field(room, m + GATE, GROUPS), BLOCK // LANES
    if field(room, m + DOWN, READS) & WIDE:
        beside = SUPERBLOCK // LANES
    items, few = (groups + beside - 1) // beside, max(1, FEW_GROUPS // beside)
    first, last = take(me, phase, items, few)
    mine = 0
    while first < last:
        gate_groups(room, layer, slot, step, (first * beside, min(last * beside, groups)))
        mine += last - first
        first, last = take(me, phase, items, few)
    complete(me, phase, items, mine)


@inlined
def attention(me: Any, room: Any, layer: int, step: Any) -> None:
    """x += wo · heads(norm(x))."""
    m, phase = layer * MATRICES, layer * PHASES
    reads = field(room, m + WQ, READS) | field(room, m + WK, READS)
    reads |= field(room, m + WV, READS)
    slot = prepare_norms(me, phase + NORM, room, 2 * layer, reads, room.everyone, step.tokens)
    project(me, phase + QKV, room, layer, slot, step)
    place_all(me, phase + PLACE, room, layer, step)
    attend_heads(me, phase + HEADS, room, layer, step)
    slot = prepare_mixed(me, phase + MERGE, room, field(room, m + WO, READS), step)
    add_product(me, phase + OUT, room, m + WO, inputs_of(room), slot, step)


@inlined
def feed_forward(me: Any, room: Any, layer: int, step: Any) -> None:
    """x += down · (silu(gate · norm(x)) · (up · norm(x)))."""
    m, phase = layer * MATRICES, layer * PHASES
    reads = field(room, m + GATE, READS) | field(room, m + UP, READS)
    slot = prepare_norms(
        me, phase + FFN_NORM, room, 2 * layer + 1, reads, room.everyone, step.tokens
    )
    gate_all(me, phase + HIDDEN, room, layer, slot, step)
    add_product(me, phase + DOWNWARD, room, m + DOWN, inputs_of_down(room), 0, step)


@inlined
def output(me: Any, room: Any, step: Any) -> None:
    """Logits of the wanted tokens: output · norm(x)."""
    layers = room.layers
    m, phase = layers * MATRICES, layers * PHASES
    reads, groups = field(room, m, READS), field(room, m, GROUPS)
    slot = prepare_norms(me, phase, room, 2 * layers, reads, room.wanted, step.wanted)
    inputs, width = inputs_of(room), groups * LANES
    first, last = take(me, phase + 1, groups, FEW_GROUPS)
    mine = 0
    while first < last:
        multiply(room, m, inputs, slot, step.wanted, (first, last), step.logits, width)
        mine += last - first
        first, last = take(me, phase + 1, groups, FEW_GROUPS)
    complete(me, phase + 1, groups, mine)


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
    thread: int, threads: int, board: int, first_phase: int, words: int, epoch: int, room: Any
) -> None:
    """One thread's part of the step on the board, unless that is over already."""
    orders = board + ORDERS * 8
    step = Step(
        atomic_load(orders), atomic_load(orders + 8), atomic_load(orders + 16),
        atomic_load(orders + 24), atomic_load(orders + 32), atomic_load(orders + 40),
        atomic_load(orders + 48), atomic_load(orders + 56), atomic_load(orders + 64),
        atomic_load(orders + 72),
    )  # fmt: skip
    if atomic_load(board) == epoch:
        offer = atomic_load(board + YIELD * 8)
        me = Member(thread, threads, board + first_phase * 8, words, epoch, offer)
        forward(me, room, step)


@entry
def serve(
    thread: int, threads: int, board: int, first_phase: int, words: int, orders: Any, room: Any
) -> None:
    """Thread 0, the caller: one step, from its announcement to its end; `orders` are Step's fields.
    Other threads: their part in all steps, until they are let go.
    """
    epoch = 0
    while thread == 0 or atomic_load(board + STOP * 8) == 0:
        if thread == 0:
            epoch = announce(board, threads, first_phase, words, orders)
        else:
            epoch = next_epoch(board, thread, epoch)
        take_part(thread, threads, board, first_phase, words, epoch, room)
        if thread == 0:
            break
