"""RoPE, quantized keys and values, and attention over one page of the KV cache.

A page holds the keys and values of 64 consecutive tokens of one sequence, for all layers:

    keys   (layers, K, D, 64)   transposed: one vector holds one coordinate of many tokens
    values (layers, K, 64, D)
    scales (layers, K, 2, 64)   float32, of keys and of values, where they are integers

in int16 or int8 with a scale for each token and head, or in float32 if the engine is exact. The
number of largest magnitude in a head becomes the largest integer, so no model is out of range, and
int16 is more precise than float16 or bfloat16 of the same size. The page table holds the addresses
of the pages of each sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glassllama.native.engine.dispatch import features
from glassllama.native.engine.elementwise import exponential, inverse_rms
from glassllama.native.engine.kv_pages import (
    FLOAT32,
    INT8,
    INT16,
    LANES,
    PAGE,
    accumulate_tile,
    convert_numbers,
    score_tile,
)
from glassllama.native.engine.quantize_activations import INT8_MAX, softmax_page_tile
from glassllama.native.jit.compile import compiled, inlined
from glassllama.native.jit.intrinsics import float_from_bits, floats, integers8, integers16

F32 = np.float32
INT16_MAX = 32767  # without -32768, as INT8_MAX without -128
# Queries of the largest tile, and its tokens or columns: as many sums as there are registers.
MAX_TILE_QUERIES, TILE_WIDTH = (6, 64) if "avx512f" in features() else (4, 16)


@compiled
def rotate_interleaved(head: Any, cos: Any, sin: Any) -> None:
    """Rotate the coordinates (0,1), (2,3), … of a head in place, each pair by its angle."""
    for i in range(len(cos)):
        a, b = head[2 * i], head[2 * i + 1]
        head[2 * i] = a * cos[i] - b * sin[i]
        head[2 * i + 1] = a * sin[i] + b * cos[i]


@compiled
def rotate_half(head: Any, cos: Any, sin: Any) -> None:
    """Rotate the coordinates (0, D/2), (1, D/2 + 1), … of a head in place."""
    half = len(cos)
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = a * sin[i] + b * cos[i]


@compiled
def apply_rope(head: Any, cos: Any, sin: Any, interleaved: int, qk_norm: int, eps: float) -> None:
    """Apply RoPE to a query or key, then the weightless QK-norm of Llama 4-style models."""
    if interleaved:
        rotate_interleaved(head, cos, sin)
    else:
        rotate_half(head, cos, sin)
    if qk_norm:
        scale = inverse_rms(head, eps)
        for i in range(len(head)):
            head[i] *= scale


@compiled
def store_kv(
    key: Any, value: Any, keys: int, values: int, scales: int, slot: int, kv_type: int
) -> None:
    """Write the key and value (D,) of one token into its slot of a page."""
    width, of_keys, of_values = len(key), floats(scales, PAGE), floats(scales + PAGE * 4, PAGE)
    if kv_type == FLOAT32:
        k, v = floats(keys, (width, PAGE)), floats(values, (PAGE, width))
        for i in range(width):
            k[i, slot] = key[i]
            v[slot, i] = value[i]
    elif kv_type == INT8:
        of_keys[slot] = quantize_head(key, integers8(keys, (width, PAGE))[:, slot], INT8_MAX)
        of_values[slot] = quantize_head(value, integers8(values, (PAGE, width))[slot], INT8_MAX)
    else:
        of_keys[slot] = quantize_head(key, integers16(keys, (width, PAGE))[:, slot], INT16_MAX)
        of_values[slot] = quantize_head(value, integers16(values, (PAGE, width))[slot], INT16_MAX)


@inlined
def quantize_head(numbers: Any, out: Any, max_code: int) -> Any:
    """Quantize numbers to integers −max_code … max_code -> the scale.

    The largest magnitude is found on the bits, where NaN and infinity are the largest: the scale is
    then no finite number, and carries that into every product.
    """
    bits, largest = numbers.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    size = float_from_bits(largest) / F32(max_code)
    inverse = F32(1) / size if size > F32(0) else F32(0)
    usable = inverse > F32(0) and inverse < F32(np.inf)
    for i in range(len(out)):
        out[i] = np.int32(np.rint(numbers[i] * inverse)) if usable else 0
    return size


@compiled
def init_accumulator(query: Any, out: Any, accumulator: Any) -> None:
    """Copy a query (D,) scaled by 1/√D to `out`, and clear its accumulator.

    An accumulator (D + 2,) holds the weighted sum of values, the largest score, and the sum of
    weights: softmax with a running maximum (Milakov & Gimelshein, 2018), which needs the scores of
    one page only, however long the context is.
    """
    width = len(query)
    scale = F32(1) / np.sqrt(F32(width))
    for i in range(width):
        out[i] = query[i] * scale
        accumulator[i] = F32(0)
    accumulator[width], accumulator[width + 1] = F32(-np.inf), F32(0)


@inlined
def item_bytes(kv_type: int) -> Any:
    return 4 if kv_type == FLOAT32 else 1 if kv_type == INT8 else 2


@inlined
def converts_page(queries: int, width: int, kv_type: int) -> Any:
    """Whether the integers of a page are converted to float32 first.

    That is so where they are read more than once, or the width is no multiple of a vector.
    """
    return kv_type != FLOAT32 and (queries > MAX_TILE_QUERIES or width % LANES > 0)


@compiled
def convert_page(source: int, count: int, target: int, ahead: int, kv_type: int) -> None:
    """Convert `count` keys or values of a page to float32 at `target`.

    Meanwhile the memory `ahead` bytes further on is prefetched.
    """
    if kv_type == INT8:
        convert_numbers(INT8, source, count, target, ahead)
    else:
        convert_numbers(INT16, source, count, target, ahead)


@inlined
def score_page_as(
    kv_type: int, queries: int, count: int, keys: int, width: int, scores: int, ahead: int
) -> None:
    """Dot products of `count` queries with all keys of a page (D, 64) -> (count, 64).

    Scores of empty slots mean nothing. The sums of a query are the same in tiles of any size.
    """
    n, step = 0, TILE_WIDTH * item_bytes(kv_type)
    while n < count:
        query, out, left = queries + n * width * 4, scores + n * PAGE * 4, count - n
        for part in range(PAGE // TILE_WIDTH):
            some, to = keys + part * step, out + part * TILE_WIDTH * 4
            if left >= MAX_TILE_QUERIES:
                score_tile(kv_type, MAX_TILE_QUERIES, TILE_WIDTH, query, some, width, to, ahead)
            elif left >= 4:
                score_tile(kv_type, 4, TILE_WIDTH, query, some, width, to, ahead)
            elif left == 3:
                score_tile(kv_type, 3, TILE_WIDTH, query, some, width, to, ahead)
            elif left == 2:
                score_tile(kv_type, 2, TILE_WIDTH, query, some, width, to, ahead)
            else:
                score_tile(kv_type, 1, TILE_WIDTH, query, some, width, to, ahead)
        n += tile_size(left)


@compiled
def score_page(
    queries: int, count: int, keys: int, width: int, scores: int, ahead: int, kv_type: int
) -> None:
    if kv_type == FLOAT32:
        score_page_as(FLOAT32, queries, count, keys, width, scores, ahead)
    elif kv_type == INT8:
        score_page_as(INT8, queries, count, keys, width, scores, ahead)
    else:
        score_page_as(INT16, queries, count, keys, width, scores, ahead)


@inlined
def tile_size(left: int) -> Any:
    """How many of the remaining queries go into the next tile."""
    return MAX_TILE_QUERIES if left >= MAX_TILE_QUERIES else min(left, 4)


@inlined
def accumulate_values_as(
    kv_type: int, weights: int, count: int, values: int, width: int, accumulators: int, ahead: int
) -> None:
    """Add the values (64, D) of a page, times their weights, to `count` accumulators (D + 2,)."""
    n, row = 0, (width + 2) * 4
    while n < count:
        some, out, left = weights + n * PAGE * 4, accumulators + n * row, count - n
        if left >= MAX_TILE_QUERIES:
            accumulate_columns(kv_type, MAX_TILE_QUERIES, some, values, width, out, ahead)
        elif left >= 4:
            accumulate_columns(kv_type, 4, some, values, width, out, ahead)
        elif left == 3:
            accumulate_columns(kv_type, 3, some, values, width, out, ahead)
        elif left == 2:
            accumulate_columns(kv_type, 2, some, values, width, out, ahead)
        else:
            accumulate_columns(kv_type, 1, some, values, width, out, ahead)
        n += tile_size(left)


@compiled
def accumulate_values(
    weights: int, count: int, values: int, width: int, accumulators: int, ahead: int, kv_type: int
) -> None:
    if kv_type == FLOAT32:
        accumulate_values_as(FLOAT32, weights, count, values, width, accumulators, ahead)
        for n in range(count if width % LANES > 0 else 0):
            own = floats(weights + n * PAGE * 4, PAGE)
            sums = floats(accumulators + n * (width + 2) * 4, width)
            accumulate_plain(own, floats(values, (PAGE, width)), width // LANES * LANES, sums)
    elif kv_type == INT8:
        accumulate_values_as(INT8, weights, count, values, width, accumulators, ahead)
    else:
        accumulate_values_as(INT16, weights, count, values, width, accumulators, ahead)


@inlined
def accumulate_columns(
    kv_type: int, queries: int, weights: int, values: int, width: int, accumulators: int, ahead: int
) -> None:
    """All columns of the values, many at a time, then 16. `accumulate_plain` does the rest."""
    i, size = 0, item_bytes(kv_type)
    while i + TILE_WIDTH <= width:
        accumulate_tile(
            kv_type,
            queries,
            TILE_WIDTH,
            weights,
            values + size * i,
            width,
            accumulators + 4 * i,
            ahead,
        )
        i += TILE_WIDTH
    while i + LANES <= width:
        accumulate_tile(
            kv_type, queries, LANES, weights, values + size * i, width, accumulators + 4 * i, ahead
        )
        i += LANES


@compiled
def accumulate_plain(weights: Any, values: Any, first: int, sums: Any) -> None:
    """The same as `accumulate_tile`, for one query and the few columns from `first` on."""
    for s in range(PAGE):
        for i in range(first, len(sums)):
            sums[i] += weights[s] * values[s, i]


@compiled
def softmax_page(
    scores: int, visible: int, accumulator: int, width: int, scales: int, kv_type: int
) -> None:
    """Replace the scores of a page by weights e^(score − largest so far); invisible ones become 0.

    If the cache holds integers, scores and weights are multiplied by the scales of keys and values.
    """
    weights, sums = floats(scores, PAGE), floats(accumulator, width)
    if visible <= 0:
        for s in range(PAGE):
            weights[s] = F32(0)
    else:
        if kv_type == FLOAT32:
            shrink = softmax_page_tile(False, scores, visible, accumulator, width, scales)
        else:
            shrink = softmax_page_tile(True, scores, visible, accumulator, width, scales)
        for i in range(width):
            sums[i] *= shrink


@compiled
def merge_accumulators(total: Any, other: Any, width: int) -> None:
    """Merge two accumulators over different tokens into `total`."""
    largest = max(total[width], other[width])
    own, others = exponential(total[width] - largest), exponential(other[width] - largest)
    for i in range(width):
        total[i] = total[i] * own + other[i] * others
    total[width] = largest
    total[width + 1] = total[width + 1] * own + other[width + 1] * others


@compiled
def normalize_accumulator(total: Any, out: Any) -> None:
    """Divide the weighted sum by the sum of weights -> out (D,)."""
    weights = total[len(out) + 1]
    for i in range(len(out)):
        out[i] = total[i] / weights
