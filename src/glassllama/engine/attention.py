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
def score(query: Any, keys: int, wide: int, scores: Any) -> None:
    """Dot products of a query with all keys of a page; those of empty slots mean nothing."""
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
def mix(weights: Any, count: int, values: int, wide: int, width: int, out: Any) -> None:
    """Add the first `count` values of a page, each times its weight, to `out` (D,)."""
    if wide:
        v = floats(values, (PAGE, width))
        for s in range(count):
            for i in range(width):
                out[i] += weights[s] * v[s, i]
    else:
        narrow = words16(values, (PAGE, width))
        for s in range(count):
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
def weigh(scores: Any, count: int, scale: float, top: float) -> None:
    """Scores become e^(scale · score − top), in place."""
    for s in range(count):
        scores[s] = exponential(scores[s] * scale - top)


@compiled
def attend(
    query: Any, pages: Any, first: int, last: int, keys: int, values: int, wide: int,
    scores: Any, part: Any,
) -> None:  # fmt: skip
    """One query head over tokens first … last-1 of its row (first: the start of a page) -> `part`.

    `keys` and `values` are offsets of this layer and kv head within a page; `part` (D + 2,) gets
    the weighted sum of values, the largest score, and the sum of weights. Page by page with a
    running maximum (Milakov & Gimelshein, 2018): memory for one page of scores, however long the
    context.
    """
    width = len(query)
    scale = F32(1) / np.sqrt(F32(width))
    for i in range(width):
        part[i] = F32(0)
    running, weight = F32(-np.inf), F32(0)
    for page in range(first // PAGE, (last + PAGE - 1) // PAGE):
        count = min(PAGE, last - page * PAGE)
        score(query, pages[page] + keys, wide, scores)
        top = max(running, largest(scores, count) * scale)
        weigh(scores, count, scale, top)
        shrink = exponential(running - top)
        for i in range(width):
            part[i] *= shrink
        weight = weight * shrink + total(scores, count)
        mix(scores, count, pages[page] + values, wide, width, part)
        running = top
    part[width], part[width + 1] = running, weight


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
