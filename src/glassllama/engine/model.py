"""One step of a Llama, as every thread of the crew runs it: from embeddings to logits.

Read it top to bottom as the forward pass. Tokens of all rows of a batch stand in one list; each
knows its row, its position and where its keys go. Work is split by outputs (groups of sixteen rows
of a matrix) or by tokens, never within a sum: the numbers do not depend on the number of threads,
nor on what else is in the batch.

Shapes: N tokens of this step, C model width, H query heads, K kv heads, D head width, F ffn width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from glassllama.engine.attention import PAGE, attend, place, store
from glassllama.engine.compiled import compiled
from glassllama.engine.intrinsics import call_kernel
from glassllama.engine.rows import BLOCK, add, encode, gate, normalise
from glassllama.engine.threads import barrier

# Matrices of a layer in the plan's table, and the columns of that table.
WQ, WK, WV, WO, GATE, UP, DOWN = range(7)
MATRICES = 7  # of a layer
KERNEL, VALUES, SCALES, BLOCKS, GROUPS, INTEGERS = range(6)
FIELDS = 6
LANES = 16  # rows of a group


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
    """Room for the intermediate numbers of a step."""

    inputs: Inputs
    qkv: Any  # (N, padded H·D + K·D + K·D) float32
    mixed: Any  # (N, H·D) float32: what the heads saw
    added: Any  # (N, padded C) float32: what a layer adds to the residual stream
    hidden: Any  # (N, 2 · padded F) float32: gates, then ups
    scores: Any  # (threads, PAGE) float32


class Job(NamedTuple):
    """What is asked of one step."""

    x: Any  # (N, C) float32, the residual stream: embeddings at first
    rows: Any  # (N,) int64, of the batch
    positions: Any  # (N,) int64
    cos: Any  # (N, D/2) float32
    sin: Any
    table: Any  # (B, pages) int64 addresses of the cache's pages
    wide: bool  # pages of float32 instead of bfloat16
    wanted: Any  # (W,) int64, tokens whose logits are wanted
    logits: Any  # (W, padded V) float32


@compiled
def share(me: Any, items: int) -> Any:
    """This thread's part of some items: first, last + 1."""
    return items * me.thread // me.threads, items * (me.thread + 1) // me.threads


@compiled
def wants_integers(plan: Any, first: int, count: int) -> Any:
    return plan.matrices[first : first + count, INTEGERS].max() > 0


