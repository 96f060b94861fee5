"""Operations that the phases of a step share: tables, matrix products, norms, quantized inputs.

All buffers are in the workspace (workspace.py), and functions reach them by address: to Numba an
array argument is seven words, and a step that passed twenty arrays took 20 seconds to compile.

Shapes: N tokens of this step, C model width, H query heads, K KV heads, D head width, F ffn width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from glassllama.native.engine import workspace as ws
from glassllama.native.engine.elementwise import (
    add_scaled_to,
    add_to,
    normalize,
    quantize_blocks,
    quantize_superblock,
)
from glassllama.native.engine.layout import (
    BLOCK,
    FACTORS,
    IN_BF16,
    IN_INT8,
    IN_Q11,
    Q11_BYTES,
    SUPERBLOCK,
)
from glassllama.native.engine.thread_pool import parallel_for
from glassllama.native.jit.compile import compiled
from glassllama.native.jit.intrinsics import (
    bfloat_from_float,
    call_kernel,
    floats,
    integers8,
    integers64,
    words16,
)


class Step(NamedTuple):
    """Arguments of one step, as they are in the control block of the thread pool."""

    num_tokens: int
    num_tiles: int  # groups of consecutive tokens of one sequence: see attention.py
    num_outputs: int  # tokens whose logits are computed
    first: int  # layers first … last-1; the logits follow the last layer
    last: int
    page_table: int  # address of the cache's page table (sequences, 2, pages)
    table_columns: int  # pages in a row of that table
    num_spans: int  # of the longest sequence, SPAN tokens each
    kv_type: int  # how keys and values are stored: layout.KVType
    logits: int  # address of the output buffer (num_outputs, padded V)
    keys_only: int  # 1: of each layer only keys and values, which go into the cache


class Inputs(NamedTuple):
    """Addresses of the inputs of a matrix, `width` numbers a row, in every input format."""

    act_f32: int
    act_q8: int
    act_scales: int
    act_bf16: int
    act_q11: int
    q11_next: int  # bytes from a superblock of a row to its next
    width: int


@compiled
def inputs_of(workspace: Any) -> Any:
    """Inputs of the matrices that read C or H·D numbers."""
    return Inputs(
        workspace.act_f32, workspace.act_q8, workspace.act_scales, workspace.act_bf16,
        workspace.act_q11, workspace.rows_with_scratch * Q11_BYTES, workspace.width,
    )  # fmt: skip


@compiled
def inputs_of_down(workspace: Any) -> Any:
    """Inputs of the matrix `down`."""
    return Inputs(
        workspace.hidden_f32, workspace.hidden_q8, workspace.hidden_scales, workspace.hidden_bf16,
        workspace.hidden_q11, workspace.max_tokens * Q11_BYTES, workspace.hidden_width,
    )  # fmt: skip


@compiled
def row(address: int, t: int, width: int) -> Any:
    """Row t of a float32 table."""
    return floats(address + t * width * 4, width)


@compiled
def matrix_field(workspace: Any, matrix: int, name: int) -> Any:
    """One column of the table of matrices: KERNEL, VALUES, …"""
    return integers64(workspace.matrices + (matrix * ws.MATRIX_FIELDS + name) * 8, 1)[0]


@compiled
def layer_field(workspace: Any, layer: int, name: int) -> Any:
    """One column of the table of layers: PRE_ATTENTION, WINDOW, …"""
    return integers64(workspace.layer_fields + (layer * ws.LAYER_FIELDS + name) * 8, 1)[0]


@compiled
def layer_number(workspace: Any, layer: int, name: int) -> Any:
    """One column of the table of layers' float32 numbers: SCORE_SCALE, SOFTCAP, …"""
    return floats(workspace.layer_numbers + (layer * ws.LAYER_NUMBERS + name) * 4, 1)[0]


@compiled
def token_fields(workspace: Any, t: int) -> Any:
    """Id, sequence, position and prefix of a token: (TOKEN_FIELDS,)."""
    return integers64(workspace.tokens + t * ws.TOKEN_FIELDS * 8, ws.TOKEN_FIELDS)


