"""How this engine's functions become machine code: once, kept on disk, without the GIL.

Numba keeps compiled code per source file; ours depend on each other across files. So the folder
that keeps them is named after the digest of the whole engine: another engine, another folder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import njit
from numba.extending import intrinsic

from glassllama.base.code_cache import folder_for, going_on
from glassllama.base.interrupts import hold_while_compiling

F = TypeVar("F", bound=Callable[..., Any])

# The arithmetic that is written and no other. Not even contraction (fused multiply-add): either
# product of a·b − c·d may be fused, and code just compiled and code from disk chose differently.
STRICT: set[str] = set()
# Reassociation lets sums go in parallel: for plain kernels, and sums that are exact in any order.
# Never `nnan` or `ninf`: a NaN in the weights must come out in the logits.
LOOSE = {"contract", "reassoc", "nsz", "arcp"}

hold_while_compiling()


@lru_cache(maxsize=1)
def code_folder() -> Path | None:
    """Where machine code is kept, or None (and a note) where nothing can be written."""
    return folder_for("compiled", Path(__file__).parent, numba.__version__)


def keep_in_cache(build: Callable[[bool], Any]) -> Any:
    """Run a Numba decorator so that what it makes is cached in our folder and nowhere else.

    `build` gets the decorator's `cache` option.
    """
    folder = code_folder()
    if folder is None:
        return build(False)
    settings: Any = numba.config
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
    try:
        return going_on(build(True))
    finally:
        settings.CACHE_DIR = before


def native(function: F, fastmath: set[str], **more: bool) -> F:
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": fastmath, **more}
    return cast(F, keep_in_cache(lambda keep: njit(cache=keep, **options)(function)))


def entry(function: F) -> F:
    """Machine code that Python calls too."""
    return native(function, STRICT)


# Python does not call these: the way in and out of each one would double its time to compile.
INSIDE = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def compiled(function: F) -> F:
    """Machine code for other compiled functions, in the arithmetic that is written."""
    return native(function, STRICT, **INSIDE)


def loosely(function: F) -> F:
    """The same, but sums may be taken in any order, so that they vectorise."""
    return native(function, LOOSE, **INSIDE)


def inlined(function: F) -> F:
    """A small function that vanishes into its callers, under their rules of arithmetic."""
    return cast(F, njit(inline="always", error_model="numpy")(function))


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function written in LLVM's own words: see intrinsics.py."""
    return cast(Callable[..., Any], intrinsic(function))


def instruction_for_constants(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, where some arguments are constants that decide what is written."""
    return cast(Callable[..., Any], intrinsic(prefer_literal=True)(function))
