"""Runs scripts in forks of a process that has imported PyTorch and the modules that load and train:
see forks.py.

Only for tests that need a new process, such as its memory peak: importing PyTorch takes seconds.
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
    os._exit(0)  # freeing all imported modules takes half a second


serve(run)
