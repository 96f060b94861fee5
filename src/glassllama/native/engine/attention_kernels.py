"""RoPE, quantized keys and values, and attention over one page of the KV cache.

Several queries share every key and value. If many queries attend to a page, its integers are
converted to float32 once for all of them, into a few kilobytes that stay in the first-level cache.
For few queries they are converted while they are loaded. In both cases the next page is prefetched
meanwhile. The vector code needs no instructions of one processor; the same computations in plain
loops are in tests/native/engine/test_pages.py.

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
from glassllama.native.engine.elementwise import (
    exponential,
    inverse_rms,
    scale_and_cap,
    softmax_page_tile,
)
from glassllama.native.engine.layout import (
    INT8_MAX,
    ITEM_BYTES,
    KV_FLOAT32,
    KV_INT8,
    KV_INT16,
    PAGE,
)
from glassllama.native.jit.compile import compiled, inlined
from glassllama.native.jit.intrinsics import (
    F32,
    I8,
    I16,
    I32,
    LINE,
    Vectors,
    float_from_bits,
    floats,
    instruction,
    integers8,
    integers16,
    number,
    vector,
)

FLOAT = np.float32
LANES = 16  # float32 in a vector of 64 bytes
FLOATS = vector(F32, LANES)
INTEGERS = {KV_INT16: I16, KV_INT8: I8}
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
def apply_rope(head: Any, cos: Any, sin: Any, interleaved: int) -> None:
    """Rotate the first 2 · len(cos) coordinates of a query or key (D,) in place."""
    if interleaved:
        rotate_interleaved(head, cos, sin)
    else:
        rotate_half(head, cos, sin)


@compiled
def normalize_head(head: Any, weights: int, eps: float) -> None:
    """QK-norm in place: RMSNorm of a query or key, times weights (an address) unless that is 0."""
    scale = inverse_rms(head, eps)
    for i in range(len(head)):
        head[i] *= scale
    if weights != 0:
        factors = floats(weights, len(head))
        for i in range(len(head)):
            head[i] *= factors[i]


@compiled
def store_kv(
    key: Any, value: Any, keys: int, values: int, scales: int, slot: int, kv_type: int
) -> None:
    """Write the key and value (D,) of one token into its slot of a page."""
    width, of_keys, of_values = len(key), floats(scales, PAGE), floats(scales + PAGE * 4, PAGE)
    if kv_type == KV_FLOAT32:
        k, v = floats(keys, (width, PAGE)), floats(values, (PAGE, width))
        for i in range(width):
            k[i, slot] = key[i]
            v[slot, i] = value[i]
    elif kv_type == KV_INT8:
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
    size = float_from_bits(largest) / FLOAT(max_code)
    inverse = FLOAT(1) / size if size > FLOAT(0) else FLOAT(0)
    usable = inverse > FLOAT(0) and inverse < FLOAT(np.inf)
    for i in range(len(out)):
        out[i] = np.int32(np.rint(numbers[i] * inverse)) if usable else 0
    return size


@compiled
def init_accumulator(query: Any, out: Any, accumulator: Any, scale: float) -> None:
    """Copy a query (D,) times `scale` to `out`, and clear its accumulator.

    An accumulator (D + 2,) holds the weighted sum of values, the largest score, and the sum of
    weights: softmax with a running maximum (Milakov & Gimelshein, 2018), which needs the scores of
    one page only, however long the context is.
    """
    width = len(query)
    for i in range(width):
        out[i] = query[i] * scale
        accumulator[i] = FLOAT(0)
    accumulator[width], accumulator[width + 1] = FLOAT(-np.inf), FLOAT(0)


@inlined
def item_bytes(kv_type: int) -> Any:
    return 4 if kv_type == KV_FLOAT32 else 1 if kv_type == KV_INT8 else 2


@inlined
def converts_page(queries: int, width: int, kv_type: int) -> Any:
    """Whether the integers of a page are converted to float32 first.

    That is so where they are read more than once, or the width is no multiple of a vector.
    """
    return kv_type != KV_FLOAT32 and (queries > MAX_TILE_QUERIES or width % LANES > 0)


@compiled
def convert_page(source: int, count: int, target: int, ahead: int, kv_type: int) -> None:
    """Convert `count` keys or values of a page to float32 at `target`.

    Meanwhile the memory `ahead` bytes further on is prefetched.
    """
    if kv_type == KV_INT8:
        convert_numbers(KV_INT8, source, count, target, ahead)
    else:
        convert_numbers(KV_INT16, source, count, target, ahead)


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
    if kv_type == KV_FLOAT32:
        score_page_as(KV_FLOAT32, queries, count, keys, width, scores, ahead)
    elif kv_type == KV_INT8:
        score_page_as(KV_INT8, queries, count, keys, width, scores, ahead)
    else:
        score_page_as(KV_INT16, queries, count, keys, width, scores, ahead)


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
    if kv_type == KV_FLOAT32:
        accumulate_values_as(KV_FLOAT32, weights, count, values, width, accumulators, ahead)
        for n in range(count if width % LANES > 0 else 0):
            own = floats(weights + n * PAGE * 4, PAGE)
            sums = floats(accumulators + n * (width + 2) * 4, width)
            accumulate_plain(own, floats(values, (PAGE, width)), width // LANES * LANES, sums)
    elif kv_type == KV_INT8:
        accumulate_values_as(KV_INT8, weights, count, values, width, accumulators, ahead)
    else:
        accumulate_values_as(KV_INT16, weights, count, values, width, accumulators, ahead)


@inlined
def accumulate_columns(
    kv_type: int, queries: int, weights: int, values: int, width: int, accumulators: int, ahead: int
) -> None:
    """All columns of the values, many at a time, then 16. `accumulate_plain` does the rest."""
    i, size = 0, item_bytes(kv_type)
    while i + TILE_WIDTH <= width:
        some, out = values + size * i, accumulators + 4 * i
        accumulate_tile(kv_type, queries, TILE_WIDTH, weights, some, width, out, ahead)
        i += TILE_WIDTH
    while i + LANES <= width:
        some, out = values + size * i, accumulators + 4 * i
        accumulate_tile(kv_type, queries, LANES, weights, some, width, out, ahead)
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
    sums = floats(accumulator, width)
    if visible <= 0:
        clear_page(scores)
    else:
        if kv_type == KV_FLOAT32:
            shrink = softmax_page_tile(0, scores, visible, accumulator, width, scales)
        else:
            shrink = softmax_page_tile(2, scores, visible, accumulator, width, scales)
        for i in range(width):
            sums[i] *= shrink


@compiled
def softmax_capped_page(
    scores: int, first: int, visible: int, accumulator: int, width: int, scales: int, kv_type: int,
    cap: float,
) -> None:  # fmt: skip
    """As `softmax_page`, with a soft cap (0: none) on scores, for tokens first … visible-1 only."""
    if first >= visible:
        clear_page(scores)
        return
    weights, sums = floats(scores, PAGE), floats(accumulator, width)
    if kv_type != KV_FLOAT32:
        of_keys = floats(scales, PAGE)
        for s in range(PAGE):
            weights[s] *= of_keys[s]
    if cap > FLOAT(0):
        scale_and_cap(weights, FLOAT(1), cap)
    for s in range(first):
        weights[s] = FLOAT(-np.inf)
    if kv_type == KV_FLOAT32:
        shrink = softmax_page_tile(0, scores, visible, accumulator, width, scales)
    else:
        shrink = softmax_page_tile(1, scores, visible, accumulator, width, scales)
    for s in range(first):  # e^x of the smallest x is not quite 0
        weights[s] = FLOAT(0)
    for i in range(width):
        sums[i] *= shrink


@compiled
def clear_page(scores: int) -> None:
    weights = floats(scores, PAGE)
    for s in range(PAGE):
        weights[s] = FLOAT(0)


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


# --- vector code: several queries and one page ----------------------------------------------------


def load_f32(v: Vectors, address: Any, kv_type: int) -> Any:
    """Load one vector of numbers as float32."""
    if kv_type == KV_FLOAT32:
        return v.load(address, FLOATS, 4)
    codes = v.load(address, vector(INTEGERS[kv_type], LANES), ITEM_BYTES[kv_type])
    return v.builder.sitofp(v.builder.sext(codes, vector(I32, LANES)), FLOATS)


@instruction(constants=1)
def convert_numbers(
    v: Vectors, kv_type: int, source: Any, count: Any, target: Any, ahead: Any
) -> None:
    """Convert `count` numbers, a multiple of 64, to float32; prefetch `ahead` bytes further on."""
    size = ITEM_BYTES[kv_type]

    def some(i: Any, nothing: list[Any]) -> list[Any]:
        address, to = v.step(source, i, PAGE * size), v.step(target, i, PAGE * 4)
        v.prefetch(v.builder.add(address, ahead), PAGE * size)
        for n in range(0, PAGE, LANES):
            v.store(load_f32(v, v.at(address, n * size), kv_type), v.at(to, n * 4), 4)
        return nothing

    v.count_up(v.builder.sdiv(count, number(PAGE)), [], some)


@instruction(constants=3)
def score_tile(
    v: Vectors, kv_type: int, queries: int, tokens: int, query: Any, keys: Any, width: Any,
    scores: Any, ahead: Any,
) -> None:  # fmt: skip
    """Dot products of some queries with some of the 64 keys of a page, (width, 64).

    Keys that are not float32 are prefetched `ahead` bytes further on.
    """
    b, parts, size = v.builder, tokens // LANES, ITEM_BYTES[kv_type]
    row = b.mul(width, number(4))
    locations = [b.add(query, b.mul(row, number(n))) for n in range(queries)]

    def coordinate(i: Any, sums: list[Any]) -> list[Any]:
        line = v.step(keys, i, size * PAGE)
        if kv_type != KV_FLOAT32:
            v.prefetch(b.add(line, ahead), size * LANES * parts)
        k = [load_f32(v, v.at(line, size * LANES * p), kv_type) for p in range(parts)]
        results = []
        for n in range(queries):
            q = v.splat(v.load(v.step(locations[n], i, 4), F32, 4), LANES)
            results += [v.fused(q, k[p], sums[n * parts + p]) for p in range(parts)]
        return results

    start = [v.same(FLOATS, 0.0)] * (queries * parts)
    for n, total in enumerate(v.count_up(width, start, coordinate)):
        v.store(total, v.at(scores, 4 * PAGE * (n // parts) + LINE * (n % parts)), 4)


@instruction(constants=3)
def accumulate_tile(
    v: Vectors, kv_type: int, queries: int, columns: int, weights: Any, values: Any, width: Any,
    accumulators: Any, ahead: Any,
) -> None:  # fmt: skip
    """Add some columns of the values (64, width) of a page, times weights, to accumulators.

    `ahead` as in `score_tile`.
    """
    b, vectors, size = v.builder, columns // LANES, ITEM_BYTES[kv_type]
    row = b.mul(b.add(width, number(2)), number(4))
    stride = b.mul(width, number(size))
    locations = [
        v.at(b.add(accumulators, b.mul(row, number(n))), LINE * c)
        for n in range(queries)
        for c in range(vectors)
    ]

    def token(s: Any, sums: list[Any]) -> list[Any]:
        line = b.add(values, b.mul(s, stride))
        if kv_type != KV_FLOAT32:
            v.prefetch(b.add(line, ahead), size * LANES * vectors)
        value = [load_f32(v, v.at(line, size * LANES * c), kv_type) for c in range(vectors)]
        results = []
        for n in range(queries):
            weight = v.splat(v.load(v.at(v.step(weights, s, 4), 4 * PAGE * n), F32, 4), LANES)
            results += [v.fused(weight, value[c], sums[n * vectors + c]) for c in range(vectors)]
        return results

    start = [v.load(address, FLOATS, 4) for address in locations]
    for total, address in zip(v.count_up(number(PAGE), start, token), locations, strict=True):
        v.store(total, address, 4)
