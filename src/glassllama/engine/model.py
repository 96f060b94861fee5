"""One step of a Llama, as every thread of the crew runs it: from embeddings to logits.

Read it from the bottom up, `forward` first: it is the forward pass. Tokens of all rows of a batch
stand in one list; each knows its row and its position. Every part of a layer is a phase whose items
the threads share out (crew.py): groups of sixteen rows of a matrix, tokens, or heads. No sum is
ever split between threads, so the numbers depend neither on their number nor on the batch.

Shapes: N tokens of this step, C model width, H query heads, K kv heads, D head width, F ffn width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from glassllama.engine.attention import PAGE, attend, finish, merge, place, store
from glassllama.engine.compiled import compiled
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
from glassllama.engine.intrinsics import atomic_load, call_kernel, integers64
from glassllama.engine.rows import BLOCK, add, encode, gate, normalise

# Matrices of a layer in the plan's table, and the columns of that table.
WQ, WK, WV, WO, GATE, UP, DOWN = range(7)
MATRICES = 7
KERNEL, VALUES, SCALES, BLOCKS, GROUPS, INTEGERS = range(6)
FIELDS = 6
LANES = 16  # rows of a group
PAIR = BLOCK // LANES  # groups that make a block of the next matrix's inputs

# Phases of a layer; after the last layer come the two of the logits.
NORM, QKV, PLACE, HEADS, MERGE, OUT, FFN_NORM, HIDDEN, DOWNWARD = range(9)
PHASES = 9
LOGITS_PHASES = 2

SPAN = 4 * PAGE  # tokens of one item of attention: long contexts are shared between threads
FEW_GROUPS = 4  # no smaller piece of a matrix is worth a trip to the board


class Shape(NamedTuple):
    """A model's sizes, as compiled code wants them."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    group_size: int
    pairs: bool
    qk_norm: bool
    eps: float


class Plan(NamedTuple):
    """What stays the same from step to step."""

    shape: Shape
    matrices: Any  # (7·layers + 1, FIELDS) int64: where each packed matrix is, and its kernel
    norms: Any  # (2·layers + 1, C) float32


class Inputs(NamedTuple):
    """Rows that go into a matrix, as numbers and, where a matrix wants them, as int8."""

    numbers: Any  # (slots, width) float32
    codes: Any  # (slots, width) int8
    factors: Any  # (slots, blocks, 2) float32


class Work(NamedTuple):
    """Room for the numbers of a step; N at most the number of slots."""

    x: Any  # (N, C) float32, the residual stream: embeddings at first
    rows: Any  # (N,) int64, of the batch
    positions: Any  # (N,) int64
    cos: Any  # (N, D/2) float32
    sin: Any
    everyone: Any  # (N,) int64: 0, 1, …
    wanted: Any  # (N,) int64, tokens whose logits are wanted
    logits: Any  # (N, padded V) float32
    inputs: Inputs  # of the matrices that read C or H·D numbers
    hidden_inputs: Inputs  # of `down`
    qkv: Any  # (N, padded H·D + K·D + K·D) float32
    mixed: Any  # (N, H·D) float32: what the heads saw
    merged: Any  # the same, where spans were shared
    added: Any  # (N, padded C) float32: what a layer adds to the residual stream
    hidden: Any  # (N, 2 · padded F) float32: gates, then ups
    scores: Any  # (threads, PAGE) float32
    part: Any  # (threads, 2, D + 2) float32: see attention.attend
    parts: Any  # (items, D + 2) float32: one for each span that is looked at


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


