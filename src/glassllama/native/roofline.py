"""The roofline of this processor, measured: bytes read and operations per second at best.

Benchmarks compare the engine's speed with it (docs/engine.md). Memory is read as the kernels read
it: whole vectors, prefetched, by all threads at once. Operations are a tier's own dot products,
repeated on data in the first-level cache, without scales and unpacking. Source: Williams, Waterman
and Patterson, "Roofline" (2009).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.native.engine.dispatch import features, tier
from glassllama.native.engine.gemm_amx import SHAPES, configuration, tile_at, tile_call
from glassllama.native.engine.gemm_int8 import LANES, dot
from glassllama.native.jit.code_cache import save_checksums
from glassllama.native.jit.compile import entry
from glassllama.native.jit.intrinsics import (
    F32,
    I8,
    I32,
    I64,
    LINE,
    Vectors,
    cgutils,
    instruction,
    number,
    types,
    vector,
)
from glassllama.native.jit.memory import HUGE_PAGE, own_memory

RUNS = 7  # the fastest of them is the bound
STREAMS, LINES = 4, 2  # read in turns, two lines of each: no sum waits for the one before
SOON = (
    512  # bytes ahead. With one stream, or 8 KB ahead, or neither: 4 to 20 % slower (docs/log.md)
)
WORDS = vector(I64, LINE // 8)
WEIGHTS, INPUTS = 3, 4  # vectors: twelve sums of products, enough for two units of five cycles
TILES = 2  # AMX: two tiles of weights times two of inputs
TILE_ROWS = 16
MIN_SECONDS = 0.02  # of multiplying: much longer than waking a thread


# --- reading --------------------------------------------------------------------------------------


@instruction(returns=types.int64)
def sum_of_words(v: Vectors, address: Any, stream: Any) -> Any:
    """The sum, modulo 2⁶⁴, of all 64-bit words of four consecutive stretches of `stream` bytes
    (a multiple of 128)."""
    b, size = v.builder, LINES * LINE
    starts = [b.add(address, b.mul(stream, number(n))) for n in range(STREAMS)]

    def some(index: Any, sums: list[Any]) -> list[Any]:
        lines = []
        for location in [v.step(start, index, size) for start in starts]:
            v.prefetch(v.at(location, SOON), size)
            lines += [v.load(v.at(location, LINE * n), WORDS, LINE) for n in range(LINES)]
        return [b.add(s, line) for s, line in zip(sums, lines, strict=True)]

    rounds = b.udiv(stream, number(size))
    first, *others = v.count_up(rounds, [v.same(WORDS, 0)] * (STREAMS * LINES), some)
    for other in others:
        first = b.add(first, other)
    return v.folded(first, b.add)


@cache
def reader() -> Callable[[int, int], int]:
    def read(address: int, stream: int) -> int:
        return sum_of_words(address, stream)  # type: ignore[no-any-return]

    return entry(read)


def read_bandwidth(nbytes: int, threads: int) -> float:
    """Bytes per second that so many threads read, repeatedly, from `nbytes` of memory.

    With as many bytes as a model's weights, caches have the same effect as on the model.
    """
    stream = max(1, nbytes // (STREAMS * LINES * LINE * threads)) * LINES * LINE
    memory = own_memory(stream * STREAMS * threads)
    memory[:] = 1  # pages that were never written are not in memory
    read, first = reader(), memory.ctypes.data
    tasks = [partial(read, first + t * stream * STREAMS, stream) for t in range(threads)]
    return len(memory) / fastest(tasks)


# --- multiplying ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """A dot product instruction and the work of one round."""

    needs: frozenset[str]  # of the processor, by LLVM's names
    ones: bytes  # the number 1 as an input
    sums: Any  # numpy's type of the sums
    products: int  # of a round


def in_vectors(needs: str, ones: bytes, sums: Any, products: int) -> Dot:
    """Instructions that compute so many products of two vectors."""
    return Dot(frozenset(needs.split()), ones, sums, WEIGHTS * INPUTS * products)


def in_tiles(needs: str, ones: bytes, sums: Any) -> Dot:
    """Each instruction: 16 × 16 sums, of as many products as fit into 64 bytes."""
    deep = LINE // len(ones)
    return Dot(frozenset(needs.split()), ones, sums, TILES**2 * TILE_ROWS**2 * deep)


BYTE_ONE, BFLOAT_ONE, FLOAT_ONE = b"\1", b"\x80\x3f", struct.pack("<f", 1)
DOTS = {
    "int8 amx": in_tiles("amx-tile amx-int8", BYTE_ONE, np.int32),
    "int8 vnni": in_vectors("avx512vnni avx512vl", BYTE_ONE, np.int32, 64),
    "int8 avxvnni": in_vectors("avxvnni", BYTE_ONE, np.int32, 32),
    "int8 avx2": in_vectors("avx2", BYTE_ONE, np.int32, 32),
    "int8 neon": in_vectors("neon dotprod", BYTE_ONE, np.int32, 16),
    "bfloat16 amx": in_tiles("amx-tile amx-bf16", BFLOAT_ONE, np.float32),
    "bfloat16 avx512": in_vectors("avx512bf16", BFLOAT_ONE, np.float32, 32),
    "float32 avx512": in_vectors("avx512f", FLOAT_ONE, np.float32, 16),
    "float32": in_vectors("", FLOAT_ONE, np.float32, 8),
}
Q11 = ("int8 vnni", "bfloat16 avx512", "float32 avx512")
TIER_DOTS = {
    "amx": ("int8 amx", "bfloat16 amx", *Q11),
    "vnni": Q11,
    "avxvnni": ("int8 avxvnni", "float32"),
    "avx2": ("int8 avx2", "float32"),
    "neon": ("int8 neon", "float32"),
    "plain": ("float32",),
}
TILE_PRODUCTS = {"int8 amx": "tdpbsud", "bfloat16 amx": "tdpbf16ps"}


def dots_of(name: str) -> list[str]:
    """The dot products that a tier's kernels could use here: for int8, bfloat16, float32."""
    return [each for each in TIER_DOTS[name] if DOTS[each].needs <= features()]


