"""Kernels for other processors: compiled for them, and their machine code examined."""

from __future__ import annotations

import re

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from glassllama.native.engine.gemm_int8 import row_groups_at_once, write_tile
from glassllama.native.engine.layout import WeightType
from glassllama.native.jit.intrinsics import Vectors

MACHINES = {
    "vnni": ("x86_64", "+avx512f,+avx512bw,+avx512vl,+avx512vnni,+fma,+f16c", r"vpdpbusd.*zmm"),
    "avxvnni": ("x86_64", "+avx2,+avxvnni,+fma,+f16c", r"\{vex\}\s+vpdpbusd.*ymm"),
    "avx2": ("x86_64", "+avx2,+fma,+f16c", r"vpmaddubsw.*ymm"),
    "neon": ("aarch64", "+neon,+dotprod", r"sdot\s+v"),
}


def assembly(
    target: str, kind: WeightType, groups: int, tokens: int, architecture: str, features: str
) -> str:
    """The assembly of a kernel's tile (a function of nine integers), compiled for that
    processor."""
    module = ir.Module()
    signature = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 9)
    function = ir.Function(module, signature, "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    write_tile(Vectors(builder), target, kind.name, groups, tokens, *function.args)
    builder.ret_void()
    triple = f"{architecture}-unknown-linux-gnu"
    machine = llvm.Target.from_triple(triple).create_target_machine(features=features, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.triple = triple
    parsed.verify()
    return machine.emit_assembly(parsed)


@pytest.mark.parametrize("kind", [kind for kind in WeightType if not kind.is_float])
@pytest.mark.parametrize("target", MACHINES)
def test_tiles_use_the_intended_instruction(target: str, kind: WeightType) -> None:
    architecture, features, wanted = MACHINES[target]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        llvm.Target.from_triple(f"{architecture}-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip(f"this LLVM was built without {architecture}: its kernels are not compiled")
    alone = assembly(target, kind, row_groups_at_once(target, kind), 1, architecture, features)
    assert re.search(wanted, alone)
    text = assembly(target, kind, 1, 4, architecture, features)
    dots = re.findall(wanted, text)
    assert len(dots) >= 8  # eight times four inputs of a block, at least once for every token
    assert "call" not in text
    assert not re.search(r"\bbl\b", text)