@compiled
def multiply(
    plan: Any, matrix: int, inputs: Any, slot: int, tokens: int, groups: Any, out: Any, column: int
) -> None:
    """Groups (first, last + 1) of a matrix times the inputs from `slot` on -> columns of `out`."""
    m = plan.matrices[matrix]
    if m[INTEGERS]:
        address, stride = inputs.codes.ctypes.data, inputs.codes.strides[0]
    else:
        address, stride = inputs.numbers.ctypes.data, inputs.numbers.strides[0]
    factors, factor_stride = inputs.factors.ctypes.data, inputs.factors.strides[0]
    arguments = (
        m[VALUES], m[SCALES], m[BLOCKS], np.int64(address + slot * stride), np.int64(stride),
        np.int64(factors + slot * factor_stride), np.int64(factor_stride),
        np.int64(tokens), np.int64(out.ctypes.data + 4 * column), np.int64(out.strides[0]),
        np.int64(groups[0]), np.int64(groups[1]),
    )  # fmt: skip
    call_kernel(m[KERNEL], arguments)


@compiled
def multiply_in_turn(
    plan: Any, first: int, count: int, inputs: Any, slot: int, tokens: int, groups: Any, out: Any
) -> None:
    """As `multiply`, for several matrices whose outputs lie side by side: groups count through."""
    before = 0
    for matrix in range(first, first + count):
        size = plan.matrices[matrix, GROUPS]
        low, high = max(groups[0] - before, 0), min(groups[1] - before, size)
        if low < high:
            multiply(plan, matrix, inputs, slot, tokens, (low, high), out, before * LANES)
        before += size


@compiled
def want_integers(plan: Any, first: int, count: int) -> Any:
    """Whether one of some matrices reads int8."""
    return plan.matrices[first : first + count, INTEGERS].max() > 0


