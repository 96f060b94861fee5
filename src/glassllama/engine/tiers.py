"""Which kernels this processor runs: machine code and addresses, made when a model needs them."""

from __future__ import annotations

from functools import cache

from numba import cfunc, types

from glassllama.engine import kernels
from glassllama.engine.compiled import LOOSE, keep_in_cache
from glassllama.engine.intrinsics import KERNEL_ARGUMENTS

SIGNATURE = types.void(*[types.int64] * KERNEL_ARGUMENTS)


@cache
def kernel_address(kind: str) -> int:
    """The address of the compiled kernel for one packed format; it lives as long as the process."""
    entry = keep_in_cache(
        lambda keep: cfunc(SIGNATURE, fastmath=LOOSE, error_model="numpy", cache=keep)(
            kernels.PLAIN[kind]
        )
    )
    KEPT.append(entry)
    return int(entry.address)


KEPT: list[object] = []
