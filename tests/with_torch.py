"""Scripts as forks of a process that has imported PyTorch and what loads and trains: forks.py.

For what only a process of its own can show, as its peak of memory: PyTorch takes seconds to import.
"""

import gc
import os
import sys

import gguf  # noqa: F401
import numba  # noqa: F401
import torch  # noqa: F401

from forks import serve


def run(request: list[str]) -> None:
    script, *sys.argv[1:] = request
    gc.enable()
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    os._exit(0)  # to free what was imported, module by module, takes half a second


serve(run)