@compiled
def encode_row(inputs: Any, slot: int, numbers: Any, first: int, last: int, integers: Any) -> None:
    """Columns first … last-1 of a row become inputs: as numbers, and as int8 if wanted."""
    for i in range(first, last):
        inputs.numbers[slot, i] = numbers[i]
    if integers:
        encode(numbers, first // BLOCK, last // BLOCK, inputs.codes[slot], inputs.factors[slot])


@compiled
def norm_row(plan: Any, norm: int, x: Any, integers: Any, inputs: Any, slot: int) -> None:
    """RMSNorm of one row of the residual stream becomes inputs."""
    numbers = inputs.numbers[slot, : len(x)]
    normalise(x, plan.norms[norm], plan.shape.eps, numbers)
    if integers:
        encode(numbers, 0, len(x) // BLOCK, inputs.codes[slot], inputs.factors[slot])


@compiled
def prepare_norms(
    me: Any, phase: int, plan: Any, norm: int, integers: Any, work: Any, tokens: Any
) -> Any:
    """RMSNorm at some tokens -> slot of the first one's inputs.

    A single token's inputs are made by every thread for itself: cheaper than to wait for one.
    """
    count = len(tokens)
    if count == 1:
        norm_row(plan, norm, work.x[tokens[0]], integers, work.inputs, me.thread)
        return me.thread
    first, last = take(me, phase, count, 1)
    while first < last:
        for t in range(first, last):
            norm_row(plan, norm, work.x[tokens[t]], integers, work.inputs, t)
        done(me, phase, last - first)
        first, last = take(me, phase, count, 1)
    complete(me, phase, count)
    return 0


@compiled
def project(me: Any, phase: int, plan: Any, layer: int, slot: int, work: Any, step: Any) -> None:
    """Queries, keys and values of all tokens."""
    m = layer * MATRICES + WQ
    groups = plan.matrices[m : m + 3, GROUPS].sum()
    first, last = take(me, phase, groups, FEW_GROUPS)
    while first < last:
        multiply_in_turn(plan, m, 3, work.inputs, slot, step.tokens, (first, last), work.qkv)
        done(me, phase, last - first)
        first, last = take(me, phase, groups, FEW_GROUPS)
    complete(me, phase, groups)


@compiled
def page_offsets(shape: Any, layer: int, kv_head: int, wide: int) -> Any:
    """Bytes from a page's start to the keys and to the values of one layer and kv head."""
    head_bytes = shape.head_dim * PAGE * (4 if wide else 2)
    keys = (layer * shape.kv_heads + kv_head) * head_bytes
    return keys, keys + shape.layers * shape.kv_heads * head_bytes


@compiled
def row_pages(work: Any, step: Any, t: int) -> Any:
    """Addresses of the pages of a token's row."""
    return integers64(step.table + work.rows[t] * step.pages * 8, step.pages)


@compiled
def place_token(plan: Any, layer: int, work: Any, step: Any, t: int) -> None:
    """Turn a token's queries and keys by its position; keys and values go into the cache."""
    s, m = plan.shape, layer * MATRICES
    start_k = plan.matrices[m + WQ, GROUPS] * LANES
    start_v = start_k + plan.matrices[m + WK, GROUPS] * LANES
    for head in range(s.heads):
        query = work.qkv[t, head * s.head_dim : (head + 1) * s.head_dim]
        place(query, work.cos[t], work.sin[t], s.pairs, s.qk_norm, s.eps)
    position = work.positions[t]
    page = row_pages(work, step, t)[position // PAGE]
    for head in range(s.kv_heads):
        key = work.qkv[t, start_k + head * s.head_dim : start_k + (head + 1) * s.head_dim]
        value = work.qkv[t, start_v + head * s.head_dim : start_v + (head + 1) * s.head_dim]
        place(key, work.cos[t], work.sin[t], s.pairs, s.qk_norm, s.eps)
        keys, values = page_offsets(s, layer, head, step.wide)
        store(key, value, page + keys, page + values, position % PAGE, step.wide != 0)


@compiled
def place_all(me: Any, phase: int, plan: Any, layer: int, work: Any, step: Any) -> None:
    """`place_token` for all tokens."""
    first, last = take(me, phase, step.tokens, 1)
    while first < last:
        for t in range(first, last):
            place_token(plan, layer, work, step, t)
        done(me, phase, last - first)
        first, last = take(me, phase, step.tokens, 1)
    complete(me, phase, step.tokens)


@compiled
def look(
    me: Any, plan: Any, layer: int, work: Any, step: Any, t: int, head: int, span: int, part: Any
) -> None:
    """A query head looks at one span of its row."""
    s = plan.shape
    keys, values = page_offsets(s, layer, head // s.group_size, step.wide)
    query = work.qkv[t, head * s.head_dim : (head + 1) * s.head_dim]
    last = min((span + 1) * SPAN, work.positions[t] + 1)
    pages, scores = row_pages(work, step, t), work.scores[me.thread]
    attend(query, pages, span * SPAN, last, keys, values, step.wide != 0, scores, part)


@compiled
def look_at_all(me: Any, plan: Any, layer: int, work: Any, step: Any, t: int, head: int) -> None:
    """A query head looks at its row, span after span -> `mixed`."""
    s = plan.shape
    whole, part = work.part[me.thread, 0], work.part[me.thread, 1]
    look(me, plan, layer, work, step, t, head, 0, whole)
    for span in range(1, work.positions[t] // SPAN + 1):
        look(me, plan, layer, work, step, t, head, span, part)
        merge(whole, part)
    finish(whole, work.mixed[t, head * s.head_dim : (head + 1) * s.head_dim])


@compiled
def spans_shared(plan: Any, work: Any, step: Any) -> Any:
    """Whether there are few enough spans to keep each one's result: then threads share them."""
    return step.spans > 1 and step.tokens * plan.shape.heads * step.spans <= len(work.parts)


@compiled
def attend_heads(me: Any, phase: int, plan: Any, layer: int, work: Any, step: Any) -> None:
    """Every query head of every token looks at its row's keys up to its own position."""
    heads = plan.shape.heads
    spans = step.spans if spans_shared(plan, work, step) else 1
    items = step.tokens * heads * spans
    first, last = take(me, phase, items, 1)
    while first < last:
        for item in range(first, last):
            t, head, span = item // (heads * spans), item // spans % heads, item % spans
            if spans == 1:
                look_at_all(me, plan, layer, work, step, t, head)
            elif span * SPAN <= work.positions[t]:
                look(me, plan, layer, work, step, t, head, span, work.parts[item])
        done(me, phase, last - first)
        first, last = take(me, phase, items, 1)
    complete(me, phase, items)


@compiled
def merge_token(me: Any, plan: Any, work: Any, step: Any, t: int, integers: Any, slot: int) -> None:
    """What a token's heads saw becomes inputs; results of shared spans are merged before."""
    s = plan.shape
    width, seen = s.heads * s.head_dim, work.mixed[t]
    if spans_shared(plan, work, step):
        seen, whole = work.merged[slot], work.part[me.thread, 0]
        spans = min(work.positions[t] // SPAN + 1, step.spans)
        for head in range(s.heads):
            first = (t * s.heads + head) * step.spans
            whole[:] = work.parts[first]
            for span in range(1, spans):
                merge(whole, work.parts[first + span])
            finish(whole, seen[head * s.head_dim : (head + 1) * s.head_dim])
    encode_row(work.inputs, slot, seen, 0, width, integers)


@compiled
def prepare_mixed(me: Any, phase: int, plan: Any, integers: Any, work: Any, step: Any) -> Any:
    """What the heads saw becomes inputs -> slot of the first token's: see `prepare_norms`."""
    if step.tokens == 1:
        merge_token(me, plan, work, step, 0, integers, me.thread)
        return me.thread
    first, last = take(me, phase, step.tokens, 1)
    while first < last:
        for t in range(first, last):
            merge_token(me, plan, work, step, t, integers, t)
        done(me, phase, last - first)
        first, last = take(me, phase, step.tokens, 1)
    complete(me, phase, step.tokens)
    return 0


@compiled
def add_product(
    me: Any, phase: int, plan: Any, matrix: int, inputs: Any, slot: int, work: Any, step: Any
) -> None:
    """x += matrix · inputs, at all tokens."""
    groups, width = plan.matrices[matrix, GROUPS], work.x.shape[1]
    first, last = take(me, phase, groups, FEW_GROUPS)
    while first < last:
        multiply(plan, matrix, inputs, slot, step.tokens, (first, last), work.added, 0)
        low, high = first * LANES, min(last * LANES, width)
        for t in range(step.tokens):
            add(work.x[t, low:high], work.added[t, low:high])
        done(me, phase, last - first)
        first, last = take(me, phase, groups, FEW_GROUPS)
    complete(me, phase, groups)


@compiled
def gate_groups(
    plan: Any, layer: int, slot: int, work: Any, step: Any, groups: Any, width: int, integers: Any
) -> None:
    """Some groups of gate and up, SwiGLU between them, and what comes out made inputs of `down`."""
    m = layer * MATRICES
    ups = plan.matrices[m + GATE, GROUPS] * LANES
    multiply(plan, m + GATE, work.inputs, slot, step.tokens, groups, work.hidden, 0)
    multiply(plan, m + UP, work.inputs, slot, step.tokens, groups, work.hidden, ups)
    first, last = groups[0] * LANES, min(groups[1] * LANES, width)
    for t in range(step.tokens):
        hidden = work.hidden[t]
        gate(hidden[first:last], hidden[ups + first : ups + last])
        encode_row(work.hidden_inputs, t, hidden, first, last, integers)


@compiled
def gate_all(me: Any, phase: int, plan: Any, layer: int, slot: int, work: Any, step: Any) -> None:
    """`gate_groups` for all groups, two at a time: a block of 32 inputs of `down`."""
    m = layer * MATRICES
    groups, down = plan.matrices[m + GATE, GROUPS], plan.matrices[m + DOWN]
    integers = down[INTEGERS]
    width = down[BLOCKS] * (BLOCK if integers else 1)
    pairs = (groups + PAIR - 1) // PAIR
    first, last = take(me, phase, pairs, FEW_GROUPS // PAIR)
    while first < last:
        some = (first * PAIR, min(last * PAIR, groups))
        gate_groups(plan, layer, slot, work, step, some, width, integers)
        done(me, phase, last - first)
        first, last = take(me, phase, pairs, FEW_GROUPS // PAIR)
    complete(me, phase, pairs)


@compiled
def attention(me: Any, plan: Any, layer: int, work: Any, step: Any, tokens: Any) -> None:
    """x += wo · heads(norm(x))."""
    m, phase = layer * MATRICES, layer * PHASES
    integers = want_integers(plan, m + WQ, 3)
    slot = prepare_norms(me, phase + NORM, plan, 2 * layer, integers, work, tokens)
    project(me, phase + QKV, plan, layer, slot, work, step)
    place_all(me, phase + PLACE, plan, layer, work, step)
    attend_heads(me, phase + HEADS, plan, layer, work, step)
    slot = prepare_mixed(me, phase + MERGE, plan, want_integers(plan, m + WO, 1), work, step)
    add_product(me, phase + OUT, plan, m + WO, work.inputs, slot, work, step)


@compiled
def feed_forward(me: Any, plan: Any, layer: int, work: Any, step: Any, tokens: Any) -> None:
    """x += down · (silu(gate · norm(x)) · (up · norm(x)))."""
    m, phase = layer * MATRICES, layer * PHASES
    integers = want_integers(plan, m + GATE, 2)
    slot = prepare_norms(me, phase + FFN_NORM, plan, 2 * layer + 1, integers, work, tokens)
    gate_all(me, phase + HIDDEN, plan, layer, slot, work, step)
    add_product(me, phase + DOWNWARD, plan, m + DOWN, work.hidden_inputs, 0, work, step)


@compiled
def output(me: Any, plan: Any, work: Any, step: Any) -> None:
    """Logits of the wanted tokens: output · norm(x)."""
    layers = plan.shape.layers
    m, phase = layers * MATRICES, layers * PHASES
    tokens, groups = work.wanted[: step.wanted], plan.matrices[m, GROUPS]
    slot = prepare_norms(me, phase, plan, 2 * layers, want_integers(plan, m, 1), work, tokens)
    first, last = take(me, phase + 1, groups, FEW_GROUPS)
    while first < last:
        multiply(plan, m, work.inputs, slot, step.wanted, (first, last), work.logits, 0)
        done(me, phase + 1, last - first)
        first, last = take(me, phase + 1, groups, FEW_GROUPS)
    complete(me, phase + 1, groups)


@compiled
def forward(me: Any, plan: Any, work: Any, step: Any) -> None:
    """Layers first … last-1 for all tokens of the step, and the logits after the last layer."""
    everyone = work.everyone[: step.tokens]
    for layer in range(step.first, step.last):
        attention(me, plan, layer, work, step, everyone)
        feed_forward(me, plan, layer, work, step, everyone)
    if step.last == plan.shape.layers and step.wanted > 0:
        output(me, plan, work, step)


@compiled
def take_part(
    thread: int, threads: int, board: Any, first_phase: int, epoch: int, plan: Any, work: Any
) -> None:
    """One thread's part of the step on the board, unless that is over already."""
    base = board.ctypes.data
    orders = base + ORDERS * 8
    step = Step(
        atomic_load(orders), atomic_load(orders + 8), atomic_load(orders + 16),
        atomic_load(orders + 24), atomic_load(orders + 32), atomic_load(orders + 40),
        atomic_load(orders + 48), atomic_load(orders + 56),
    )  # fmt: skip
    if atomic_load(base) == epoch:
        me = Member(thread, threads, base + first_phase * 8, epoch, board[YIELD])
        forward(me, plan, work, step)


@compiled
def serve(
    thread: int, threads: int, board: Any, first_phase: int, epoch: int, plan: Any, work: Any
) -> int:
    """A crew thread's life between two sleeps -> the last epoch it has seen."""
    while board[STOP] == 0:
        following = next_epoch(board, thread, epoch)
        if following < 0:
            break
        epoch = following
        take_part(thread, threads, board, first_phase, epoch, plan, work)
    return epoch
