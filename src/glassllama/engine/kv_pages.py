"""Vector kernels over a page of the cache: several queries at once share every key and value.

Where many queries look at a page, its numbers are unpacked to float32 first, into a few kilobytes
that stay in the nearest cache, once for all of them. Few queries widen them on the way. Either way
the next page is asked for meanwhile.

Written in LLVM's own vectors without any processor's instructions, so that they run everywhere;
their twins in plain loops are in tests/engine/test_pages.py.
"""

from __future__ import annotations

from typing import Any

from glassllama.base.interfaces import CACHE_NUMBER
from glassllama.engine.compiled import instruction_for_constants
from glassllama.engine.intrinsics import types
from glassllama.engine.ir_builder import F32, I8, I16, I32, LINE, Vectors, number, vector

PAGE = 64  # tokens
LANES = 16  # float32 in a vector of 64 bytes
INT16, FLOAT32, INT8 = range(3)  # how keys and values are kept
ITEM_BYTES = {INT16: CACHE_NUMBER["int16"], FLOAT32: 4, INT8: CACHE_NUMBER["int8"]}
INTEGERS = {INT16: I16, INT8: I8}


def widen(v: Vectors, address: Any, kind: int) -> Any:
    """Numbers in memory as float32."""
    b, floats = v.builder, vector(F32, LANES)
    if kind == FLOAT32:
        return v.load(address, floats, 4)
    steps = v.load(address, vector(INTEGERS[kind], LANES), ITEM_BYTES[kind])
    return b.sitofp(b.sext(steps, vector(I32, LANES)), floats)


@instruction_for_constants
def unpack_numbers(context, kind, source, count, target, ahead):  # type: ignore[no-untyped-def]
    """`count` numbers, a multiple of 64, as float32; those `ahead` bytes further are asked for.

    `kind` is a constant, INT16 or INT8.
    """
    form = kind.literal_value
    size = ITEM_BYTES[form]

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, count, target, ahead = arguments[1:]
        v = Vectors(builder)

        def some(i: Any, nothing: list[Any]) -> list[Any]:
            place, to = v.step(source, i, PAGE * size), v.step(target, i, PAGE * 4)
            v.prefetch(builder.add(place, ahead), PAGE * size)
            for n in range(0, PAGE, LANES):
                v.store(widen(v, v.at(place, n * size), form), v.at(to, n * 4), 4)
            return nothing

        v.count_up(builder.sdiv(count, number(PAGE)), [], some)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 4), emit


@instruction_for_constants
def score_tile(  # type: ignore[no-untyped-def]
    context, kind, count, tokens, query, keys, width, scores, ahead
):
    """Dot products of some queries with some of the 64 keys of a page, (width, 64).

    What the keys are kept as, and how many queries and tokens are constants. Keys `ahead` bytes
    further are asked for, where they are not float32.
    """
    form, queries, parts = kind.literal_value, count.literal_value, tokens.literal_value // LANES
    size = ITEM_BYTES[form]

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, width, scores, ahead = arguments[3:]
        v = Vectors(builder)
        row = builder.mul(width, number(4))
        places = [builder.add(query, builder.mul(row, number(n))) for n in range(queries)]

        def coordinate(i: Any, sums: list[Any]) -> list[Any]:
            line = v.step(keys, i, size * PAGE)
            if form != FLOAT32:
                v.prefetch(builder.add(line, ahead), size * LANES * parts)
            k = [widen(v, v.at(line, size * LANES * p), form) for p in range(parts)]
            results = []
            for n in range(queries):
                q = v.splat(v.load(v.step(places[n], i, 4), F32, 4), LANES)
                results += [v.fused(q, k[p], sums[n * parts + p]) for p in range(parts)]
            return results

        start = [v.same(vector(F32, LANES), 0.0)] * (queries * parts)
        for n, total in enumerate(v.count_up(width, start, coordinate)):
            v.store(total, v.at(scores, 4 * PAGE * (n // parts) + LINE * (n % parts)), 4)
        return context.get_dummy_value()

    return types.void(kind, count, tokens, *[types.int64] * 5), emit


@instruction_for_constants
def mix_tile(  # type: ignore[no-untyped-def]
    context, kind, count, columns, weights, values, width, parts, ahead
):
    """Some columns of a page's 64 values (64, width), weighted and added to some queries' sums.

    What the values are kept as, and how many queries and columns are constants. `ahead` as above.
    """
    form, queries, vectors = kind.literal_value, count.literal_value, columns.literal_value // LANES
    size = ITEM_BYTES[form]

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, values, width, parts, ahead = arguments[3:]
        v, floats = Vectors(builder), vector(F32, LANES)
        row = builder.mul(builder.add(width, number(2)), number(4))
        stride = builder.mul(width, number(size))
        places = [
            v.at(builder.add(parts, builder.mul(row, number(n))), LINE * c)
            for n in range(queries)
            for c in range(vectors)
        ]

        def token(s: Any, sums: list[Any]) -> list[Any]:
            line = builder.add(values, builder.mul(s, stride))
            if form != FLOAT32:
                v.prefetch(builder.add(line, ahead), size * LANES * vectors)
            value = [widen(v, v.at(line, size * LANES * c), form) for c in range(vectors)]
            results = []
            for n in range(queries):
                weight = v.splat(v.load(v.at(v.step(weights, s, 4), 4 * PAGE * n), F32, 4), LANES)
                results += [
                    v.fused(weight, value[c], sums[n * vectors + c]) for c in range(vectors)
                ]
            return results

        start = [v.load(place, floats, 4) for place in places]
        for total, place in zip(v.count_up(number(PAGE), start, token), places, strict=True):
            v.store(total, place, 4)
        return context.get_dummy_value()

    return types.void(kind, count, columns, *[types.int64] * 5), emit
