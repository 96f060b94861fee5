"""One forward step of a Llama, as every thread of the pool runs it: from embeddings to logits.

Read it from the bottom up: `forward` is the forward pass. The tokens of all sequences of a batch
stand in one list; each has its sequence and position. Every part of a layer is a phase whose work
items the threads share (thread_pool.py): groups of sixteen rows of a matrix, tokens, or heads. No
sum is ever split between threads, so the results depend neither on their number nor on the batch.
"""

from __future__ import annotations

from typing import Any

from glassllama.native.engine.attention import attend, prepare_outputs, rope_and_store_all
from glassllama.native.engine.elementwise import BLOCK, add_to, swiglu
from glassllama.native.engine.layer_ops import (
    Step,
    inputs_of,
    inputs_of_down,
    matrix_field,
    multiply,
    norm_rows,
    quantize_inputs,
    row,
)
from glassllama.native.engine.layout import Q11
from glassllama.native.engine.quantize_activations import SUPERBLOCK
from glassllama.native.engine.thread_pool import (
    STEP_ARGS,
    STOP,
    YIELD,
    Worker,
    begin_step,
    claim,
    finish_phase,
    next_epoch,
)
from glassllama.native.engine.workspace import (
    DOWN,
    GATE,
    GROUPS,
    INPUT_FORMAT,
    LANES,
    MATRICES,
    UP,
    WK,
    WO,
    WQ,
    WV,
)
from glassllama.native.jit.compile import compiled, entry, inlined
from glassllama.native.jit.intrinsics import atomic_load, floats

# The phases of a layer. After the last layer come the two phases of the logits.
NORM, QKV, ROPE, ATTENTION, ATTENTION_OUT, WO_PROJECTION, FFN_NORM, GATE_UP, DOWN_PROJECTION = (
    range(9)
)
PHASES = 9
LOGITS_PHASES = 2

MIN_GROUPS = 4  # a smaller piece of a matrix is not worth a claim
MIN_GROUPS_Q11 = (
    8  # for many tokens with inputs in 11 bits, which every piece reads from far caches
)


@compiled
def project_qkv(
    worker: Any, phase: int, workspace: Any, layer: int, first_row: int, step: Any
) -> None:
    """Queries, keys and values of all tokens: three matrices whose groups are counted through."""
    m = layer * MATRICES
    wk = matrix_field(workspace, m + WQ, GROUPS)
    wv = wk + matrix_field(workspace, m + WK, GROUPS)
    groups = wv + matrix_field(workspace, m + WV, GROUPS)
    starts = (0, wk, wv, groups)
    first, last = claim(worker, phase, groups, MIN_GROUPS)
    num_done = 0
    while first < last:
        for n in range(3):
            low, high = max(first, starts[n]), min(last, starts[n + 1])
            if low < high:
                some = (low - starts[n], high - starts[n])
                out, width = workspace.qkv + starts[n] * LANES * 4, workspace.qkv_width
                inputs = inputs_of(workspace)
                multiply(workspace, m + n, inputs, first_row, step.num_tokens, some, out, width)
        num_done += last - first
        first, last = claim(worker, phase, groups, MIN_GROUPS)
    finish_phase(worker, phase, groups, num_done)


@compiled
def add_projection(
    worker: Any, phase: int, workspace: Any, matrix: int, inputs: Any, first_row: int, step: Any
) -> None:
    """x += matrix · inputs, for all tokens."""
    groups, width = matrix_field(workspace, matrix, GROUPS), workspace.proj_out_width
    min_groups = MIN_GROUPS
    if step.num_tokens > 1 and matrix_field(workspace, matrix, INPUT_FORMAT) == Q11:
        min_groups = MIN_GROUPS_Q11
    first, last = claim(worker, phase, groups, min_groups)
    num_done = 0
    while first < last:
        some, out = (first, last), workspace.proj_out
        multiply(workspace, matrix, inputs, first_row, step.num_tokens, some, out, width)
        start, count = first * LANES * 4, min(last * LANES, workspace.dim) - first * LANES
        for t in range(step.num_tokens):
            x = floats(workspace.x + t * workspace.dim * 4 + start, count)
            add_to(x, floats(workspace.proj_out + t * width * 4 + start, count))
        num_done += last - first
        first, last = claim(worker, phase, groups, min_groups)
    finish_phase(worker, phase, groups, num_done)


