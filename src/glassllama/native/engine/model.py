"""One forward step of a decoder, as every thread of the pool runs it: from embeddings to logits.

Read it from the bottom up: `forward` is the forward pass. The tokens of all sequences of a batch
stand in one list; each has its sequence and position. Every part of a layer is a phase whose work
items the threads share (thread_pool.py): groups of sixteen rows of a matrix, tokens, or heads. No
sum is ever split between threads, so the results depend neither on their number nor on the batch.

What a layer computes is in the tables of the layer plan (workspace.py). It is looked up once for a
phase or a row, never for a number; a phase that a model does not need costs no synchronization.

Letters: C model width, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from glassllama.native.engine import workspace as ws
from glassllama.native.engine.attention import attend, prepare_outputs, rope_and_store_all
from glassllama.native.engine.elementwise import add_scaled_to, add_to, geglu, scale_and_cap, swiglu
from glassllama.native.engine.layer_ops import (
    Step,
    add_bias,
    add_normed,
    inputs_of,
    inputs_of_down,
    layer_field,
    layer_number,
    matrix_field,
    multiply,
    norm_rows,
    quantize_inputs,
    row,
    token_fields,
)
from glassllama.native.engine.layout import BLOCK, IN_Q11, SUPERBLOCK
from glassllama.native.engine.thread_pool import (
    STEP_ARGS,
    STOP,
    YIELD,
    Worker,
    begin_step,
    next_epoch,
    parallel_for,
)
from glassllama.native.jit.compile import compiled, entry, inlined
from glassllama.native.jit.intrinsics import atomic_load, call_kernel, floats, integers64

# The phases of a layer. After the last layer come the two phases of the logits.
(
    NORM, QKV, ROPE, ATTENTION, ATTENTION_OUT, WO_PROJECTION, ATTENTION_POST,
    FFN_NORM, GATE_UP, DOWN_PROJECTION, FFN_POST,
) = range(11)  # fmt: skip
PHASES = 11
LOGITS_PHASES = 2

MIN_GROUPS = 4  # a smaller piece of a matrix is not worth a claim
MIN_GROUPS_Q11 = 8  # for many tokens with Q11 inputs, which every piece reads from far caches


# --- before a step --------------------------------------------------------------------------------


@compiled
def embed(workspace: Any, t: int) -> None:
    """Copy the embedding of token t into x[t] (C,), unless its row is there already."""
    if token_fields(workspace, t)[ws.TOKEN_ID] < 0:
        return
    m = workspace.layers * ws.MATRICES + 1
    arguments = (
        matrix_field(workspace, m, ws.VALUES), matrix_field(workspace, m, ws.SCALES),
        matrix_field(workspace, m, ws.BLOCKS), token_fields(workspace, t)[ws.TOKEN_ID],
        workspace.x + t * workspace.dim * 4,
    )  # fmt: skip
    call_kernel(matrix_field(workspace, m, ws.KERNEL), arguments)
    if workspace.embedding_multiplier != 1:
        x = row(workspace.x, t, workspace.dim)
        scale_and_cap(x, workspace.embedding_multiplier, np.float32(0))


@compiled
def compute_angles(workspace: Any, t: int) -> None:
    """Cosine and sine of position · frequency, for each pair of a head's coordinates: (D/2,).

    For each different RoPE of the model's layers.
    """
    half, position = workspace.head_dim // 2, np.float32(token_fields(workspace, t)[ws.POSITION])
    for table in range(workspace.rope_tables):
        frequencies = row(workspace.frequencies, table, half)
        factor = floats(workspace.rope_factors + table * 4, 1)[0]
        t_of_table = table * workspace.max_tokens + t
        cos, sin = row(workspace.cos, t_of_table, half), row(workspace.sin, t_of_table, half)
        for i in range(half):
            angle = position * frequencies[i]
            cos[i] = math.cos(angle) * factor
            sin[i] = math.sin(angle) * factor


@compiled
def make_tiles(workspace: Any, num_tokens: int) -> Any:
    """Group tokens that attend together into tiles -> how many tiles.

    A tile is up to TILE consecutive tokens of one sequence.
    """
    first = integers64(workspace.tile_first, num_tokens)
    count = integers64(workspace.tile_count, num_tokens)
    tiles = 0
    for t in range(num_tokens):
        fits = tiles > 0 and count[tiles - 1] < ws.TILE
        sequence = token_fields(workspace, t)[ws.SEQUENCE]
        if fits and sequence == token_fields(workspace, t - 1)[ws.SEQUENCE]:
            count[tiles - 1] += 1
        else:
            first[tiles], count[tiles] = t, 1
            tiles += 1
    return tiles


@entry
def prepare_step(workspace: Any, num_tokens: int) -> Any:
    """Fill the buffers that a step reads, from the table `tokens` -> how many tiles."""
    for t in range(num_tokens):
        embed(workspace, t)
        compute_angles(workspace, t)
    return make_tiles(workspace, num_tokens)


# --- the phases of a layer ------------------------------------------------------------------------


@compiled
def project_qkv(
    first: int, last: int, workspace: Any, layer: int, first_row: int, step: Any
) -> None:
    """Some groups of queries, keys and values of all tokens: three matrices, counted through."""
    m = layer * ws.MATRICES
    wk = matrix_field(workspace, m + ws.WQ, ws.GROUPS)
    wv = wk + matrix_field(workspace, m + ws.WK, ws.GROUPS)
    starts = (0, wk, wv, wv + matrix_field(workspace, m + ws.WV, ws.GROUPS))
    inputs, width = inputs_of(workspace), workspace.qkv_width
    for n in range(3):
        low, high = max(first, starts[n]), min(last, starts[n + 1])
        if low < high:
            some, out = (
                (low - starts[n], high - starts[n]),
                workspace.qkv + starts[n] * ws.LANES * 4,
            )
            multiply(workspace, m + n, inputs, first_row, step.num_tokens, some, out, width)
    bias = layer_field(workspace, layer, ws.QKV_BIAS)
    if bias != 0:
        add_bias(bias, workspace.qkv, width, step.num_tokens, first * ws.LANES, last * ws.LANES)


@compiled
def project_groups(
    first: int, last: int, workspace: Any, matrix: int, inputs: Any, first_row: int, step: Any,
    bias: int, adds: bool, multiplier: float,
) -> None:  # fmt: skip
    """Some groups of matrix · inputs + bias, for all tokens; added to x if `adds`."""
    some, out, width = (first, last), workspace.proj_out, workspace.proj_out_width
    multiply(workspace, matrix, inputs, first_row, step.num_tokens, some, out, width)
    if bias != 0:
        add_bias(bias, out, width, step.num_tokens, first * ws.LANES, last * ws.LANES)
    if adds:
        start, count = first * ws.LANES * 4, min(last * ws.LANES, workspace.dim) - first * ws.LANES
        for t in range(step.num_tokens):
            x = floats(workspace.x + t * workspace.dim * 4 + start, count)
            added = floats(out + t * width * 4 + start, count)
            if multiplier == 1:
                add_to(x, added)
            else:
                add_scaled_to(x, added, multiplier)


@compiled
def add_projection(
    worker: Any, phase: int, workspace: Any, layer: int, m: int, inputs: Any, first_row: int,
    step: Any, bias: int, post_norm: int,
) -> None:  # fmt: skip
    """x += multiplier · norm(matrix m of the layer · inputs + bias), for all tokens.

    Without a norm (address 0) each thread adds what it has computed; with one, the next phase does.
    """
    matrix, multiplier = layer * ws.MATRICES + m, layer_number(workspace, layer, ws.RESIDUAL)
    groups, min_groups = matrix_field(workspace, matrix, ws.GROUPS), MIN_GROUPS
    if step.num_tokens > 1 and matrix_field(workspace, matrix, ws.INPUT_FORMAT) == IN_Q11:
        min_groups = MIN_GROUPS_Q11
    arguments = (
        workspace, matrix, inputs, first_row, step, bias, post_norm == 0, multiplier,
    )  # fmt: skip
    parallel_for(worker, phase, groups, min_groups, project_groups, arguments)
    add_normed(worker, phase + 1, workspace, post_norm, multiplier, step.num_tokens)


@compiled
def gate_up_items(
    first: int, last: int, workspace: Any, layer: int, first_row: int, step: Any, per_item: int
) -> None:
    """Some groups of gate and up, then the activation, whose results become inputs of `down`."""
    m, inputs, down = layer * ws.MATRICES, inputs_of(workspace), inputs_of_down(workspace)
    gates, ups = workspace.hidden, workspace.hidden + workspace.hidden_columns * 4
    width, count = 2 * workspace.hidden_columns, step.num_tokens
    groups = (
        first * per_item,
        min(last * per_item, matrix_field(workspace, m + ws.GATE, ws.GROUPS)),
    )
    multiply(workspace, m + ws.GATE, inputs, first_row, count, groups, gates, width)
    multiply(workspace, m + ws.UP, inputs, first_row, count, groups, ups, width)
    start, stop = groups[0] * ws.LANES, min(groups[1] * ws.LANES, workspace.ffn_dim)
    gate_bias = layer_field(workspace, layer, ws.GATE_BIAS)
    if gate_bias != 0:
        add_bias(gate_bias, gates, width, count, start, stop)
        add_bias(layer_field(workspace, layer, ws.UP_BIAS), ups, width, count, start, stop)
    activation = layer_field(workspace, layer, ws.ACTIVATION)
    for t in range(count):
        numbers = row(down.act_f32, t, down.width)
        if activation == ws.GELU_TANH:
            geglu(row(gates, t, width), row(ups, t, width), start, stop, numbers)
        else:
            swiglu(row(gates, t, width), row(ups, t, width), start, stop, numbers)
        input_format = matrix_field(workspace, m + ws.DOWN, ws.INPUT_FORMAT)
        quantize_inputs(input_format, down, t, numbers, start, stop)


@compiled
def gate_up(worker: Any, phase: int, workspace: Any, layer: int, first_row: int, step: Any) -> None:
    """`gate_up_items` for all groups; one item is as many as make a block of `down`'s inputs."""
    m = layer * ws.MATRICES
    groups, per_item = matrix_field(workspace, m + ws.GATE, ws.GROUPS), BLOCK // ws.LANES
    if matrix_field(workspace, m + ws.DOWN, ws.INPUT_FORMAT) & IN_Q11:
        per_item = SUPERBLOCK // ws.LANES
    items, min_items = (groups + per_item - 1) // per_item, max(1, MIN_GROUPS // per_item)
    arguments = (workspace, layer, first_row, step, per_item)
    parallel_for(worker, phase, items, min_items, gate_up_items, arguments)