@compiled
def multiply(
    plan: Any, matrix: int, inputs: Any, slot: int, tokens: int, groups: Any, out: Any, column: int
) -> None:
    """Groups (first, last + 1) of a matrix times the inputs from `slot` on -> columns of `out`."""
    m = plan.matrices[matrix]
    if m[INTEGERS]:
        address, stride = inputs.codes[slot:].ctypes.data, inputs.codes.strides[0]
    else:
        address, stride = inputs.numbers[slot:].ctypes.data, inputs.numbers.strides[0]
    arguments = (
        m[VALUES], m[SCALES], m[BLOCKS], np.int64(address), np.int64(stride),
        np.int64(inputs.factors[slot:].ctypes.data), np.int64(inputs.factors.strides[0]),
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
def ready(me: Any, tokens: int) -> None:
    """Meet after inputs were made, unless each thread made its own: see `my_slots`."""
    if tokens > 1:
        barrier(me)


@compiled
def my_slots(me: Any, tokens: int) -> Any:
    """Which tokens' inputs this thread makes -> first, last + 1, and the slot of the first token.

    A single token's inputs are made by every thread for itself: cheaper than to wait for one.
    """
    if tokens == 1:
        return 0, 1, me.thread
    first, last = share(me, tokens)
    return first, last, 0


@compiled
def normed(
    me: Any, plan: Any, norm: int, x: Any, tokens: Any,
    integers: bool, inputs: Any,
) -> int:  # fmt: skip
    """RMSNorm of the residual stream at some tokens -> slot of the first one's inputs."""
    first, last, slot = my_slots(me, len(tokens))
    width = x.shape[1]
    for t in range(first, last):
        numbers = inputs.numbers[slot + t, :width]
        normalise(x[tokens[t]], plan.norms[norm], plan.shape.eps, numbers)
        if integers:
            encode(numbers, 0, width // BLOCK, inputs.codes[slot + t], inputs.factors[slot + t])
    ready(me, len(tokens))
    return slot


@compiled
def encoded(me: Any, rows: Any, width: int, integers: bool, inputs: Any) -> Any:
    """Rows as they are, made inputs -> slot of the first one."""
    first, last, slot = my_slots(me, len(rows))
    for t in range(first, last):
        if integers:
            encode(rows[t], 0, width // BLOCK, inputs.codes[slot + t], inputs.factors[slot + t])
        else:
            inputs.numbers[slot + t, :width] = rows[t, :width]
    ready(me, len(rows))
    return slot


@compiled
def page_offsets(shape: Any, layer: int, kv_head: int, wide: bool) -> Any:
    """Bytes from a page's start to the keys and to the values of one layer and kv head."""
    head_bytes = shape.head_dim * PAGE * (4 if wide else 2)
    keys = (layer * shape.kv_heads + kv_head) * head_bytes
    return keys, keys + shape.layers * shape.kv_heads * head_bytes


@compiled
def place_and_store(me: Any, plan: Any, layer: int, work: Any, job: Any, starts: Any) -> None:
    """Turn queries and keys by their positions; keys and values go into the cache."""
    s = plan.shape
    first, last = share(me, len(job.x) * (s.heads + s.kv_heads))
    for item in range(first, last):
        t, head = item // (s.heads + s.kv_heads), item % (s.heads + s.kv_heads)
        kv = head - s.heads
        start = head * s.head_dim if kv < 0 else starts[1] + kv * s.head_dim
        vector = work.qkv[t, start : start + s.head_dim]
        place(vector, job.cos[t], job.sin[t], s.pairs, s.qk_norm, s.eps)
        if kv >= 0:
            start = starts[2] + kv * s.head_dim
            position = job.positions[t]
            page = job.table[job.rows[t], position // PAGE]
            keys, values = page_offsets(s, layer, kv, job.wide)
            value = work.qkv[t, start : start + s.head_dim]
            store(vector, value, page + keys, page + values, position % PAGE, job.wide)


@compiled
def attend_heads(me: Any, plan: Any, layer: int, work: Any, job: Any) -> None:
    """Every query head of every token looks at its row's keys up to its own position."""
    s = plan.shape
    first, last = share(me, len(job.x) * s.heads)
    for item in range(first, last):
        t, head = item // s.heads, item % s.heads
        span = slice(head * s.head_dim, (head + 1) * s.head_dim)
        keys, values = page_offsets(s, layer, head // s.group_size, job.wide)
        attend(
            work.qkv[t, span], job.table[job.rows[t]], job.positions[t] + 1, keys, values,
            job.wide, work.scores[me.thread], work.mixed[t, span],
        )  # fmt: skip


@compiled
def add_to_stream(x: Any, added: Any, groups: Any) -> None:
    """x += what the matrix's groups computed, at every token."""
    first, last = groups[0] * LANES, min(groups[1] * LANES, x.shape[1])
    for t in range(len(x)):
        add(x[t, first:last], added[t, first:last])


@compiled
def attention(me: Any, plan: Any, layer: int, work: Any, job: Any, tokens: Any) -> None:
    """x += wo · heads(norm(x))."""
    m, count = layer * MATRICES, len(job.x)
    integers = wants_integers(plan, m + WQ, 3)
    slot = normed(me, plan, 2 * layer, job.x, tokens, integers, work.inputs)
    sizes = plan.matrices[m + WQ : m + WV + 1, GROUPS]
    starts = (0, sizes[0] * LANES, (sizes[0] + sizes[1]) * LANES)
    mine = share(me, sizes.sum())
    multiply_in_turn(plan, m + WQ, 3, work.inputs, slot, count, mine, work.qkv)
    barrier(me)
    place_and_store(me, plan, layer, work, job, starts)
    barrier(me)
    attend_heads(me, plan, layer, work, job)
    barrier(me)
    width = plan.shape.heads * plan.shape.head_dim
    integers = wants_integers(plan, m + WO, 1)
    slot = encoded(me, work.mixed[:count], width, integers, work.inputs)
    mine = share(me, plan.matrices[m + WO, GROUPS])
    multiply(plan, m + WO, work.inputs, slot, count, mine, work.added, 0)
    add_to_stream(job.x, work.added, mine)
    barrier(me)


@compiled
def feed_forward(me: Any, plan: Any, layer: int, work: Any, job: Any, tokens: Any) -> None:
    """x += down · (silu(gate · norm(x)) · (up · norm(x)))."""
    m, count = layer * MATRICES, len(job.x)
    integers = wants_integers(plan, m + GATE, 2)
    slot = normed(me, plan, 2 * layer + 1, job.x, tokens, integers, work.inputs)
    groups = plan.matrices[m + GATE, GROUPS]
    mine = share(me, groups)
    ups = groups * LANES
    multiply(plan, m + GATE, work.inputs, slot, count, mine, work.hidden, 0)
    multiply(plan, m + UP, work.inputs, slot, count, mine, work.hidden, ups)
    first, last = mine[0] * LANES, mine[1] * LANES
    for t in range(count):
        gate(work.hidden[t, first:last], work.hidden[t, ups + first : ups + last])
    barrier(me)
    down = plan.matrices[m + DOWN]
    width = down[BLOCKS] * (BLOCK if down[INTEGERS] else 1)
    slot = encoded(me, work.hidden[:count], width, down[INTEGERS] != 0, work.inputs)
    mine = share(me, down[GROUPS])
    multiply(plan, m + DOWN, work.inputs, slot, count, mine, work.added, 0)
    add_to_stream(job.x, work.added, mine)
    barrier(me)


@compiled
def output(me: Any, plan: Any, work: Any, job: Any) -> None:
    """Logits of the wanted tokens: output · norm(x)."""
    m = plan.shape.layers * MATRICES
    integers = wants_integers(plan, m, 1)
    norm = 2 * plan.shape.layers
    slot = normed(me, plan, norm, job.x, job.wanted, integers, work.inputs)
    mine = share(me, plan.matrices[m, GROUPS])
    multiply(plan, m, work.inputs, slot, len(job.wanted), mine, job.logits, 0)


@compiled
def forward(me: Any, first: int, last: int, plan: Any, work: Any, job: Any) -> None:
    """Layers first … last-1 for all tokens of the job, and the logits after the last layer."""
    tokens = np.arange(len(job.x))
    for layer in range(first, last):
        attention(me, plan, layer, work, job, tokens)
        feed_forward(me, plan, layer, work, job, tokens)
    if last == plan.shape.layers and len(job.wanted) > 0:
        output(me, plan, work, job)
