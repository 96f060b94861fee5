"""Profile of a step: matrix products, everything between them, and Python.

    python benchmarks/step_profile.py [MODEL]            (default: smollm2-135m)
    python benchmarks/step_profile.py --window [MODEL]   attention with a window of 512 tokens

Each step runs twice: unchanged, and with every matrix kernel replaced by one that does nothing. The
second time measures norms, attention, quantization and thread synchronization. Medians, all
threads. The last column is the bound of the matrix products: bytes / bandwidth for decode,
operations / peak for prefill.

`--window` gives the same model a window of 512 tokens in every layer, and compares attention at
4,096 tokens with that of the model without a window where a query sees 512 keys as well.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numba
import numpy as np

from glassllama import load
from glassllama.native.engine.executor import Engine
from glassllama.native.engine.workspace import KERNEL
from glassllama.native.roofline import peaks, read_bandwidth

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from rows import Rows

TOKENS, RUNS = 64, 5
WINDOW, FAR, PART = 512, 4096, 256  # tokens of the window, of a long text, of a prompt's last part
KERNEL_SIGNATURE = numba.void(*[numba.int64] * 12)  # see native/engine/gemm_plain.py


@numba.cfunc(KERNEL_SIGNATURE)
def empty_kernel(a, b, c, d, e, f, g, h, i, j, k, m):
    pass


class TimedEngine:
    """An engine whose native calls are timed."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.native = engine, 0.0
        self._run, engine._run = engine._run, self._timed

    def _timed(self, *step_args: int) -> None:
        started = time.perf_counter()
        self._run(*step_args)
        self.native += time.perf_counter() - started

    def seconds(self, work: Callable[[Any], None], runs: int) -> tuple[float, float]:
        """Median seconds in total and within native calls, without reuse from the prefix cache."""
        whole, native = [], []
        for _ in range(runs):
            self.native, started = 0.0, time.perf_counter()
            work(self.engine)
            whole.append(time.perf_counter() - started)
            native.append(self.native)
        return median(whole), median(native)

    def between(self, work: Callable[[Any], None], runs: int) -> float:
        """Median seconds within native calls if the matrix kernels of the layers do nothing."""
        table = self.engine._workspace.tables["matrices"]
        kernels = table[:-1, KERNEL].copy()
        table[:-1, KERNEL] = empty_kernel.address
        _, native = self.seconds(work, runs)
        table[:-1, KERNEL] = kernels
        return native


def random_ids(engine: Any, count: int) -> list[int]:
    return np.random.default_rng().integers(0, engine.config.vocab_size, count).tolist()


def decoding(after: int) -> Callable[[Any], Callable[[Any], None]]:
    def prepare(engine: Any) -> Callable[[Any], None]:
        cache = Rows(engine)
        cache.next_logits([random_ids(engine, after)])

        def one(engine: Any) -> None:
            cache.next_logits([[7]])
            cache.truncate(0, after)

        return one

    return prepare


def reading(count: int) -> Callable[[Any], Callable[[Any], None]]:
    def prepare(engine: Any) -> Callable[[Any], None]:
        return lambda engine: Rows(engine).next_logits([random_ids(engine, count)])

    return prepare


def continuing(after: int, count: int) -> Callable[[Any], Callable[[Any], None]]:
    """The next `count` tokens, each time those after the last ones."""

    def prepare(engine: Any) -> Callable[[Any], None]:
        cache = Rows(engine)
        cache.next_logits([random_ids(engine, after)])
        return lambda engine: cache.next_logits([random_ids(engine, count)])

    return prepare


def attention_seconds(engine: Any, after: int, count: int) -> float:
    """Median seconds of the attention of `count` tokens after `after`, in all layers.

    A step without its matrix products, less that of as many tokens at the beginning of a text.
    """
    timed, runs = TimedEngine(engine), TOKENS if count == 1 else 1
    far, near = (
        median(timed.between(continuing(n, count)(engine), runs) for _ in range(RUNS))
        for n in (after, 1)
    )
    return far - near


def window(name: str) -> None:
    full: Any = load(name).executor
    blocks = [
        replace(block, attention=replace(block.attention, window=WINDOW))
        for block in full.plan.blocks
    ]
    windowed = Engine(full.config, full.weights, plan=replace(full.plan, blocks=tuple(blocks)))
    print(f"milliseconds of attention, {full.threads} threads; a query sees about {WINDOW} keys")
    for what, count in (("a token", 1), (f"{PART} tokens", PART)):
        mean = WINDOW - max(count, TOKENS) // 2  # so that the middle one sees the window's keys
        far = attention_seconds(windowed, FAR - count, count)
        near = attention_seconds(full, mean, count)
        print(f"{what:12}{far * 1e3:8.2f} at {FAR:,} with the window,"
              f"{near * 1e3:8.2f} at {mean:,} without: {far / near:.2f} times")  # fmt: skip


def main() -> None:
    names = [each for each in sys.argv[1:] if each != "--window"] or ["smollm2-135m"]
    if "--window" in sys.argv:
        return window(names[0])
    engine: Any = load(names[0]).executor
    weights = engine.weights.matrices
    size, numbers = sum(m.nbytes for m in weights), sum(m.rows * m.columns for m in weights)
    layers = sum(m.rows * m.columns for m in weights[:-1])  # logits only of the last token
    bandwidth, best = read_bandwidth(min(size, 1 << 30), engine.threads), peaks(engine.threads)
    integers = not any(m.weight_type.is_float for m in weights)
    peak = {name: rate for name, rate in best.items() if name.startswith("int8") == integers}
    fastest = max(peak, key=lambda name: peak[name])
    works = {
        "a token after 64": (decoding(64), TOKENS, size / bandwidth),
        "a token after 1,024": (decoding(1024), TOKENS, size / bandwidth),
        "a prompt of 512": (
            reading(512), RUNS, 2 * (512 * layers + numbers - layers) / peak[fastest],
        ),
    }  # fmt: skip
    timed = TimedEngine(engine)
    print(f"{engine.threads} threads, {size / 1e6:.0f} MB of matrices, memory read at "
          f"{bandwidth / 1e9:.1f} GB/s, {fastest} {peak[fastest] / 1e9:.0f} GOP/s")  # fmt: skip
    print(f"{'milliseconds':22}{'total':>9}{'Python':>9}{'between':>9}{'matrices':>10}{'bound':>9}")
    for name, (prepare, runs, bound) in works.items():
        work = prepare(engine)
        work(engine)
        whole, native = timed.seconds(work, runs)
        between = timed.between(work, runs)
        parts = (whole, whole - native, between, native - between, bound)
        print(
            f"{name:22}"
            + "".join(
                f"{part * 1e3:>{w}.2f}" for part, w in zip(parts, (9, 9, 9, 10, 9), strict=True)
            )
        )


if __name__ == "__main__":
    main()