@compiled
def output_groups(
    first: int, last: int, workspace: Any, matrix: int, first_row: int, step: Any, width: int
) -> None:
    """Some groups of the logits of the output rows."""
    inputs, some = inputs_of(workspace), (first, last)
    multiply(workspace, matrix, inputs, first_row, step.num_outputs, some, step.logits, width)
    if workspace.logit_multiplier != 1 or workspace.logit_softcap > 0:
        for t in range(step.num_outputs):
            logits = row(step.logits, t, width)[first * ws.LANES : last * ws.LANES]
            scale_and_cap(logits, workspace.logit_multiplier, workspace.logit_softcap)


# --- the forward pass -----------------------------------------------------------------------------


@inlined
def keys_and_values(worker: Any, workspace: Any, layer: int, step: Any) -> None:
    """Queries, keys and values of norm(x); keys and values go into the cache."""
    m, phase = layer * ws.MATRICES, layer * PHASES
    formats = matrix_field(workspace, m + ws.WQ, ws.INPUT_FORMAT)
    formats |= matrix_field(workspace, m + ws.WK, ws.INPUT_FORMAT)
    formats |= matrix_field(workspace, m + ws.WV, ws.INPUT_FORMAT)
    norm, all_rows = layer_field(workspace, layer, ws.PRE_ATTENTION), workspace.all_rows
    first_row = norm_rows(worker, phase + NORM, workspace, norm, formats, all_rows, step.num_tokens)
    groups = matrix_field(workspace, m + ws.WQ, ws.GROUPS) + matrix_field(
        workspace, m + ws.WK, ws.GROUPS
    )
    groups += matrix_field(workspace, m + ws.WV, ws.GROUPS)
    arguments = (workspace, layer, first_row, step)
    parallel_for(worker, phase + QKV, groups, MIN_GROUPS, project_qkv, arguments)
    rope_and_store_all(worker, phase + ROPE, workspace, layer, step)


