"""Speed of the engine on this machine: kernels by tier and weight type, then steps of a model.

    python benchmarks/engine.py [MODEL.gguf]      (without a model: kernels only)

Kernels run on one thread: one token with a matrix far larger than the caches (bound by memory
bandwidth), and many tokens with a small matrix (bound by arithmetic). Prints the machine, the
number of threads and the roofline of one thread (native/roofline.py), then a table.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numba import njit

from glassllama.native.engine import gemm_kquant_amx
from glassllama.native.engine.dispatch import TIERS, features, kernel_address, tier
from glassllama.native.engine.layout import (
    FACTORS,
    Q11_BYTES,
    InputFormat,
    Matrix,
    WeightType,
    allocate_matrices,
)
from glassllama.native.engine.thread_pool import num_processors
from glassllama.native.jit.intrinsics import call_kernel
from glassllama.native.jit.memory import own_memory
from glassllama.native.roofline import peaks, read_bandwidth

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from rows import Rows

ROUNDS = 7
BANDWIDTH_BYTES = 1 << 29  # larger than most caches


def seconds(work: Callable[[], Any]) -> float:
    """Median time of a call, after one warm-up call."""
    work()
    return median(timed(work) for _ in range(ROUNDS))


@njit(nogil=True)
def call(address, arguments):
    call_kernel(address, arguments)


def random_matrix(weight_type: WeightType, rows: int, columns: int) -> Matrix:
    """Random codes, small scales: speed does not depend on the values while they are finite."""
    rng = np.random.default_rng(0)
    matrix = allocate_matrices({"": (weight_type, rows, columns)})[""]
    if weight_type.is_float:
        numbers = matrix.values.view(weight_type.dtype)
        numbers[:] = rng.standard_normal(numbers.shape[-1]).astype(weight_type.dtype)
    else:
        matrix.values[:] = rng.integers(0, 256, matrix.values.shape[-1], dtype=np.uint8)
        scales = matrix.scales.view(np.float16)
        scales[:] = rng.uniform(0.001, 0.01, scales.shape[-1]).astype(np.float16)
    return matrix


def aligned(kind: Any, *shape: int) -> Any:
    """An array aligned to a cache line, like the engine's buffers."""
    return own_memory(math.prod(shape) * np.dtype(kind).itemsize).view(kind).reshape(shape)


def kernel_call(tier_name: str, matrix: Matrix, tokens: int) -> Callable[[], None]:
    """A call of the matrix's kernel with buffers of its own."""
    columns, input_format = matrix.columns, matrix.weight_type.input_format
    if tier_name == "amx" and matrix.weight_type in gemm_kquant_amx.BASE:
        input_format = InputFormat.Q11
    if input_format is InputFormat.Q11:
        x = factors = aligned(np.uint8, columns // 256 + 1, tokens, Q11_BYTES)
    else:
        x = aligned(np.float32 if matrix.weight_type.is_float else np.int8, tokens, columns)
        factors = aligned(np.float32, tokens, columns // 32, FACTORS)
    out = aligned(np.float32, tokens, matrix.padded_rows)
    address = kernel_address(matrix.weight_type, tier_name, input_format)
    arguments = (
        matrix.values.ctypes.data, matrix.scales.ctypes.data, matrix.weight_type.blocks(columns),
        x.ctypes.data, x.strides[-2], factors.ctypes.data, factors.strides[0], tokens,
        out.ctypes.data, out.strides[0], 0, matrix.groups,
    )  # fmt: skip
    buffers = (matrix, x, factors, out)  # kept as long as the function

    def run(buffers: Any = buffers) -> None:
        call(address, arguments)

    return run


def kernels() -> None:
    tiers = [name for name, needed in TIERS.items() if needed <= features()]
    print(f"{'one thread':8}" + "".join(f"{name:>24}" for name in tiers))
    for kind in WeightType:
        large, small = random_matrix(kind, 49152, 2048), random_matrix(kind, 3072, 768)
        cells = []
        for name in tiers:
            stream = large.nbytes / seconds(kernel_call(name, large, 1)) / 1e9
            rate = 2 * 3072 * 768 * 96 / seconds(kernel_call(name, small, 96)) / 1e9
            cells.append(f"{stream:8.1f} GB/s {rate:5.0f} GOP/s")
        print(f"{kind.name:8}" + "".join(f"{cell:>24}" for cell in cells))


def beside_q8_0(bandwidth: float) -> None:
    """Every block type of the best tier, in turns with Q8_0: medians, ratios of pairs."""
    name, few, many = tier(), (49152, 4096, 1), (4096, 4096, 128)
    print(f"\n{name:8}{'bits':>6}{'one token: ms':>15}{'bound':>7}{'x Q8_0':>8}{'(bits)':>8}"
          f"{'128 tokens: ms':>16}{'x Q8_0':>8}")  # fmt: skip
    theirs = [kernel_call(name, random_matrix(WeightType.Q8_0, *size[:2]), size[2])
              for size in (few, many)]  # fmt: skip
    for kind in WeightType:
        if kind.is_float:
            continue
        cells, bits = [], 8 * (kind.value_bytes + kind.scale_bytes) / (16 * kind.block)
        for size, other in zip((few, many), theirs, strict=True):
            ours = kernel_call(name, random_matrix(kind, *size[:2]), size[2])
            pairs = [(timed(ours), timed(other)) for _ in range(2 * ROUNDS)]
            cells.append((median(a for a, _ in pairs), median(b / a for a, b in pairs)))
        bound = few[0] * few[1] * bits / 8 / bandwidth
        (one, more), (prompt, faster) = cells
        print(f"{kind.name:8}{bits:6.2f}{1e3 * one:15.2f}{1e3 * bound:7.2f}{more:8.2f}"
              f"{8.5 / bits:8.2f}{1e3 * prompt:16.1f}{faster:8.2f}", flush=True)  # fmt: skip


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def steps(path: str) -> None:
    """Decode after a short prompt, prefill of 512 tokens, batches of 8."""
    from glassllama.weights.checkpoint import open_checkpoint
    from glassllama.weights.pack import pack

    started = time.perf_counter()
    engine = pack(open_checkpoint(path))
    print(f"\nloaded in {time.perf_counter() - started:.2f} s; {engine.describe()[0]}")
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, 512).tolist()

    def prefill() -> None:
        Rows(engine).next_logits([ids])

    def decode(batch: int) -> Callable[[], None]:
        cache = Rows(engine, batch)
        cache.next_logits([ids[:8]] * batch)

        def decode_32() -> None:
            for id in ids[:32]:
                cache.next_logits([[id]] * batch)

        return decode_32

    rate = 32 / seconds(decode(1))
    print(f"decode {rate:.0f} tok/s ({rate * engine.weights.nbytes / 1e9:.1f} GB/s of weights)")
    print(f"prefill 512 {512 / seconds(prefill):.0f} tok/s, batch of 8 "
          f"{256 / seconds(decode(8)):.0f} tok/s")  # fmt: skip


def main() -> None:
    best = ", ".join(f"{name} {rate / 1e9:.0f} GOP/s" for name, rate in peaks(1).items())
    machine = platform.processor() or platform.machine()
    bandwidth = read_bandwidth(BANDWIDTH_BYTES, 1)
    print(f"{machine}, {num_processors()} processors; one thread "
          f"reads {bandwidth / 1e9:.1f} GB/s; {best}")  # fmt: skip
    kernels()
    beside_q8_0(bandwidth)
    if len(sys.argv) > 1:
        steps(sys.argv[1])


if __name__ == "__main__":
    main()