def peaks(threads: int) -> dict[str, float]:
    """Operations (a product and a sum are two) per second on so many threads, by dot product.

    Those of the tier in use; the plain one has none for integers.
    """
    return {name: multiply_rate(name, threads) for name in dots_of(tier())}


def multiply_rate(name: str, threads: int) -> float:
    """Operations per second of one of DOTS, which this processor must have."""
    work, rounds = multiplier(name), 1000
    memories = [buffers_of(name) for _ in range(threads)]

    def seconds(rounds: int) -> float:
        return fastest(
            [partial(work, rounds, m[0].ctypes.data, m[1].ctypes.data) for m in memories]
        )

    while seconds(rounds) < MIN_SECONDS:
        rounds *= 4
    return 2 * DOTS[name].products * rounds * threads / seconds(rounds)


def buffers_of(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A thread's inputs, all ones, and its sums: they fit into the first-level cache."""
    size = TILE_ROWS * LINE * TILES**2
    both = own_memory(max(HUGE_PAGE, 2 * size))
    both[:size] = np.frombuffer(DOTS[name].ones * (size // len(DOTS[name].ones)), np.uint8)
    return both[:size], both[size : 2 * size]


def count_products(name: str, rounds: int) -> float:
    """The sum after so many rounds of one times one: the number of products."""
    ones, sums = buffers_of(name)
    multiplier(name)(rounds, ones.ctypes.data, sums.ctypes.data)
    return float(sums.view(DOTS[name].sums).astype(np.float64).sum())


@cache
def multiplier(name: str) -> Callable[[int, int, int], None]:
    """(rounds, address of ones, address of sums): compiled, one round is DOTS[name].products."""

    def work(rounds: int, ones: int, sums: int) -> None:
        multiply(name, rounds, ones, sums)

    return entry(work)


@instruction(constants=1)
def multiply(v: Vectors, name: str, rounds: Any, ones: Any, sums: Any) -> None:
    """The work of `multiplier`: one of DOTS."""
    write = multiply_tiles if name in TILE_PRODUCTS else multiply_vectors
    write(v, name, rounds, ones, sums)


def multiply_vectors(v: Vectors, name: str, rounds: Any, ones: Any, sums: Any) -> None:
    """Inputs stay in registers, weights come from the nearest cache: as in a kernel's tile."""
    numbers, target = name.split()[0], name.split()[-1]
    lanes = LANES.get(target, 16 if target == "avx512" else 8)
    operand = {"int8": vector(I8, 4 * lanes), "bfloat16": vector(I32, lanes)}
    kind, total = operand.get(numbers, vector(F32, lanes)), I32 if numbers == "int8" else F32
    size = 4 * lanes

    def product(sum: Any, weights: Any, inputs: Any) -> Any:
        if numbers == "int8":
            return dot(v, target, sum, weights, inputs)
        if numbers == "bfloat16":
            return v.call("llvm.x86.avx512bf16.dpbf16ps.512", sum.type, sum, weights, inputs)
        return v.fused(weights, inputs, sum)

    def some(index: Any, sums: list[Any]) -> list[Any]:
        start = v.step(ones, v.builder.and_(index, number(1)), LINE * WEIGHTS)
        weights = [v.load(v.at(start, LINE * n), kind, size) for n in range(WEIGHTS)]
        pairs = [(w, x) for w in weights for x in inputs]
        return [product(s, w, x) for s, (w, x) in zip(sums, pairs, strict=True)]

    beyond = v.at(ones, 2 * WEIGHTS * LINE)
    inputs = [v.load(v.at(beyond, LINE * n), kind, size) for n in range(INPUTS)]
    zero = v.same(vector(total, lanes), 0 if total == I32 else 0.0)
    for n, result in enumerate(v.count_up(rounds, [zero] * (WEIGHTS * INPUTS), some)):
        v.store(result, v.at(sums, LINE * n), size)


def multiply_tiles(v: Vectors, name: str, rounds: Any, ones: Any, sums: Any) -> None:
    """Four tiles of sums; weights and inputs are loaded again for every four products."""
    size = TILE_ROWS * LINE
    location = cgutils.alloca_once(v.builder, vector(I32, 16))
    v.builder.store(configuration(SHAPES["floats"]), location)
    tile_call(v, "ldtilecfg", v.builder.bitcast(location, I8.as_pointer()))
    for t in range(TILES**2):
        tile_call(v, "tilezero", t)

    def some(index: Any, nothing: list[Any]) -> list[Any]:
        for t in range(2 * TILES):
            tile_at(v, "tileloadd64", 4 + t, v.at(ones, size * t))
        for t in range(TILES**2):
            tile_call(v, TILE_PRODUCTS[name], t, 4 + t // TILES, 4 + TILES + t % TILES)
        return nothing

    v.count_up(rounds, [], some)
    for t in range(TILES**2):
        tile_at(v, "tilestored64", t, v.at(sums, size * t))
    tile_call(v, "tilerelease")


# --- time -----------------------------------------------------------------------------------------


def fastest(tasks: Sequence[Callable[[], object]]) -> float:
    """Seconds of the fastest of a few runs, one thread per task, all at once."""
    tasks[0]()  # compiles, on one thread
    save_checksums()
    seconds = []
    with ThreadPoolExecutor(len(tasks)) as pool:
        for _ in range(RUNS):
            started = time.perf_counter()
            for done in [pool.submit(work) for work in tasks]:
                done.result()
            seconds.append(time.perf_counter() - started)
    return min(seconds)
