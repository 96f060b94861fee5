"""Rotation, the cache's pages, and attention over them.

A page keeps the keys and values of 64 consecutive tokens of one row, for all layers:

    keys   (layers, K, D, 64)   transposed: one vector holds one coordinate of many tokens
    values (layers, K, 64, D)
    scales (layers, K, 2, 64)   float32, of keys and of values, where they are integers

in int16 or int8 with a scale for each token and head, or in float32 where the engine is exact. The
largest number of a head is its largest integer, so no model is out of range; int16 is closer than
the halves or bfloat16 of the same size. A row's pages are found by their addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glassllama.engine.compiled import compiled, inlined
from glassllama.engine.dispatch import features
from glassllama.engine.elementwise import exponential, inverse_rms
from glassllama.engine.intrinsics import float_from_bits, floats, integers8, integers16
from glassllama.engine.kv_pages import (
    FLOAT32,
    INT8,
    INT16,
    LANES,
    PAGE,
    mix_tile,
    score_tile,
    unpack_numbers,
)
from glassllama.engine.quantize_activations import STEPS, weigh_page

F32 = np.float32
STEPS_16 = 32767  # int16 without -32768, as row_kernels.STEPS for int8
# Queries of the largest tile, and tokens or columns across it: as many sums as there are registers.
MOST, ACROSS = (6, 64) if "avx512f" in features() else (4, 16)


@compiled
def rotate_pairs(head: Any, cos: Any, sin: Any) -> None:
    """Turn a head's coordinates in place: (0,1), (2,3), … each by its angle."""
    for i in range(len(cos)):
        a, b = head[2 * i], head[2 * i + 1]
        head[2 * i] = a * cos[i] - b * sin[i]
        head[2 * i + 1] = a * sin[i] + b * cos[i]


@compiled
def rotate_halves(head: Any, cos: Any, sin: Any) -> None:
    """Turn a head's coordinates in place: (0, D/2), (1, D/2 + 1), …"""
    half = len(cos)
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = a * sin[i] + b * cos[i]


@compiled
def place(head: Any, cos: Any, sin: Any, pairs: int, unit: int, eps: float) -> None:
    """Give a query or key its position; `unit` adds the weightless norm of Llama 4-style models."""
    if pairs:
        rotate_pairs(head, cos, sin)
    else:
        rotate_halves(head, cos, sin)
    if unit:
        scale = inverse_rms(head, eps)
        for i in range(len(head)):
            head[i] *= scale


@compiled
def store(key: Any, value: Any, keys: int, values: int, scales: int, slot: int, kind: int) -> None:
    """Write one token's key and value (D,) into its slot of a page."""
    width, of_keys, of_values = len(key), floats(scales, PAGE), floats(scales + PAGE * 4, PAGE)
    if kind == FLOAT32:
        k, v = floats(keys, (width, PAGE)), floats(values, (PAGE, width))
        for i in range(width):
            k[i, slot] = key[i]
            v[slot, i] = value[i]
    elif kind == INT8:
        of_keys[slot] = store_steps(key, integers8(keys, (width, PAGE))[:, slot], STEPS)
        of_values[slot] = store_steps(value, integers8(values, (PAGE, width))[slot], STEPS)
    else:
        of_keys[slot] = store_steps(key, integers16(keys, (width, PAGE))[:, slot], STEPS_16)
        of_values[slot] = store_steps(value, integers16(values, (PAGE, width))[slot], STEPS_16)


@inlined
def store_steps(numbers: Any, out: Any, most: int) -> Any:
    """Numbers in whole steps, −most … most -> what a step stands for.

    The largest magnitude is found on the bits, where NaN and infinity are largest too: where they
    are no numbers, their scale carries that into every product.
    """
    bits, largest = numbers.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    size = float_from_bits(largest) / F32(most)
    inverse = F32(1) / size if size > F32(0) else F32(0)
    usable = inverse > F32(0) and inverse < F32(np.inf)
    for i in range(len(out)):
        out[i] = np.int32(np.rint(numbers[i] * inverse)) if usable else 0
    return size


@compiled
def begin(query: Any, seat: Any, part: Any) -> None:
    """Take a query (D,) to its seat, scaled by 1/√D, and clear what it has seen.

    `part` (D + 2,) holds the weighted sum of values, the largest score, and the sum of weights:
    softmax with a running maximum (Milakov & Gimelshein, 2018), in memory for one page of scores
    however long the context.
    """
    width = len(query)
    scale = F32(1) / np.sqrt(F32(width))
    for i in range(width):
        seat[i] = query[i] * scale
        part[i] = F32(0)
    part[width], part[width + 1] = F32(-np.inf), F32(0)


@inlined
def item_bytes(kind: int) -> Any:
    return 4 if kind == FLOAT32 else 1 if kind == INT8 else 2


@inlined
def worth_unpacking(queries: int, width: int, kind: int) -> Any:
    """Whether numbers that are not float32 are made that first: they are read more than once, or
    columns are left over from whole vectors."""
    return kind != FLOAT32 and (queries > MOST or width % LANES > 0)


@compiled
def unpack(source: int, count: int, target: int, ahead: int, kind: int) -> None:
    """`count` of a page's keys or values as float32 at `target`.

    What is `ahead` bytes further on is asked for from memory meanwhile.
    """
    if kind == INT8:
        unpack_numbers(INT8, source, count, target, ahead)
    else:
        unpack_numbers(INT16, source, count, target, ahead)


