"""Attention of a step: QK-norm, RoPE, the KV cache, and softmax over the keys of each sequence.

Queries that see the same keys are computed together: those of the heads that share a KV head, and
those of up to eight consecutive tokens of a sequence (a tile). The sums of each query are taken in
the same order, whatever is computed beside it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from glassllama.native.engine import workspace as ws
from glassllama.native.engine.attention_kernels import (
    accumulate_values,
    apply_rope,
    convert_page,
    converts_page,
    init_accumulator,
    item_bytes,
    merge_accumulators,
    normalize_accumulator,
    normalize_head,
    score_page,
    softmax_capped_page,
    softmax_page,
    store_kv,
)
from glassllama.native.engine.elementwise import scale_and_cap
from glassllama.native.engine.layer_ops import (
    inputs_of,
    layer_field,
    layer_number,
    matrix_field,
    quantize_inputs,
    row,
    token_fields,
)
from glassllama.native.engine.layout import KV_FLOAT32, PAGE
from glassllama.native.engine.thread_pool import parallel_for
from glassllama.native.jit.compile import compiled, inlined
from glassllama.native.jit.intrinsics import integers64

SPAN = 4 * PAGE  # tokens of one work item: threads share a long context span by span


class PageOffsets(NamedTuple):
    """Bytes from the start of a page."""

    keys: int
    values: int
    scales: int


class Scratch(NamedTuple):
    """Addresses of a thread's own buffers."""

    queries: int  # of a tile
    scores: int
    kv_f32: int  # the keys of a page, then its values, as float32


@compiled
def page_offsets(workspace: Any, layer: int, kv_head: int, kv_type: int) -> Any:
    """Where keys, values and scales of a layer and KV head begin in a page."""
    heads = layer_field(workspace, layer, ws.KV_LAYERS) * workspace.kv_heads
    head = layer_field(workspace, layer, ws.KV_LAYER) * workspace.kv_heads + kv_head
    size = workspace.head_dim * PAGE * item_bytes(kv_type)
    return PageOffsets(head * size, (heads + head) * size, 2 * heads * size + head * 2 * PAGE * 4)


@compiled
def pages_of(workspace: Any, layer: int, step: Any, t: int) -> Any:
    """Addresses of the pages of a token's sequence, in the page pool of the layer."""
    has_window = layer_field(workspace, layer, ws.WINDOW) > 0
    row_of_table = 2 * token_fields(workspace, t)[ws.SEQUENCE] + has_window
    return integers64(step.page_table + row_of_table * step.table_columns * 8, step.table_columns)


@compiled
def position_of(workspace: Any, t: int) -> Any:
    return token_fields(workspace, t)[ws.POSITION]


@compiled
def first_visible(workspace: Any, layer: int, t: int) -> Any:
    """The first position that the query of token t sees: with a sliding window not always 0."""
    window, token = layer_field(workspace, layer, ws.WINDOW), token_fields(workspace, t)
    if window == 0 or token[ws.PREFIX] > 0:
        return 0
    return max(0, token[ws.POSITION] + 1 - window)


@compiled
def end_visible(workspace: Any, t: int) -> Any:
    """The position after the last one that the query of token t sees."""
    token = token_fields(workspace, t)
    return max(token[ws.POSITION] + 1, token[ws.PREFIX])


# --- queries and keys -----------------------------------------------------------------------------


@compiled
def rope_and_norm(workspace: Any, layer: int, t: int, head: Any, norm_weights: int) -> None:
    """QK-norm of single heads and RoPE, in the order of the layer plan, on a head (D,) in place."""
    qk_norm = layer_field(workspace, layer, ws.QK_NORM)
    by_head = qk_norm != ws.NO_NORM and qk_norm != ws.FULL_WIDTH
    after = layer_field(workspace, layer, ws.QK_NORM_AFTER_ROPE)
    if by_head and not after:
        normalize_head(head, norm_weights, workspace.eps)
    pairs = layer_field(workspace, layer, ws.ROTARY_PAIRS)
    if pairs > 0:
        half = workspace.head_dim // 2
        table = layer_field(workspace, layer, ws.ROPE_TABLE) * workspace.max_tokens + t
        cos, sin = row(workspace.cos, table, half)[:pairs], row(workspace.sin, table, half)[:pairs]
        apply_rope(head, cos, sin, layer_field(workspace, layer, ws.INTERLEAVED))
    if by_head and after:
        normalize_head(head, norm_weights, workspace.eps)