@inlined
def attention(worker: Any, workspace: Any, layer: int, step: Any) -> None:
    """x += wo · attention(queries, keys and values of the cache)."""
    m, phase = layer * ws.MATRICES, layer * PHASES
    attend(worker, phase + ATTENTION, workspace, layer, step)
    formats = matrix_field(workspace, m + ws.WO, ws.INPUT_FORMAT)
    first_row = prepare_outputs(worker, phase + ATTENTION_OUT, workspace, layer, formats, step)
    inputs, bias = inputs_of(workspace), layer_field(workspace, layer, ws.O_BIAS)
    norm = layer_field(workspace, layer, ws.POST_ATTENTION)
    add_projection(
        worker, phase + WO_PROJECTION, workspace, layer, ws.WO, inputs, first_row, step, bias, norm
    )


@inlined
def feed_forward(worker: Any, workspace: Any, layer: int, step: Any) -> None:
    """x += down · (activation(gate · norm(x)) · (up · norm(x)))."""
    m, phase = layer * ws.MATRICES, layer * PHASES
    formats = matrix_field(workspace, m + ws.GATE, ws.INPUT_FORMAT)
    formats |= matrix_field(workspace, m + ws.UP, ws.INPUT_FORMAT)
    norm, all_rows = layer_field(workspace, layer, ws.PRE_FFN), workspace.all_rows
    first_row = norm_rows(
        worker, phase + FFN_NORM, workspace, norm, formats, all_rows, step.num_tokens
    )
    gate_up(worker, phase + GATE_UP, workspace, layer, first_row, step)
    inputs, bias = inputs_of_down(workspace), layer_field(workspace, layer, ws.DOWN_BIAS)
    norm = layer_field(workspace, layer, ws.POST_FFN)
    add_projection(
        worker, phase + DOWN_PROJECTION, workspace, layer, ws.DOWN, inputs, 0, step, bias, norm
    )


