"""Vector kernels over a page of the cache: several queries at once share every key and value.

Written in LLVM's own vectors without any processor's instructions, so that they run everywhere;
their twins are `score_plainly` and `mix_plainly` (attention.py).
"""

from __future__ import annotations

from typing import Any

from glassllama.engine.compiled import instruction_for_constants
from glassllama.engine.intrinsics import types
from glassllama.engine.vectors import F32, I16, I32, Vectors, number, vector

PAGE = 64  # tokens


def widen(v: Vectors, address: Any, lanes: int) -> Any:
    """bfloat16 in memory as float32: they are its upper halves."""
    words = v.builder.zext(v.load(address, vector(I16, lanes), 2), vector(I32, lanes))
    shifted = v.builder.shl(words, v.same(words.type, 16))
    return v.builder.bitcast(shifted, vector(F32, lanes))


@instruction_for_constants
def score_tile(context, count, query, keys, width, scores):  # type: ignore[no-untyped-def]
    """Dot products of some queries (a constant number) with the 64 keys of a page."""
    queries, parts = count.literal_value, PAGE // 16

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, width, scores = arguments[1:]
        v = Vectors(builder)
        row = builder.mul(width, number(4))

        def coordinate(i: Any, sums: list[Any]) -> list[Any]:
            k = [widen(v, v.at(v.step(keys, i, 2 * PAGE), 32 * p), 16) for p in range(parts)]
            results = []
            for n in range(queries):
                address = v.step(builder.add(query, builder.mul(row, number(n))), i, 4)
                q = v.splat(v.load(address, F32, 4), 16)
                results += [v.fused(q, k[p], sums[n * parts + p]) for p in range(parts)]
            return results

        start = [v.same(vector(F32, 16), 0.0)] * (queries * parts)
        for n, total in enumerate(v.count_up(width, start, coordinate)):
            v.store(total, v.at(scores, 64 * n), 4)
        return context.get_dummy_value()

    return types.void(count, *[types.int64] * 4), emit


@instruction_for_constants
def mix_tile(  # type: ignore[no-untyped-def]
    context, count, columns, weights, values, width, parts
):
    """Some columns of a page's 64 values, weighted and added to some queries' sums.

    How many columns and queries are constants.
    """
    queries, lanes = count.literal_value, columns.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, values, width, parts = arguments[2:]
        v = Vectors(builder)
        row = builder.mul(builder.add(width, number(2)), number(4))
        places = [builder.add(parts, builder.mul(row, number(n))) for n in range(queries)]

        def token(s: Any, sums: list[Any]) -> list[Any]:
            place = builder.add(values, builder.mul(s, builder.mul(width, number(2))))
            value, results = widen(v, place, lanes), []
            for n in range(queries):
                weight = v.load(v.at(v.step(weights, s, 4), 4 * PAGE * n), F32, 4)
                results.append(v.fused(v.splat(weight, lanes), value, sums[n]))
            return results

        start = [v.load(place, vector(F32, lanes), 4) for place in places]
        for total, place in zip(v.count_up(number(PAGE), start, token), places, strict=True):
            v.store(total, place, 4)
        return context.get_dummy_value()

    return types.void(count, columns, *[types.int64] * 4), emit
