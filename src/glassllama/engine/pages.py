"""Vector kernels over a page of the cache: several queries at once share every key and value.

Written in LLVM's own vectors without any processor's instructions, so that they run everywhere;
their twins are `score_plainly` and `mix_plainly` (attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glassllama.engine.compiled import instruction
from glassllama.engine.intrinsics import types
from glassllama.engine.vectors import F32, I16, I32, Vectors, number, vector

PAGE = 64  # tokens
FLOATS = vector(F32, 16)


def widen(v: Vectors, address: Any) -> Any:
    """Sixteen bfloat16 in memory as float32: they are its upper halves."""
    words = v.builder.zext(v.load(address, vector(I16, 16), 2), vector(I32, 16))
    return v.builder.bitcast(v.builder.shl(words, v.same(words.type, 16)), FLOATS)


def score_tile(queries: int) -> Callable[..., None]:
    """(queries, keys, width, scores): dot products of some queries with the 64 keys of a page."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, width, scores = arguments
        v, parts = Vectors(builder), PAGE // 16
        row = builder.mul(width, number(4))

        def coordinate(i: Any, sums: list[Any]) -> list[Any]:
            k = [widen(v, v.at(v.step(keys, i, 2 * PAGE), 32 * part)) for part in range(parts)]
            results = []
            for n in range(queries):
                address = v.step(builder.add(query, builder.mul(row, number(n))), i, 4)
                q = v.splat(v.load(address, F32, 4), 16)
                results += [v.fused(q, k[p], sums[n * parts + p]) for p in range(parts)]
            return results

        sums = v.count_up(width, [v.same(FLOATS, 0.0)] * (queries * parts), coordinate)
        for n, total in enumerate(sums):
            v.store(total, v.at(scores, 64 * n), 4)
        return context.get_dummy_value()

    def typed(context: Any, query, keys, width, scores):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 4), emit

    return instruction(typed)


def mix_tile(queries: int) -> Callable[..., None]:
    """(weights, values, width, parts): 16 coordinates of the 64 values, weighted and added up."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, values, width, parts = arguments
        v = Vectors(builder)
        row = builder.mul(builder.add(width, number(2)), number(4))
        places = [builder.add(parts, builder.mul(row, number(n))) for n in range(queries)]

        def token(s: Any, sums: list[Any]) -> list[Any]:
            value = widen(v, builder.add(values, builder.mul(s, builder.mul(width, number(2)))))
            results = []
            for n in range(queries):
                weight = v.load(v.at(v.step(weights, s, 4), 4 * PAGE * n), F32, 4)
                results.append(v.fused(v.splat(weight, 16), value, sums[n]))
            return results

        start = [v.load(place, FLOATS, 4) for place in places]
        for total, place in zip(v.count_up(number(PAGE), start, token), places, strict=True):
            v.store(total, place, 4)
        return context.get_dummy_value()

    def typed(context: Any, weights, values, width, parts):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 4), emit

    return instruction(typed)


score_one, score_four = score_tile(1), score_tile(4)
mix_one, mix_four = mix_tile(1), mix_tile(4)