@inlined
def output(worker: Any, workspace: Any, step: Any) -> None:
    """Logits of the output rows: output · norm(x)."""
    m, phase = workspace.layers * ws.MATRICES, workspace.layers * PHASES
    input_format = matrix_field(workspace, m, ws.INPUT_FORMAT)
    groups = matrix_field(workspace, m, ws.GROUPS)
    norm, rows = workspace.last_norm, workspace.output_rows
    first_row = norm_rows(worker, phase, workspace, norm, input_format, rows, step.num_outputs)
    arguments = (workspace, m, first_row, step, groups * ws.LANES)
    parallel_for(worker, phase + 1, groups, MIN_GROUPS, output_groups, arguments)


@inlined
def forward(worker: Any, workspace: Any, step: Any) -> None:
    """Layers first … last-1 for all tokens of the step, and the logits after the last layer."""
    for layer in range(step.first, step.last):
        keys_and_values(worker, workspace, layer, step)
        if step.keys_only:
            continue
        attention(worker, workspace, layer, step)
        feed_forward(worker, workspace, layer, step)
    if step.last == workspace.layers and step.num_outputs > 0:
        output(worker, workspace, step)


@inlined
def run_step(
    thread: int, threads: int, control_block: int, first_phase: int, words: int, epoch: int,
    workspace: Any,
) -> None:  # fmt: skip
    """One thread's part of the step in the control block, unless the step is over already."""
    args = control_block + STEP_ARGS * 8
    step = Step(
        atomic_load(args), atomic_load(args + 8), atomic_load(args + 16), atomic_load(args + 24),
        atomic_load(args + 32), atomic_load(args + 40), atomic_load(args + 48),
        atomic_load(args + 56), atomic_load(args + 64), atomic_load(args + 72),
        atomic_load(args + 80),
    )  # fmt: skip
    if atomic_load(control_block) == epoch:
        yield_address = atomic_load(control_block + YIELD * 8)
        phases = control_block + first_phase * 8
        worker = Worker(thread, threads, phases, words, epoch, yield_address)
        forward(worker, workspace, step)


@entry
def worker_loop(
    thread: int, threads: int, control_block: int, first_phase: int, words: int, step_args: Any,
    workspace: Any,
) -> None:  # fmt: skip
    """Thread 0, the caller: one step, from its announcement to its end; `step_args` is a `Step`.

    Other threads: their part of every step, until the pool is stopped.
    """
    epoch = 0
    while thread == 0 or atomic_load(control_block + STOP * 8) == 0:
        if thread == 0:
            epoch = begin_step(control_block, threads, first_phase, words, step_args)
        else:
            epoch = next_epoch(control_block, thread, epoch)
        run_step(thread, threads, control_block, first_phase, words, epoch, workspace)
        if thread == 0:
            break
