"""Rotation, the cache's pages, and attention over them.

A page keeps the keys and values of 64 consecutive tokens of one row, for all layers:

    keys   (layers, K, D, 64)   transposed: one vector holds one coordinate of many tokens
    values (layers, K, 64, D)

in bfloat16, or float32 where the engine is exact. A row's pages are found by their addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glassllama.engine.compiled import compiled, inlined
from glassllama.engine.intrinsics import bfloat_from_float, float_from_bfloat, floats, words16
from glassllama.engine.pages import mix_tile, score_tile
from glassllama.engine.row_kernels import weigh_page
from glassllama.engine.rows import exponential, inverse_rms

F32 = np.float32
PAGE = 64  # tokens


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
def store(key: Any, value: Any, keys: int, values: int, slot: int, wide: int) -> None:
    """Write one token's key and value (D,) into its slot of a page."""
    width = len(key)
    if wide:
        k, v = floats(keys, (width, PAGE)), floats(values, (PAGE, width))
        for i in range(width):
            k[i, slot] = key[i]
            v[slot, i] = value[i]
    else:
        narrow_k, narrow_v = words16(keys, (width, PAGE)), words16(values, (PAGE, width))
        for i in range(width):
            narrow_k[i, slot] = bfloat_from_float(key[i])
            narrow_v[slot, i] = bfloat_from_float(value[i])


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


@compiled
def score(queries: int, count: int, keys: int, wide: int, width: int, scores: int) -> None:
    """Dot products of `count` queries with all keys of a page -> (count, PAGE) at `scores`.

    Those of empty slots mean nothing.
    """
    n = 0
    if not wide and width % 16 == 0:
        while n + 4 <= count:
            score_tile(4, queries + n * width * 4, keys, width, scores + n * PAGE * 4)
            n += 4
        while n < count:
            score_tile(1, queries + n * width * 4, keys, width, scores + n * PAGE * 4)
            n += 1
    while n < count:
        score_plainly(floats(queries + n * width * 4, width), keys, wide,
                      floats(scores + n * PAGE * 4, PAGE))  # fmt: skip
        n += 1


@compiled
def score_plainly(query: Any, keys: int, wide: int, scores: Any) -> None:
    """Plain loops: for float32 pages and odd widths, and the twin of the vector kernels."""
    width = len(query)
    for s in range(PAGE):
        scores[s] = F32(0)
    if wide:
        k = floats(keys, (width, PAGE))
        for i in range(width):
            for s in range(PAGE):
                scores[s] += query[i] * k[i, s]
    else:
        narrow = words16(keys, (width, PAGE))
        for i in range(width):
            for s in range(PAGE):
                scores[s] += query[i] * float_from_bfloat(narrow[i, s])


@compiled
def mix(weights: int, count: int, values: int, wide: int, width: int, parts: int) -> None:
    """Add a page's values, each times its weight, to `count` queries' parts (D + 2,)."""
    n, row = 0, (width + 2) * 4
    if not wide and width % 16 == 0:
        while n + 4 <= count:
            mix_columns(4, weights + n * PAGE * 4, values, width, parts + n * row)
            n += 4
        while n < count:
            mix_columns(1, weights + n * PAGE * 4, values, width, parts + n * row)
            n += 1
    while n < count:
        mix_plainly(floats(weights + n * PAGE * 4, PAGE), values, wide, width,
                    floats(parts + n * row, width))  # fmt: skip
        n += 1


@inlined
def mix_columns(queries: int, weights: int, values: int, width: int, parts: int) -> None:
    """All columns of a page's values: 32 at a time, then 16."""
    i = 0
    while i + 32 <= width:
        mix_tile(queries, 32, weights, values + 2 * i, width, parts + 4 * i)
        i += 32
    if i < width:
        mix_tile(queries, 16, weights, values + 2 * i, width, parts + 4 * i)


@compiled
def mix_plainly(weights: Any, values: int, wide: int, width: int, out: Any) -> None:
    """Plain loops, as `score_plainly`."""
    if wide:
        v = floats(values, (PAGE, width))
        for s in range(PAGE):
            for i in range(width):
                out[i] += weights[s] * v[s, i]
    else:
        narrow = words16(values, (PAGE, width))
        for s in range(PAGE):
            for i in range(width):
                out[i] += weights[s] * float_from_bfloat(narrow[s, i])


@compiled
def weigh(scores: int, visible: int, part: int, width: int) -> None:
    """A page's scores become weights e^(score − largest so far); those not visible become 0."""
    weights, sums = floats(scores, PAGE), floats(part, width)
    if visible <= 0:
        for s in range(PAGE):
            weights[s] = F32(0)
    else:
        shrink = weigh_page(scores, visible, part, width)
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