@inlined
def score_as(
    kind: int, queries: int, count: int, keys: int, width: int, scores: int, ahead: int
) -> None:
    """Dot products of `count` queries with all keys of a page (D, 64) -> (count, 64).

    Those of empty slots mean nothing. A query's own sums are the same in tiles of any size.
    """
    n, step = 0, ACROSS * item_bytes(kind)
    while n < count:
        query, out, left = queries + n * width * 4, scores + n * PAGE * 4, count - n
        for part in range(PAGE // ACROSS):
            some, to = keys + part * step, out + part * ACROSS * 4
            if left >= MOST:
                score_tile(kind, MOST, ACROSS, query, some, width, to, ahead)
            elif left >= 4:
                score_tile(kind, 4, ACROSS, query, some, width, to, ahead)
            elif left == 3:
                score_tile(kind, 3, ACROSS, query, some, width, to, ahead)
            elif left == 2:
                score_tile(kind, 2, ACROSS, query, some, width, to, ahead)
            else:
                score_tile(kind, 1, ACROSS, query, some, width, to, ahead)
        n += tile_size(left)


@compiled
def score(
    queries: int, count: int, keys: int, width: int, scores: int, ahead: int, kind: int
) -> None:
    if kind == FLOAT32:
        score_as(FLOAT32, queries, count, keys, width, scores, ahead)
    elif kind == INT8:
        score_as(INT8, queries, count, keys, width, scores, ahead)
    else:
        score_as(INT16, queries, count, keys, width, scores, ahead)


@inlined
def tile_size(left: int) -> Any:
    """How many of the queries that are left go into the next tile."""
    return MOST if left >= MOST else min(left, 4)


@inlined
def mix_as(
    kind: int, weights: int, count: int, values: int, width: int, parts: int, ahead: int
) -> None:
    """Add a page's values (64, D), times their weights, to `count` parts (D + 2,)."""
    n, row = 0, (width + 2) * 4
    while n < count:
        some, out, left = weights + n * PAGE * 4, parts + n * row, count - n
        if left >= MOST:
            mix_columns(kind, MOST, some, values, width, out, ahead)
        elif left >= 4:
            mix_columns(kind, 4, some, values, width, out, ahead)
        elif left == 3:
            mix_columns(kind, 3, some, values, width, out, ahead)
        elif left == 2:
            mix_columns(kind, 2, some, values, width, out, ahead)
        else:
            mix_columns(kind, 1, some, values, width, out, ahead)
        n += tile_size(left)


@compiled
def mix(
    weights: int, count: int, values: int, width: int, parts: int, ahead: int, kind: int
) -> None:
    if kind == FLOAT32:
        mix_as(FLOAT32, weights, count, values, width, parts, ahead)
        for n in range(count if width % LANES > 0 else 0):
            own = floats(weights + n * PAGE * 4, PAGE)
            sums = floats(parts + n * (width + 2) * 4, width)
            mix_plainly(own, floats(values, (PAGE, width)), width // LANES * LANES, sums)
    elif kind == INT8:
        mix_as(INT8, weights, count, values, width, parts, ahead)
    else:
        mix_as(INT16, weights, count, values, width, parts, ahead)


@inlined
def mix_columns(
    kind: int, queries: int, weights: int, values: int, width: int, parts: int, ahead: int
) -> None:
    """All columns of a page's values: many at a time, then 16; fewer are left to `mix_plainly`."""
    i, size = 0, item_bytes(kind)
    while i + ACROSS <= width:
        mix_tile(kind, queries, ACROSS, weights, values + size * i, width, parts + 4 * i, ahead)
        i += ACROSS
    while i + LANES <= width:
        mix_tile(kind, queries, LANES, weights, values + size * i, width, parts + 4 * i, ahead)
        i += LANES


@compiled
def mix_plainly(weights: Any, values: Any, first: int, sums: Any) -> None:
    """What `mix_tile` does, for one query and its columns from `first` on: few, or none."""
    for s in range(PAGE):
        for i in range(first, len(sums)):
            sums[i] += weights[s] * values[s, i]


@compiled
def weigh(scores: int, visible: int, part: int, width: int, scales: int, kind: int) -> None:
    """A page's scores become weights e^(score − largest so far); those not visible become 0.

    Where the cache is of integers, scores and weights take up the scales of keys and values.
    """
    weights, sums = floats(scores, PAGE), floats(part, width)
    if visible <= 0:
        for s in range(PAGE):
            weights[s] = F32(0)
    else:
        if kind == FLOAT32:
            shrink = weigh_page(False, scores, visible, part, width, scales)
        else:
            shrink = weigh_page(True, scores, visible, part, width, scales)
        for i in range(width):
            sums[i] *= shrink


@compiled
def merge(whole: Any, part: Any, width: int) -> None:
    """Two `attend` results over different tokens become that over both, in `whole`."""
    top = max(whole[width], part[width])
    mine, theirs = exponential(whole[width] - top), exponential(part[width] - top)
    for i in range(width):
        whole[i] = whole[i] * mine + part[i] * theirs
    whole[width] = top
    whole[width + 1] = whole[width + 1] * mine + part[width + 1] * theirs


@compiled
def finish(whole: Any, out: Any) -> None:
    """Divide by the sum of weights -> out (D,)."""
    weight = whole[len(out) + 1]
    for i in range(len(out)):
        out[i] = whole[i] / weight
