"""Vector kernels over one page of the KV cache: several queries share every key and value.

If many queries attend to a page, its integers are converted to float32 once for all of them, into a
few kilobytes that stay in the first-level cache. For few queries they are converted while they are
loaded. In both cases the next page is prefetched meanwhile.

Written with LLVM's generic vectors, without instructions of one processor, so that they run
everywhere. The same computations in plain loops are in tests/engine/test_pages.py.
"""

from __future__ import annotations

from typing import Any

from glassllama.base.interfaces import CACHE_NUMBER
from glassllama.native.jit.compile import instruction_for_constants
from glassllama.native.jit.intrinsics import types
from glassllama.native.jit.ir_builder import F32, I8, I16, I32, LINE, Vectors, number, vector

PAGE = 64  # tokens
LANES = 16  # float32 in a vector of 64 bytes
INT16, FLOAT32, INT8 = range(3)  # how keys and values are stored
ITEM_BYTES = {INT16: CACHE_NUMBER["int16"], FLOAT32: 4, INT8: CACHE_NUMBER["int8"]}
INTEGERS = {INT16: I16, INT8: I8}


def load_f32(v: Vectors, address: Any, kv_type: int) -> Any:
    """Load one vector of numbers as float32."""
    b, floats = v.builder, vector(F32, LANES)
    if kv_type == FLOAT32:
        return v.load(address, floats, 4)
    steps = v.load(address, vector(INTEGERS[kv_type], LANES), ITEM_BYTES[kv_type])
    return b.sitofp(b.sext(steps, vector(I32, LANES)), floats)


@instruction_for_constants
def convert_numbers(context, kv_type, source, count, target, ahead):  # type: ignore[no-untyped-def]
    """Convert `count` numbers, a multiple of 64, to float32; prefetch `ahead` bytes further on.

    `kv_type` is a constant, INT16 or INT8.
    """
    form = kv_type.literal_value
    size = ITEM_BYTES[form]

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, count, target, ahead = arguments[1:]
        v = Vectors(builder)

        def some(i: Any, nothing: list[Any]) -> list[Any]:
            address, to = v.step(source, i, PAGE * size), v.step(target, i, PAGE * 4)
            v.prefetch(builder.add(address, ahead), PAGE * size)
            for n in range(0, PAGE, LANES):
                v.store(load_f32(v, v.at(address, n * size), form), v.at(to, n * 4), 4)
            return nothing

        v.count_up(builder.sdiv(count, number(PAGE)), [], some)
        return context.get_dummy_value()

    return types.void(kv_type, *[types.int64] * 4), emit


@instruction_for_constants
def score_tile(  # type: ignore[no-untyped-def]
    context, kv_type, count, tokens, query, keys, width, scores, ahead
):
    """Dot products of some queries with some of the 64 keys of a page, (width, 64).

    The type of the keys and the numbers of queries and tokens are constants. Keys that are not
    float32 are prefetched `ahead` bytes further on.
    """
    form, queries, parts = kv_type.literal_value, count.literal_value, tokens.literal_value // LANES
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
            k = [load_f32(v, v.at(line, size * LANES * p), form) for p in range(parts)]
            results = []
            for n in range(queries):
                q = v.splat(v.load(v.step(places[n], i, 4), F32, 4), LANES)
                results += [v.fused(q, k[p], sums[n * parts + p]) for p in range(parts)]
            return results

        start = [v.same(vector(F32, LANES), 0.0)] * (queries * parts)
        for n, total in enumerate(v.count_up(width, start, coordinate)):
            v.store(total, v.at(scores, 4 * PAGE * (n // parts) + LINE * (n % parts)), 4)
        return context.get_dummy_value()

    return types.void(kv_type, count, tokens, *[types.int64] * 5), emit


@instruction_for_constants
def accumulate_tile(  # type: ignore[no-untyped-def]
    context, kv_type, count, columns, weights, values, width, parts, ahead
):
    """Add some columns of the values (64, width) of a page, times weights, to accumulators.

    The type of the values and the numbers of queries and columns are constants. `ahead` as above.
    """
    form, queries, vectors = (
        kv_type.literal_value,
        count.literal_value,
        columns.literal_value // LANES,
    )
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
            value = [load_f32(v, v.at(line, size * LANES * c), form) for c in range(vectors)]
            results = []
            for n in range(queries):
                weight = v.splat(v.load(v.at(v.step(weights, s, 4), 4 * PAGE * n), F32, 4), LANES)
                results += [
                    v.fused(weight, value[c], sums[n * vectors + c]) for c in range(vectors)
                ]
            return results

        start = [v.load(address, floats, 4) for address in places]
        for total, address in zip(v.count_up(number(PAGE), start, token), places, strict=True):
            v.store(total, address, 4)
        return context.get_dummy_value()

    return types.void(kv_type, count, columns, *[types.int64] * 5), emit
