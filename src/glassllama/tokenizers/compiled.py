"""Decorators that compile the tokenizers' functions with Numba, without the GIL, cached on disk.

As in engine/compiled.py the cache folder is named after the digest of all sources, and its files
are checked before they are read (base/checksums.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.extending import intrinsic

from glassllama.base.code_cache import best_effort_cache, folder_for
from glassllama.base.interrupts import defer_signals_while_compiling

F = TypeVar("F", bound=Callable[..., Any])
Int = Any  # a number in compiled code: a machine integer, signed or not, of 8 to 64 bits
defer_signals_while_compiling()


@lru_cache(maxsize=1)
def code_folder() -> Path | None:
    """The cache folder of machine code; None (and a note) if it cannot be used."""
    return folder_for("compiled-tokenizers", Path(__file__).parent, numba.__version__)


def native(function: F, **more: bool) -> F:
    """Compile without Numba's reference counting, which takes half the time of loops over bytes.

    So compiled code cannot allocate arrays: it uses those that Python passes in.
    """
    folder = code_folder()
    options: Any = {"nogil": True, "error_model": "numpy", "_nrt": False, **more}
    settings: Any = numba.config
    before = settings.CACHE_DIR
    try:
        settings.CACHE_DIR = before if folder is None else str(folder)
        made = numba.njit(cache=folder is not None, **options)(function)
        return cast(F, made if folder is None else best_effort_cache(made))
    finally:
        settings.CACHE_DIR = before


# Wrappers that are not used are not compiled: they would double the time to compile.
ONLY_FROM_PYTHON = {"no_cfunc_wrapper": True}
INTERNAL = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def entry(function: F) -> F:
    """A function that Python calls, compiled at the first call."""
    return native(function, **ONLY_FROM_PYTHON)


def compiled(function: F) -> F:
    """A function that other compiled functions call."""
    return native(function, **INTERNAL)


def inlined(function: F) -> F:
    """A function that is inlined: a call would pass the descriptors of all its arrays."""
    return native(function, **INTERNAL, forceinline=True)


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function written in LLVM's intermediate representation: see byte_scan.py."""
    return cast(Callable[..., Any], intrinsic(function))