@compiled
def query_factor(workspace: Any, layer: int, position: int) -> Any:
    """The factor of the scores of a query at this position: f(p) of `AttentionPlan`."""
    scale = layer_number(workspace, layer, ws.TEMPERATURE)
    if scale == 0:
        return np.float32(1)
    length = np.int64(layer_number(workspace, layer, ws.TEMPERATURE_LENGTH))
    return np.float32(1) + scale * np.float32(math.log(np.float32(1 + position // length)))


@compiled
def rope_and_store(workspace: Any, layer: int, step: Any, t: int, kv_head: int) -> None:
    """Apply RoPE and QK-norm to the key of token t and one KV head, and to the queries that attend
    to it.

    The key and the value go into the cache.
    """
    width, group, m = workspace.head_dim, workspace.group_size, layer * ws.MATRICES
    q_norm, k_norm = (
        layer_field(workspace, layer, ws.Q_NORM),
        layer_field(workspace, layer, ws.K_NORM),
    )
    queries, position = workspace.qkv + t * workspace.qkv_width * 4, position_of(workspace, t)
    factor = query_factor(workspace, layer, position)
    for head in range(kv_head * group, (kv_head + 1) * group):
        rope_and_norm(workspace, layer, t, row(queries, head, width), q_norm)
        if factor != 1:
            scale_and_cap(row(queries, head, width), factor, np.float32(0))
    first_key = queries + matrix_field(workspace, m + ws.WQ, ws.GROUPS) * ws.LANES * 4
    first_value = first_key + matrix_field(workspace, m + ws.WK, ws.GROUPS) * ws.LANES * 4
    key, value = row(first_key, kv_head, width), row(first_value, kv_head, width)
    rope_and_norm(workspace, layer, t, key, k_norm)
    page, slot = pages_of(workspace, layer, step, t)[position // PAGE], position % PAGE
    at = page_offsets(workspace, layer, kv_head, step.kv_type)
    store_kv(key, value, page + at.keys, page + at.values, page + at.scales, slot, step.kv_type)


@compiled
def normalize_full_width(workspace: Any, layer: int, t: int) -> None:
    """QK-norm over all heads together, of the queries and of the keys of token t."""
    width, m = workspace.head_dim, layer * ws.MATRICES
    queries = workspace.qkv + t * workspace.qkv_width * 4
    keys = queries + matrix_field(workspace, m + ws.WQ, ws.GROUPS) * ws.LANES * 4
    q_norm, k_norm = (
        layer_field(workspace, layer, ws.Q_NORM),
        layer_field(workspace, layer, ws.K_NORM),
    )
    normalize_head(row(queries, 0, workspace.heads * width), q_norm, workspace.eps)
    normalize_head(row(keys, 0, workspace.kv_heads * width), k_norm, workspace.eps)


@compiled
def rope_and_store_range(first: int, last: int, workspace: Any, layer: int, step: Any) -> None:
    for t in range(first, last):
        if layer_field(workspace, layer, ws.QK_NORM) == ws.FULL_WIDTH:
            normalize_full_width(workspace, layer, t)
        for kv_head in range(workspace.kv_heads):
            rope_and_store(workspace, layer, step, t, kv_head)


@inlined
def shares_spans(workspace: Any, step: Any) -> Any:
    """Whether each span is a work item: for a single token with several spans."""
    return step.num_tokens == 1 and step.num_spans > 1


@inlined
def stores_in_attend(workspace: Any, layer: int, step: Any) -> Any:
    """Whether `rope_and_store` is left to `attend`, where the thread that attends does it.

    That is so for a single token with one span, unless its heads are normalized together.
    """
    full_width = layer_field(workspace, layer, ws.QK_NORM) == ws.FULL_WIDTH
    return step.num_tokens == 1 and not shares_spans(workspace, step) and not full_width


@compiled
def rope_and_store_all(worker: Any, phase: int, workspace: Any, layer: int, step: Any) -> None:
    """`rope_and_store` for all tokens and KV heads."""
    if not stores_in_attend(workspace, layer, step):
        arguments = (workspace, layer, step)
        parallel_for(worker, phase, step.num_tokens, 1, rope_and_store_range, arguments)


# --- scores and values ----------------------------------------------------------------------------


@inlined
def attend_page(workspace: Any, scratch: Any, layer: int, page: int, ahead: int, past: int, t: int,
                count: int, accumulators: int, at: Any, kv_type: int) -> None:  # fmt: skip
    """Attend to one page with the queries of a tile: tokens t … t + count - 1.

    `past` tokens come before the page. The next page is `ahead` bytes away and is prefetched.
    """
    group, width, scores = workspace.group_size, workspace.head_dim, scratch.scores
    keys, values, form = page + at.keys, page + at.values, kv_type
    converted = converts_page(count * group, width, kv_type)
    if converted:
        convert_page(keys, width * PAGE, scratch.kv_f32, ahead, kv_type)
        keys, values, form = scratch.kv_f32, scratch.kv_f32, KV_FLOAT32
    score_page(scratch.queries, count * group, keys, width, scores, ahead, form)
    cap = layer_number(workspace, layer, ws.SOFTCAP)
    for n in range(count):
        first = max(0, first_visible(workspace, layer, t + n) - past)
        visible = min(PAGE, end_visible(workspace, t + n) - past)
        for g in range(n * group, (n + 1) * group):
            own, accumulator = scores + g * PAGE * 4, accumulators + g * (width + 2) * 4
            if cap == 0 and first == 0:
                softmax_page(own, visible, accumulator, width, page + at.scales, kv_type)
            else:
                softmax_capped_page(
                    own, first, visible, accumulator, width, page + at.scales, kv_type, cap
                )
    if converted:
        convert_page(page + at.values, width * PAGE, scratch.kv_f32, ahead, kv_type)
    accumulate_values(scores, count * group, values, width, accumulators, ahead, form)


@compiled
def attend_span(
    worker: Any, workspace: Any, layer: int, step: Any, tile: int, kv_head: int, span: int,
    accumulators: int,
) -> None:  # fmt: skip
    """Attend to one span with the queries of a tile and KV head.

    The result is in `accumulators` (queries, D + 2).
    """
    t = integers64(workspace.tile_first + tile * 8, 1)[0]
    count = integers64(workspace.tile_count + tile * 8, 1)[0]
    group, width, queries = workspace.group_size, workspace.head_dim, workspace.tile_queries
    scratch = Scratch(
        workspace.queries + worker.thread * queries * width * 4,
        workspace.scores + worker.thread * queries * PAGE * 4,
        workspace.kv_f32 + worker.thread * width * PAGE * 4,
    )
    scale = layer_number(workspace, layer, ws.SCORE_SCALE)
    for n in range(count):
        own = workspace.qkv + (t + n) * workspace.qkv_width * 4
        for g in range(group):
            init_accumulator(
                row(own, kv_head * group + g, width),
                row(scratch.queries, n * group + g, width),
                row(accumulators, n * group + g, width + 2),
                scale,
            )
    at = page_offsets(workspace, layer, kv_head, step.kv_type)
    pages = pages_of(workspace, layer, step, t)
    last = (end_visible(workspace, t + count - 1) - 1) // PAGE
    first = first_visible(workspace, layer, t) // PAGE
    for page in range(max(first, span * SPAN // PAGE), min((span + 1) * SPAN // PAGE, last + 1)):
        ahead = pages[min(page + 1, last)] - pages[page]
        attend_page(
            workspace, scratch, layer, pages[page], ahead, page * PAGE, t, count, accumulators, at,
            step.kv_type,
        )  # fmt: skip


@inlined
def attend_sequence(
    worker: Any, workspace: Any, layer: int, step: Any, tile: int, kv_head: int
) -> None:
    """Attend to all spans with the queries of a tile and KV head, one by one -> `attn_out`."""
    t = integers64(workspace.tile_first + tile * 8, 1)[0]
    count = integers64(workspace.tile_count + tile * 8, 1)[0]
    group, width, queries = workspace.group_size, workspace.head_dim, workspace.tile_queries
    total = workspace.accumulators + 2 * worker.thread * queries * (width + 2) * 4
    part = total + queries * (width + 2) * 4
    first = first_visible(workspace, layer, t) // SPAN
    attend_span(worker, workspace, layer, step, tile, kv_head, first, total)
    for span in range(first + 1, (end_visible(workspace, t + count - 1) - 1) // SPAN + 1):
        attend_span(worker, workspace, layer, step, tile, kv_head, span, part)
        for n in range(count):
            if span * SPAN < end_visible(workspace, t + n):
                for g in range(n * group, (n + 1) * group):
                    merge_accumulators(row(total, g, width + 2), row(part, g, width + 2), width)
    for n in range(count):
        out = workspace.attn_out + (t + n) * workspace.heads * width * 4
        for g in range(group):
            normalize_accumulator(
                row(total, n * group + g, width + 2), row(out, kv_head * group + g, width)
            )


@compiled
def attend_range(
    first: int, last: int, worker: Any, workspace: Any, layer: int, step: Any, first_span: int,
    spans: int,
) -> None:  # fmt: skip
    """Items: every visible span of every KV head of every tile."""
    kv_heads, group = workspace.kv_heads, workspace.group_size
    for item in range(first, last):
        tile, kv_head, span = item // (kv_heads * spans), item // spans % kv_heads, item % spans
        if not shares_spans(workspace, step):
            if stores_in_attend(workspace, layer, step):
                rope_and_store(workspace, layer, step, 0, kv_head)
            attend_sequence(worker, workspace, layer, step, tile, kv_head)
        else:
            span += first_span
            first_head = (span * kv_heads + kv_head) * group
            partial = workspace.partials + first_head * (workspace.head_dim + 2) * 4
            attend_span(worker, workspace, layer, step, tile, kv_head, span, partial)


@compiled
def attend(worker: Any, phase: int, workspace: Any, layer: int, step: Any) -> None:
    """Attention of all query heads and tokens over the keys up to each token's position."""
    first_span, spans = 0, 1
    if shares_spans(workspace, step):
        first_span = first_visible(workspace, layer, 0) // SPAN
        spans = step.num_spans - first_span
    items = step.num_tiles * workspace.kv_heads * spans
    arguments = (worker, workspace, layer, step, first_span, spans)
    parallel_for(worker, phase, items, 1, attend_range, arguments)


# --- output ---------------------------------------------------------------------------------------


@inlined
def merge_spans(worker: Any, workspace: Any, layer: int, step: Any, out: int) -> None:
    """Merge the accumulators of all spans -> the attention output of the single token, at `out`."""
    width, heads = workspace.head_dim, workspace.heads
    total = row(workspace.accumulators, 2 * worker.thread * workspace.tile_queries, width + 2)
    start = first_visible(workspace, layer, 0) // SPAN
    for head in range(heads):
        first = row(workspace.partials, start * heads + head, width + 2)
        for i in range(width + 2):
            total[i] = first[i]
        for span in range(start + 1, step.num_spans):
            merge_accumulators(
                total, row(workspace.partials, span * heads + head, width + 2), width
            )
        normalize_accumulator(total, row(out, head, width))


@compiled
def prepare_output(
    worker: Any, workspace: Any, layer: int, step: Any, t: int, input_format: int, out: int
) -> None:
    """The attention output of token t becomes input row `out` of the output projection."""
    inputs, width = inputs_of(workspace), workspace.heads * workspace.head_dim
    numbers, attn_out = row(inputs.act_f32, out, inputs.width), row(workspace.attn_out, t, width)
    if shares_spans(workspace, step):
        merge_spans(worker, workspace, layer, step, inputs.act_f32 + out * inputs.width * 4)
    else:
        for i in range(width):
            numbers[i] = attn_out[i]
    quantize_inputs(input_format, inputs, out, numbers, 0, width)


@compiled
def prepare_output_range(
    first: int, last: int, worker: Any, workspace: Any, layer: int, step: Any, input_format: int
) -> None:
    for t in range(first, last):
        prepare_output(worker, workspace, layer, step, t, input_format, t)


@compiled
def prepare_outputs(
    worker: Any, phase: int, workspace: Any, layer: int, input_format: int, step: Any
) -> Any:
    """`prepare_output` for all tokens -> the first row of inputs: see `layer_ops.norm_rows`."""
    if step.num_tokens == 1:
        own_row = workspace.max_tokens + worker.thread
        prepare_output(worker, workspace, layer, step, 0, input_format, own_row)
        return own_row
    arguments = (worker, workspace, layer, step, input_format)
    parallel_for(worker, phase, step.num_tokens, 1, prepare_output_range, arguments)
    return 0
