"""Speed of converting stored weights to float32 on one core, compared with the `gguf` package.

    python benchmarks/blocks.py [--megabytes 256] [--repeats 5]

Prints a table, then one line of JSON. GB/s are float32 bytes written per second of the thread's CPU
time, so that waiting for a busy core does not count; medians of the repeats, alternating between
the two packages.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import gguf
import numpy as np

from glassllama.formats.blocks import ELEMENT_TYPES, SUPPORTED, TYPES, dequantize

COLUMNS = 4096  # of the matrix that is converted
FLOAT_BYTES = 4


def core_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def stored_matrix(dtype: str, rows: int) -> np.ndarray:
    """Normal numbers for plain types; random bytes for blocks: speed does not depend on values."""
    rng = np.random.default_rng(0)
    if dtype in ELEMENT_TYPES:
        return rng.normal(size=(rows, COLUMNS)).astype(ELEMENT_TYPES[dtype])
    layout = TYPES[dtype]
    return rng.integers(0, 256, (rows, COLUMNS // layout.elements * layout.bytes), dtype=np.uint8)


def measure(dtype: str, rows: int, repeats: int) -> dict[str, float]:
    """GB/s of glassllama (into a given array, as in streaming, and a new one) and of gguf."""
    raw, shape = stored_matrix(dtype, rows), (rows, COLUMNS)
    out = np.zeros(shape, np.float32)
    kind = getattr(gguf.GGMLQuantizationType, dtype)
    work = {
        "ours": lambda: dequantize(raw, dtype, shape, out=out),
        "ours_new": lambda: dequantize(raw, dtype, shape),
        "gguf": lambda: gguf.quants.dequantize(raw.view(np.uint8), kind),
    }
    if dtype in ("F64", "F32"):
        del work["gguf"]  # gguf does not convert F64, and does not copy F32
    times: dict[str, list[float]] = {name: [] for name in work}
    with np.errstate(all="ignore"):
        for _ in range(repeats):
            for name, call in work.items():
                times[name].append(core_seconds(call))
    size = rows * COLUMNS * FLOAT_BYTES / 1e9
    return {name: round(size / statistics.median(taken), 2) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256, help="float32 bytes of the matrix")
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    rows = flags.megabytes * 10**6 // (COLUMNS * FLOAT_BYTES)
    print(f"{'type':6} {'GB/s':>8} {'new array':>10} {'gguf.quants':>12}")
    speeds = {}
    for dtype in SUPPORTED:
        speeds[dtype] = got = measure(dtype, rows, flags.repeats)
        print(f"{dtype:6} {got['ours']:8.2f} {got['ours_new']:10.2f} {got.get('gguf', '–'):>12}")
    machine = {"machine": platform.machine(), "numpy": np.__version__}
    print(json.dumps({"benchmark": "blocks", **machine, **vars(flags), "gb_s": speeds}))


if __name__ == "__main__":
    main()
