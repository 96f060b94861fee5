"""Operations that the phases of a step share: matrix products, norms, and quantized inputs.

All buffers are in the workspace (workspace.py), and functions reach them by address: to Numba an
array argument is seven words, and a step that passed twenty arrays took 20 seconds to compile.

Shapes: N tokens of this step, C model width, H query heads, K KV heads, D head width, F ffn width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from glassllama.native.engine.elementwise import BLOCK, normalize, quantize_blocks
from glassllama.native.engine.layout import BFLOAT16, INT8, Q11
from glassllama.native.engine.quantize_activations import (
    FACTORS,
    Q11_BYTES,
    SUPERBLOCK,
    quantize_superblock,
)
from glassllama.native.engine.thread_pool import claim, finish_phase
from glassllama.native.engine.workspace import (
    BLOCKS,
    INPUT_FORMAT,
    KERNEL,
    MATRIX_FIELDS,
    SCALES,
    TOKEN_FIELDS,
    VALUES,
)
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
    """Arguments of one step, as they stand in the control block of the thread pool."""

    num_tokens: int
    num_tiles: int  # groups of consecutive tokens of one sequence: see attention.py
    num_outputs: int  # tokens whose logits are computed
    first: int  # layers first … last-1; the logits follow the last layer
    last: int
    page_table: int  # address of the cache's page table
    table_columns: int  # columns of that table
    num_spans: int  # of the longest sequence, SPAN tokens each
    kv_type: int  # how keys and values are stored: kv_pages.INT16, FLOAT32, INT8
    logits: int  # address of the output buffer (num_outputs, padded V)


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
    return integers64(workspace.matrices + (matrix * MATRIX_FIELDS + name) * 8, 1)[0]


@compiled
def token_fields(workspace: Any, t: int) -> Any:
    """Id, sequence and position of a token: (TOKEN_FIELDS,)."""
    return integers64(workspace.tokens + t * TOKEN_FIELDS * 8, TOKEN_FIELDS)


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
    input_format = matrix_field(workspace, matrix, INPUT_FORMAT)
    if input_format == INT8:
        address, stride = inputs.act_q8 + first_row * w, w
    elif input_format == BFLOAT16:
        address, stride = inputs.act_bf16 + first_row * w * 2, w * 2
    scale_stride = w // BLOCK * FACTORS * 4
    scales = inputs.act_scales + first_row * scale_stride
    if input_format == Q11:
        address, stride = inputs.act_q11 + first_row * Q11_BYTES, Q11_BYTES
        scales, scale_stride = address, inputs.q11_next
    arguments = (
        matrix_field(workspace, matrix, VALUES), matrix_field(workspace, matrix, SCALES),
        matrix_field(workspace, matrix, BLOCKS), address, stride, scales, scale_stride,
        num_tokens, out, width * 4, groups[0], groups[1],
    )  # fmt: skip
    call_kernel(matrix_field(workspace, matrix, KERNEL), arguments)


@compiled
def quantize_inputs(
    input_format: int, inputs: Any, t: int, numbers: Any, first: int, last: int
) -> None:
    """Convert columns first … last-1 of input row t to the formats that the next matrices read.

    `input_format` is a combination of flags. Columns are whole blocks, and whole superblocks if one
    of the formats is Q11.
    """
    if input_format & INT8:
        codes = integers8(inputs.act_q8 + t * inputs.width, inputs.width)
        blocks = inputs.width // BLOCK
        scales = floats(inputs.act_scales + t * blocks * FACTORS * 4, (blocks, FACTORS))
        quantize_blocks(numbers, first // BLOCK, last // BLOCK, codes, scales)
    if input_format & BFLOAT16:
        bfloats = words16(inputs.act_bf16 + t * inputs.width * 2, inputs.width)
        for i in range(first, last):
            bfloats[i] = bfloat_from_float(numbers[i])
    if input_format & Q11:
        for n in range(first // SUPERBLOCK, last // SUPERBLOCK):
            out = inputs.act_q11 + n * inputs.q11_next + t * Q11_BYTES
            quantize_superblock(numbers.ctypes.data + n * SUPERBLOCK * 4, out)


@compiled
def norm_row(workspace: Any, norm: int, t: int, input_format: int, out: int) -> None:
    """RMSNorm of row t of the residual stream -> input row `out`."""
    inputs = inputs_of(workspace)
    numbers = row(inputs.act_f32, out, inputs.width)
    weights = row(workspace.norms, norm, workspace.dim)
    normalize(row(workspace.x, t, workspace.dim), weights, workspace.eps, numbers)
    quantize_inputs(input_format, inputs, out, numbers, 0, workspace.dim)


@compiled
def norm_rows(
    worker: Any, phase: int, workspace: Any, norm: int, input_format: int, tokens: int, count: int
) -> Any:
    """RMSNorm of `count` rows of the residual stream -> the first row of inputs.

    `tokens` is the address of the numbers of the rows. For a single token every thread computes the
    inputs itself, which is cheaper than waiting for another thread. It writes them into a row of
    its own, because a late thread may still write when the next step has begun.
    """
    rows = integers64(tokens, count)
    if count == 1:
        norm_row(workspace, norm, rows[0], input_format, workspace.max_tokens + worker.thread)
        return workspace.max_tokens + worker.thread
    first, last = claim(worker, phase, count, 1)
    num_done = 0
    while first < last:
        for t in range(first, last):
            norm_row(workspace, norm, rows[t], input_format, t)
        num_done += last - first
        first, last = claim(worker, phase, count, 1)
    finish_phase(worker, phase, count, num_done)
    return 0
