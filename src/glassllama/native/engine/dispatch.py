"""Which kernels this processor runs: machine code and addresses, made when a model needs them.

    amx      the next, and matrix registers for many tokens
    vnni     AVX-512 with VNNI          neon   ARMv8.2's dot product
    avxvnni  the same on 32 bytes       plain  loops that LLVM vectorises, on any processor
    avx2     without dot products

The best that the processor has is taken, unless GLASSLLAMA_TIER names another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba

from glassllama.base.errors import GlassError
from glassllama.native.engine import (
    amx,
    gemm_amx,
    gemm_amx_float,
    gemm_int8,
    gemm_kquant_amx,
    gemm_plain,
)
from glassllama.native.engine.gemm_float import FLOAT_KERNELS
from glassllama.native.engine.layout import BFLOAT16, FLOAT32, INT8, Q11, WeightType
from glassllama.native.jit.compile import LOOSE, STRICT, callback_address
from glassllama.native.jit.intrinsics import types

SIGNATURE = types.void(*[types.int64] * 12)  # see gemm_plain.py
VNNI = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c"})
AMX = frozenset({"amx-tile", "amx-int8", "amx-bf16"})
BFLOAT_TILES = "BF16 tiles"  # a kernel of tier amx
TIERS: dict[str, frozenset[str]] = {  # best first: what the processor must have
    "amx": VNNI | AMX,
    "vnni": VNNI,
    "avxvnni": frozenset({"avxvnni", "avx2", "fma", "f16c"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "neon": frozenset({"neon", "dotprod"}),
    "plain": frozenset(),
}


@cache
def features() -> frozenset[str]:
    """What this process may use, by LLVM's names; NUMBA_CPU_FEATURES may say less."""
    settings: Any = numba.config
    forced: str | None = settings.CPU_FEATURES
    if forced is not None:
        able = {name[1:] for name in forced.split(",") if name.startswith("+")}
    else:
        able = {name for name, there in llvm.get_host_cpu_features().items() if there}
    if able & AMX and not amx.permitted():
        able -= AMX
    return frozenset(able)


def tier() -> str:
    """The name of the tier in use. Raises GlassError if GLASSLLAMA_TIER asks for what is not."""
    able = [name for name, needed in TIERS.items() if needed <= features()]
    asked = os.environ.get("GLASSLLAMA_TIER") or able[0]
    if asked not in able:
        raise GlassError(f"GLASSLLAMA_TIER={asked}: this processor can run {', '.join(able)}")
    return asked


def choose(kind: WeightType, columns: int) -> tuple[str, int]:
    """Which kernel multiplies a packed matrix, and what its inputs must be."""
    if tier() == "amx":
        if kind.name == "BF16" and columns % gemm_amx_float.STEP == 0:
            return BFLOAT_TILES, BFLOAT16
        if kind.name in gemm_kquant_amx.BASE:
            return kind.name, Q11
    return kind.name, INT8 if kind.integer_inputs else FLOAT32


def kernel(kind: str, tier: str) -> Callable[..., None]:
    """The function to compile for a packed format: plain loops, or a tier's vectors."""
    if kind == BFLOAT_TILES:
        return gemm_amx_float.bf16
    if tier == "plain":
        return gemm_plain.PLAIN[kind]
    if kind in FLOAT_KERNELS:
        return FLOAT_KERNELS[kind]
    if tier == "amx":
        whole = kind in gemm_kquant_amx.BASE
        return gemm_kquant_amx.kernel(kind) if whole else gemm_amx.kernel(kind)
    return gemm_int8.kernel(tier, kind)


@cache
def kernel_address(kind: str, tier: str) -> int:
    """The address of the compiled kernel.

    Sums of plain loops may be taken in any order, so that they vectorise. Vector kernels are left
    as they are written: tiles of one token and of many must round alike.
    """
    return callback_address(SIGNATURE, kernel(kind, tier), LOOSE if tier == "plain" else STRICT)
