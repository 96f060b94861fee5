"""`make test-portable`: the numerical tests in the conditions of other processors.

PyTorch without vector instructions on one thread, then with AVX2 on two threads, each with a
similar engine tier; then the engine's tests on every other tier of this processor except the best,
which `make test` runs; then the tests marked `portable`, which compile for processors with fewer
instructions.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from glassllama.native.engine.dispatch import TIERS, features

TESTS = Path(__file__).parent
ENGINE = ["native/engine/test_engine.py", "native/engine/test_layer_plan.py"]
MARKED = ["-m", "portable", "native/engine/test_pages.py", "native/jit/test_code_cache.py"]
NUMERICAL = [
    "test_tolerances.py", "nn", "models", "parity/test_llama.py", "parity/test_gpt2.py",
    "parity/test_saved_llama.py", "walkthrough/test_tracing.py", "weights/test_stream.py",
    "train/test_optimizers.py", "native/training", "generation/test_parity.py",
    "-k", "not memory and not freed",  # tests of memory are not numerical
]  # fmt: skip


def combinations() -> list[tuple[dict[str, str], int, list[str]]]:
    """The differences from a normal run: environment, threads, which tests."""
    able = [name for name, needed in TIERS.items() if needed <= features()]  # the best one first
    x86 = platform.machine() in ("x86_64", "AMD64")
    plain = {"ATEN_CPU_CAPABILITY": "default", "GLASSLLAMA_TIER": "plain"}
    out = [(plain, 1, ENGINE + NUMERICAL)]
    if x86 and "avx2" in able:
        avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "GLASSLLAMA_TIER": "avx2"}
        out.append((avx2, 2, ENGINE + NUMERICAL))
    others = [name for name in able[1:] if name not in ("avx2", "plain")]
    out += [({"GLASSLLAMA_TIER": name}, 2, ENGINE) for name in others]
    return [*out, ({}, 1, MARKED)]


def main() -> int:
    failed = 0
    for environment, threads, tests in combinations():
        print(*(f"{k}={v}" for k, v in environment.items()), f"threads={threads}", flush=True)
        # A worker of pytest-xdist has one processor, so the engine has one thread.
        spread = ["-n", "2", "--dist", "worksteal"] if threads == 1 else []
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *spread, *tests],
            env={**os.environ, **environment, "OMP_NUM_THREADS": str(threads)},
            cwd=TESTS,
        )
        failed += done.returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