@compiled
def multiply(
    workspace: Any, matrix: int, inputs: Any, first_row: int, num_tokens: int, groups: Any,
    out: int, width: int,
) -> None:  # fmt: skip
    """Multiply groups (first, last + 1) of a matrix by inputs -> rows of `width` floats at `out`.

    The inputs are `num_tokens` rows from `first_row` on.
    """
    w = inputs.width
    address, stride = inputs.act_f32 + first_row * w * 4, w * 4
    input_format = matrix_field(workspace, matrix, ws.INPUT_FORMAT)
    if input_format == IN_INT8:
        address, stride = inputs.act_q8 + first_row * w, w
    elif input_format == IN_BF16:
        address, stride = inputs.act_bf16 + first_row * w * 2, w * 2
    scale_stride = w // BLOCK * FACTORS * 4
    scales = inputs.act_scales + first_row * scale_stride
    if input_format == IN_Q11:
        address, stride = inputs.act_q11 + first_row * Q11_BYTES, Q11_BYTES
        scales, scale_stride = address, inputs.q11_next
    arguments = (
        matrix_field(workspace, matrix, ws.VALUES), matrix_field(workspace, matrix, ws.SCALES),
        matrix_field(workspace, matrix, ws.BLOCKS), address, stride, scales, scale_stride,
        num_tokens, out, width * 4, groups[0], groups[1],
    )  # fmt: skip
    call_kernel(matrix_field(workspace, matrix, ws.KERNEL), arguments)


@compiled
def add_bias(bias: int, table: int, width: int, num_tokens: int, first: int, last: int) -> None:
    """Add columns first … last-1 of a bias (an address) to those of rows of `width` floats."""
    for t in range(num_tokens):
        columns = floats(table + (t * width + first) * 4, last - first)
        add_to(columns, floats(bias + first * 4, last - first))


@compiled
def quantize_inputs(
    input_format: int, inputs: Any, t: int, numbers: Any, first: int, last: int
) -> None:
    """Convert columns first … last-1 of input row t to the formats that the next matrices read.

    `input_format` is a combination of flags. Columns are whole blocks, and whole superblocks if one
    of the formats is Q11.
    """
    if input_format & IN_INT8:
        codes = integers8(inputs.act_q8 + t * inputs.width, inputs.width)
        blocks = inputs.width // BLOCK
        scales = floats(inputs.act_scales + t * blocks * FACTORS * 4, (blocks, FACTORS))
        quantize_blocks(numbers, first // BLOCK, last // BLOCK, codes, scales)
    if input_format & IN_BF16:
        act_bf16 = words16(inputs.act_bf16 + t * inputs.width * 2, inputs.width)
        for i in range(first, last):
            act_bf16[i] = bfloat_from_float(numbers[i])
    if input_format & IN_Q11:
        for n in range(first // SUPERBLOCK, last // SUPERBLOCK):
            out = inputs.act_q11 + n * inputs.q11_next + t * Q11_BYTES
            quantize_superblock(numbers.ctypes.data + n * SUPERBLOCK * 4, out)


@compiled
def norm_row(workspace: Any, norm: int, t: int, input_format: int, out: int) -> None:
    """RMSNorm of row t of the residual stream, with the weights at `norm` -> input row `out`.

    Without weights (address 0) the row is copied.
    """
    inputs = inputs_of(workspace)
    numbers, x = row(inputs.act_f32, out, inputs.width), row(workspace.x, t, workspace.dim)
    if norm != 0:
        normalize(x, floats(norm, workspace.dim), workspace.eps, numbers)
    else:
        for i in range(workspace.dim):
            numbers[i] = x[i]
    quantize_inputs(input_format, inputs, out, numbers, 0, workspace.dim)


@compiled
def norm_range(
    first: int, last: int, workspace: Any, norm: int, input_format: int, rows: int
) -> None:
    for t in range(first, last):
        norm_row(workspace, norm, integers64(rows + t * 8, 1)[0], input_format, t)


@compiled
def norm_rows(
    worker: Any, phase: int, workspace: Any, norm: int, input_format: int, rows: int, count: int
) -> Any:
    """`norm_row` of `count` rows of the residual stream -> the first row of inputs.

    `rows` is the address of the numbers of the rows. For a single token every thread computes the
    inputs itself, which is cheaper than waiting for another thread. It writes them into a row of
    its own, because a late thread may still write when the next step has begun.
    """
    if count == 1:
        own_row = workspace.max_tokens + worker.thread
        norm_row(workspace, norm, integers64(rows, 1)[0], input_format, own_row)
        return own_row
    arguments = (workspace, norm, input_format, rows)
    parallel_for(worker, phase, count, 1, norm_range, arguments)
    return 0


@compiled
def add_normed_range(first: int, last: int, workspace: Any, norm: int, multiplier: float) -> None:
    dim = workspace.dim
    for t in range(first, last):
        out = row(workspace.proj_out, t, workspace.proj_out_width)[:dim]
        normalize(out, floats(norm, dim), workspace.eps, out)
        add_scaled_to(row(workspace.x, t, dim), out, multiplier)


@compiled
def add_normed(
    worker: Any, phase: int, workspace: Any, norm: int, multiplier: float, num_tokens: int
) -> None:
    """x += multiplier · RMSNorm(projection), for all tokens; nothing without a norm (address 0)."""
    if norm != 0:
        arguments = (workspace, norm, multiplier)
        parallel_for(worker, phase, num_tokens, 1, add_normed_range, arguments)
