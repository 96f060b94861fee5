"""Decorators that compile the engine's functions with Numba, without the GIL, cached on disk.

Numba's cache checks one source file at a time, but our functions depend on each other across files.
So the cache folder is named after the digest of all sources of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import njit
from numba.extending import intrinsic

from glassllama.base.code_cache import best_effort_cache, folder_for
from glassllama.base.interrupts import defer_signals_while_compiling

F = TypeVar("F", bound=Callable[..., Any])

# Exactly the arithmetic that is written. No contraction (fused multiply-add) either: each product
# of a·b − c·d may be fused, and code just compiled and the same code from disk chose differently.
STRICT: set[str] = set()
# Reassociation lets loops over sums vectorize: for plain kernels, and sums that are exact in any
# order. Never `nnan` or `ninf`: a NaN in the weights must reach the logits.
LOOSE = {"contract", "reassoc", "nsz", "arcp"}

defer_signals_while_compiling()


@lru_cache(maxsize=1)
def code_folder() -> Path | None:
    """The cache folder of machine code; None (and a note) if it cannot be used."""
    return folder_for("compiled", Path(__file__).parent, numba.__version__)


def keep_in_cache(build: Callable[[bool], Any]) -> Any:
    """Run a Numba decorator so that its machine code is cached in our folder.

    `build` gets the decorator's `cache` option.
    """
    folder = code_folder()
    if folder is None:
        return build(False)
    settings: Any = numba.config
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
    try:
        return best_effort_cache(build(True))
    finally:
        settings.CACHE_DIR = before


def native(function: F, fastmath: set[str], **more: bool) -> F:
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": fastmath, **more}
    return cast(F, keep_in_cache(lambda keep: njit(cache=keep, **options)(function)))


def entry(function: F) -> F:
    """Compile a function that Python calls."""
    return native(function, STRICT)


# Python does not call these functions: their wrappers would double the time to compile.
INTERNAL = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def compiled(function: F) -> F:
    """Compile a function that other compiled functions call."""
    return native(function, STRICT, **INTERNAL)


def reassociating(function: F) -> F:
    """The same, but sums may be taken in any order, so that loops vectorize."""
    return native(function, LOOSE, **INTERNAL)


def inlined(function: F) -> F:
    """A small function that is inlined into its callers, with their rules of arithmetic."""
    return cast(F, njit(inline="always", error_model="numpy")(function))


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function written in LLVM's intermediate representation: see intrinsics.py."""
    return cast(Callable[..., Any], intrinsic(function))


def instruction_for_constants(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, for functions some of whose arguments are compile-time constants."""
    return cast(Callable[..., Any], intrinsic(prefer_literal=True)(function))
