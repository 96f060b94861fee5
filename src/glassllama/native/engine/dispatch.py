"""Which kernels this processor runs; they are compiled when a model needs them.

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
from glassllama.native.engine import gemm_amx, gemm_float, gemm_int8, gemm_kquant_amx, gemm_plain
from glassllama.native.engine.layout import InputFormat, WeightType
from glassllama.native.jit.compile import LOOSE, STRICT, callback_address
from glassllama.native.jit.intrinsics import types

SIGNATURE = types.void(*[types.int64] * 12)  # see gemm_plain.py
VNNI = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c"})
AMX = frozenset({"amx-tile", "amx-int8", "amx-bf16"})
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
    """This process's instruction sets by LLVM's names; NUMBA_CPU_FEATURES can restrict them."""
    settings: Any = numba.config
    forced: str | None = settings.CPU_FEATURES
    if forced is not None:
        able = {name[1:] for name in forced.split(",") if name.startswith("+")}
    else:
        able = {name for name, there in llvm.get_host_cpu_features().items() if there}
    if able & AMX and not gemm_amx.permitted():
        able -= AMX
    return frozenset(able)


def tier() -> str:
    """The name of the tier in use. Raises GlassError if GLASSLLAMA_TIER cannot run here."""
    able = [name for name, needed in TIERS.items() if needed <= features()]
    asked = os.environ.get("GLASSLLAMA_TIER") or able[0]
    if asked not in able:
        raise GlassError(f"GLASSLLAMA_TIER={asked}: this processor can run {', '.join(able)}")
    return asked


def choose(weight_type: WeightType, columns: int) -> InputFormat:
    """What the kernel that multiplies a packed matrix here reads as inputs."""
    if tier() == "amx":
        if weight_type is WeightType.BF16 and columns % gemm_amx.STEP == 0:
            return InputFormat.BF16
        if weight_type in gemm_kquant_amx.BASE:
            return InputFormat.Q11
    return weight_type.input_format


def kernel(weight_type: WeightType, tier: str, input_format: InputFormat) -> Callable[..., None]:
    """The function to compile for a weight type: plain loops, or a tier's vectors."""
    if input_format is InputFormat.BF16:
        return gemm_amx.bf16
    if input_format is InputFormat.Q11:
        return gemm_kquant_amx.kernel(weight_type)
    if tier == "plain":
        return gemm_plain.kernel(weight_type)
    if weight_type.is_float:
        return gemm_float.kernel(weight_type)
    if tier == "amx" and weight_type.sums == 1:
        return gemm_amx.kernel(weight_type)
    # Q2_K has no kernel for matrix registers: two scales and two minima for 32 inputs.
    return gemm_int8.kernel("vnni" if tier == "amx" else tier, weight_type)


@cache
def kernel_address(weight_type: WeightType, tier: str, input_format: InputFormat) -> int:
    """The address of the compiled kernel.

    Sums of plain loops may be taken in any order, so that they vectorize. Vector kernels are left
    as they are written: tiles of one token and of many must round alike.
    """
    function = kernel(weight_type, tier, input_format)
    return callback_address(SIGNATURE, function, LOOSE if tier == "plain" else STRICT)
