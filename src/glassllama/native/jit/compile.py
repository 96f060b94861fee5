"""Decorators that compile functions with Numba, without the GIL, cached on disk.

Numba's cache checks one source file at a time, but compiled functions depend on each other and on
constants across files. So the cache folders are named after the digest of all sources of `native`.

The decorators `raw_…` compile without Numba's reference counting, which takes half the time of
loops over bytes. Such code cannot allocate arrays: it uses those that Python passes in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import njit
from numba.core.ccallback import CFunc

from glassllama.native.jit.code_cache import best_effort_cache, folder_for
from glassllama.native.jit.deferred_signals import defer_signals_while_compiling

F = TypeVar("F", bound=Callable[..., Any])
Int = Any  # a number in compiled code: a machine integer, signed or not, of 8 to 64 bits

# Exactly the arithmetic that is written. No contraction (fused multiply-add) either: each product
# of a·b − c·d may be fused, and code just compiled and the same code from disk chose differently.
STRICT: set[str] = set()
# Reassociation lets loops over sums vectorize: for plain kernels, and sums that are exact in any
# order. Never `nnan` or `ninf`: a NaN in the weights must reach the logits.
LOOSE = {"contract", "reassoc", "nsz", "arcp"}
# Wrappers that are not used are not compiled: they would double the time to compile.
INTERNAL = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # not called by Python
RAW = {"nogil": True, "error_model": "numpy", "_nrt": False}

CALLBACKS: list[Any] = []  # their machine code is kept as long as the process lives

defer_signals_while_compiling()


def frozen_sources() -> list[Path]:
    """The source files that compiled code depends on, in a fixed order: all of native/.

    tests/native/test_frozen_sources.py checks that no constant from elsewhere is compiled in.
    """
    return sorted(Path(__file__).parent.parent.rglob("*.py"))


@lru_cache(maxsize=3)
def code_folder(part: str) -> Path | None:
    """The cache folder for machine code of native/`part`; None (and a note) if unusable."""
    return folder_for(part, frozen_sources(), numba.__version__)


def keep_in_cache(part: str, build: Callable[[bool], Any]) -> Any:
    """Run a Numba decorator so that its machine code is cached in the folder of native/`part`.

    `build` gets the decorator's `cache` option.
    """
    folder = code_folder(part)
    if folder is None:
        return build(False)
    settings: Any = numba.config
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
    try:
        return best_effort_cache(build(True))
    finally:
        settings.CACHE_DIR = before


def cached_on_disk(function: F, **options: Any) -> F:
    """Compile a function at its first call, with Numba's `options`; cached on disk."""
    made = keep_in_cache(part_of(function), lambda keep: njit(cache=keep, **options)(function))
    return cast(F, made)


def part_of(function: Callable[..., Any]) -> str:
    """The part of `native` that defines a function: engine, tokenizers, training or jit."""
    names = function.__module__.split(".")
    return names[2] if names[:2] == ["glassllama", "native"] else "engine"


def native(function: F, fastmath: set[str], **more: bool) -> F:
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    return cached_on_disk(function, **options, **more)


def entry(function: F) -> F:
    """Compile a function that Python calls."""
    return native(function, STRICT)


def compiled(function: F) -> F:
    """Compile a function that other compiled functions call."""
    return native(function, STRICT, **INTERNAL)


def reassociating(function: F) -> F:
    """The same, but sums may be taken in any order, so that loops vectorize."""
    return native(function, LOOSE, **INTERNAL)


def inlined(function: F) -> F:
    """A small function that is inlined into its callers, with their rules of arithmetic."""
    return cast(F, njit(inline="always", error_model="numpy")(function))


def joined(function: F) -> F:
    """The same, inlined by LLVM: compiled once for all callers, but by the rules of STRICT."""
    return cast(F, njit(forceinline=True, error_model="numpy")(function))


def raw_entry(function: F) -> F:
    """Compile a function that Python calls, without reference counting."""
    return cached_on_disk(function, **RAW, no_cfunc_wrapper=True)


def raw_compiled(function: F) -> F:
    """Compile a function that other raw functions call."""
    return cached_on_disk(function, **RAW, **INTERNAL)


def raw_inlined(function: F) -> F:
    """The same, inlined by LLVM: a call would pass the descriptors of all its arrays."""
    return cached_on_disk(function, **RAW, **INTERNAL, forceinline=True)


def callback_address(signature: Any, function: Callable[..., Any], fastmath: set[str]) -> int:
    """Compile a function that is called by its address, and by nobody before that -> the address.

    Numba's own `cfunc` compiles before its cache can be wrapped: a full disk would be an error, and
    the checksums would not learn of the new file.
    """

    def build(keep: bool) -> Any:
        options = {"error_model": "numpy", "fastmath": fastmath}
        form = (signature.args, signature.return_type)
        made = CFunc(function, form, locals={}, options=options)
        if keep:
            made.enable_caching()
        return made

    made = keep_in_cache("engine", build)
    made.compile()
    CALLBACKS.append(made)
    return int(made.address)
