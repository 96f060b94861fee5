"""Rotation, the cache's pages, and attention over them.

A page keeps the keys and values of 64 consecutive tokens of one row, for all layers:

    keys   (layers, K, D, 64)   transposed: one vector holds one coordinate of many tokens
    values (layers, K, 64, D)

in bfloat16, or float32 where the engine is exact. A row's pages are found by their addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glassllama.engine.compiled import compiled, loosely
from glassllama.engine.intrinsics import bfloat_from_float, float_from_bfloat, floats, words16
from glassllama.engine.pages import mix_four, mix_one, score_four, score_one
from glassllama.engine.rows import exponential, inverse_rms

F32 = np.float32
PAGE = 64  # tokens


@compiled
def rotate(head: Any, cos: Any, sin: Any, pairs: int) -> None:
    """Turn a head's D/2 pairs of coordinates in place: neighbours, or first half with second."""
    half = len(cos)
    for i in range(half):
        one, two = (2 * i, 2 * i + 1) if pairs else (i, half + i)
        a, b = head[one], head[two]
        head[one] = a * cos[i] - b * sin[i]
        head[two] = a * sin[i] + b * cos[i]


@compiled
def place(head: Any, cos: Any, sin: Any, pairs: int, unit: int, eps: float) -> None:
    """Give a query or key its position; `unit` adds the weightless norm of Llama 4-style models."""
    rotate(head, cos, sin, pairs)
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
            score_four(queries + n * width * 4, keys, width, scores + n * PAGE * 4)
            n += 4
        while n < count:
            score_one(queries + n * width * 4, keys, width, scores + n * PAGE * 4)
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
            for i in range(0, width, 16):
                mix_four(weights + n * PAGE * 4, values + 2 * i, width, parts + n * row + 4 * i)
            n += 4
        while n < count:
            for i in range(0, width, 16):
                mix_one(weights + n * PAGE * 4, values + 2 * i, width, parts + n * row + 4 * i)
            n += 1
    while n < count:
        mix_plainly(floats(weights + n * PAGE * 4, PAGE), values, wide, width,
                    floats(parts + n * row, width))  # fmt: skip
        n += 1


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


@loosely
def largest(scores: Any, count: int) -> Any:
    top = scores[0]
    for s in range(1, count):
        top = max(top, scores[s])
    return top


@loosely
def total(weights: Any, count: int) -> Any:
    result = F32(0)
    for s in range(count):
        result += weights[s]
    return result


@compiled
def weigh(scores: Any, visible: int, part: Any, width: int) -> None:
    """A page's scores become weights e^(score − largest so far); those not visible become 0."""
    if visible <= 0:
        for s in range(PAGE):
            scores[s] = F32(0)
        return
    top = max(part[width], largest(scores, visible))
    for s in range(PAGE):
        weight = exponential(scores[s] - top)
        scores[s] = weight if s < visible else F32(0)
    shrink = exponential(part[width] - top)
    for i in range(width):
        part[i] *= shrink
    part[width] = top
    part[width + 1] = part[width + 1] * shrink + total(scores, PAGE)


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