@inlined
def gate_up_groups(workspace: Any, layer: int, first_row: int, step: Any, groups: Any) -> None:
    """Some groups of gate and up, then SwiGLU, whose results become inputs of `down`."""
    m, inputs, down = layer * MATRICES, inputs_of(workspace), inputs_of_down(workspace)
    gates, ups = workspace.hidden, workspace.hidden + workspace.hidden_columns * 4
    width = 2 * workspace.hidden_columns
    multiply(workspace, m + GATE, inputs, first_row, step.num_tokens, groups, gates, width)
    multiply(workspace, m + UP, inputs, first_row, step.num_tokens, groups, ups, width)
    first, last = groups[0] * LANES, min(groups[1] * LANES, workspace.ffn_dim)
    for t in range(step.num_tokens):
        numbers = row(down.act_f32, t, down.width)
        swiglu(row(gates, t, width), row(ups, t, width), first, last, numbers)
        input_format = matrix_field(workspace, m + DOWN, INPUT_FORMAT)
        quantize_inputs(input_format, down, t, numbers, first, last)


@compiled
def gate_up(worker: Any, phase: int, workspace: Any, layer: int, first_row: int, step: Any) -> None:
    """`gate_up_groups` for all groups; one item is as many as make a block of `down`'s inputs."""
    m = layer * MATRICES
    groups, per_item = matrix_field(workspace, m + GATE, GROUPS), BLOCK // LANES
    if matrix_field(workspace, m + DOWN, INPUT_FORMAT) & Q11:
        per_item = SUPERBLOCK // LANES
    items, min_items = (groups + per_item - 1) // per_item, max(1, MIN_GROUPS // per_item)
    first, last = claim(worker, phase, items, min_items)
    num_done = 0
    while first < last:
        some = (first * per_item, min(last * per_item, groups))
        gate_up_groups(workspace, layer, first_row, step, some)
        num_done += last - first
        first, last = claim(worker, phase, items, min_items)
    finish_phase(worker, phase, items, num_done)


@inlined
def attention(worker: Any, workspace: Any, layer: int, step: Any) -> None:
    """x += wo · attention(norm(x))."""
    m, phase = layer * MATRICES, layer * PHASES
    formats = matrix_field(workspace, m + WQ, INPUT_FORMAT)
    formats |= matrix_field(workspace, m + WK, INPUT_FORMAT)
    formats |= matrix_field(workspace, m + WV, INPUT_FORMAT)
    norm, all_rows = 2 * layer, workspace.all_rows
    first_row = norm_rows(worker, phase + NORM, workspace, norm, formats, all_rows, step.num_tokens)
    project_qkv(worker, phase + QKV, workspace, layer, first_row, step)
    rope_and_store_all(worker, phase + ROPE, workspace, layer, step)
    attend(worker, phase + ATTENTION, workspace, layer, step)
    formats = matrix_field(workspace, m + WO, INPUT_FORMAT)
    first_row = prepare_outputs(worker, phase + ATTENTION_OUT, workspace, formats, step)
    inputs = inputs_of(workspace)
    add_projection(worker, phase + WO_PROJECTION, workspace, m + WO, inputs, first_row, step)


@inlined
def feed_forward(worker: Any, workspace: Any, layer: int, step: Any) -> None:
    """x += down · (silu(gate · norm(x)) · (up · norm(x)))."""
    m, phase = layer * MATRICES, layer * PHASES
    formats = matrix_field(workspace, m + GATE, INPUT_FORMAT)
    formats |= matrix_field(workspace, m + UP, INPUT_FORMAT)
    norm, all_rows = 2 * layer + 1, workspace.all_rows
    first_row = norm_rows(
        worker, phase + FFN_NORM, workspace, norm, formats, all_rows, step.num_tokens
    )
    gate_up(worker, phase + GATE_UP, workspace, layer, first_row, step)
    inputs = inputs_of_down(workspace)
    add_projection(worker, phase + DOWN_PROJECTION, workspace, m + DOWN, inputs, 0, step)


@inlined
def output(worker: Any, workspace: Any, step: Any) -> None:
    """Logits of the output rows: output · norm(x)."""
    layers = workspace.layers
    m, phase = layers * MATRICES, layers * PHASES
    input_format = matrix_field(workspace, m, INPUT_FORMAT)
    groups = matrix_field(workspace, m, GROUPS)
    norm, rows = 2 * layers, workspace.output_rows
    first_row = norm_rows(worker, phase, workspace, norm, input_format, rows, step.num_outputs)
    inputs, width = inputs_of(workspace), groups * LANES
    first, last = claim(worker, phase + 1, groups, MIN_GROUPS)
    num_done = 0
    while first < last:
        some, out = (first, last), step.logits
        multiply(workspace, m, inputs, first_row, step.num_outputs, some, out, width)
        num_done += last - first
        first, last = claim(worker, phase + 1, groups, MIN_GROUPS)
    finish_phase(worker, phase + 1, groups, num_done)


@inlined
def forward(worker: Any, workspace: Any, step: Any) -> None:
    """Layers first … last-1 for all tokens of the step, and the logits after the last layer."""
    for layer in range(step.first, step.last):
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
