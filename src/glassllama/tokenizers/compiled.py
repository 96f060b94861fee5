"""How the tokenizers' functions become machine code: once, kept on disk, without the GIL.

Numba keeps compiled code per source file; ours call each other across files. So the folder that
keeps them is named after the digest of them all: other sources, another folder. Code is read from
it only as it was written (base/checksums.py): what is damaged is compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.extending import intrinsic

from glassllama.base.code_cache import folder_for, going_on
from glassllama.base.interrupts import hold_while_compiling

F = TypeVar("F", bound=Callable[..., Any])
Int = Any  # a number in compiled code: a machine integer, signed or not, of 8 to 64 bits
hold_while_compiling()


@lru_cache(maxsize=1)
def code_folder() -> Path | None:
    """Where machine code is kept, or None (and a note) where it cannot be."""
    return folder_for("compiled-tokenizers", Path(__file__).parent, numba.__version__)


def native(function: F, **more: bool) -> F:
    """Without Numba's reference counts, which cost a loop over bytes half its time.

    So compiled code may not make arrays: it works in those that Python hands in.
    """
    folder = code_folder()
    options: Any = {"nogil": True, "error_model": "numpy", "_nrt": False, **more}
    settings: Any = numba.config
    before = settings.CACHE_DIR
    try:
        settings.CACHE_DIR = before if folder is None else str(folder)
        made = numba.njit(cache=folder is not None, **options)(function)
        return cast(F, made if folder is None else going_on(made))
    finally:
        settings.CACHE_DIR = before


# What nobody uses is not made. The way in and out of a function that Python does not call would
# double its time to compile; nothing here is called from C.
ONLY_FROM_PYTHON = {"no_cfunc_wrapper": True}
INSIDE = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def entry(function: F) -> F:
    """Machine code that Python calls, compiled at the first call."""
    return native(function, **ONLY_FROM_PYTHON)


def compiled(function: F) -> F:
    """Machine code for other compiled functions."""
    return native(function, **INSIDE)


def inlined(function: F) -> F:
    """A function that vanishes into its callers: a call would hand on whole array descriptions."""
    return native(function, **INSIDE, forceinline=True)


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function written in LLVM's own words: see tokenizers/byte_scan.py."""
    return cast(Callable[..., Any], intrinsic(function))
