"""Matrix registers of Intel's AMX: eight tiles of up to sixteen rows of 64 bytes each.

An instruction multiplies two tiles and adds to a third: rows of the first are tokens, and the
second holds four bytes (or two bfloat16) of each of sixteen outputs in a row, as layout.py has it.
Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter 3 (AMX).
"""

from __future__ import annotations

import ctypes
import struct
import sys
from functools import cache
from typing import Any

from llvmlite import ir

from glassllama.native.jit.compile import instruction, instruction_for_constants
from glassllama.native.jit.intrinsics import cgutils, types
from glassllama.native.jit.ir_builder import I8, I32, LINE, number, vector

ROWS_OFFSET = 48  # of the rows of tile 0 in a configuration
# Rows and bytes of a row of each tile; 0: as many rows as there are tokens.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "integers": ((16, 64), (16, 32), (8, 64)),  # see gemm_amx.py
    "floats": ((16, 64),) * 8,  # see gemm_amx_float.py and gemm_kquant_amx.py
    "floats of few": (*((0, 64),) * 5, *((16, 64),) * 3),
}
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


@cache
def permitted() -> bool:
    """Ask the system for the registers: they are large, so Linux wants to be asked."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)


def configuration(shapes: tuple[tuple[int, int], ...]) -> list[int]:
    """Rows and bytes of a row of each tile -> the 64 bytes that say so, as sixteen words."""
    none = [0] * (16 - len(shapes))
    rows, widths = ([shape[n] for shape in shapes] + none for n in (0, 1))
    return list(struct.unpack("<16I", struct.pack("<BB14x16H16B", 1, 0, *widths, *rows)))


def tile_call(builder: Any, name: str, *arguments: Any) -> None:
    """An AMX instruction; tiles are named by constants of eight bits."""
    values = [ir.Constant(I8, a) if isinstance(a, int) else a for a in arguments]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)


def tile_at(builder: Any, name: str, tile: int, address: Any, stride: Any = LINE) -> None:
    """Load or store a tile, whose rows are so many bytes apart."""
    apart = number(stride) if isinstance(stride, int) else stride
    tile_call(builder, name, tile, builder.inttoptr(address, I8.as_pointer()), apart)


@instruction_for_constants
def scratch(context, lines):  # type: ignore[no-untyped-def]
    """So many cache lines, a constant, of the caller's own stack -> their address."""
    count = lines.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = cgutils.alloca_once(builder, vector(I8, LINE), size=count)
        return builder.ptrtoint(place, context.get_value_type(types.int64))

    return types.int64(lines), emit


@instruction_for_constants
def begin_tiles(context, name, tokens):  # type: ignore[no-untyped-def]
    """Give the tiles the shapes of this name, a constant."""
    shapes = SHAPES[name.literal_value]

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = vector(I32, 16)
        place = cgutils.alloca_once(builder, words)
        builder.store(ir.Constant(words, configuration(shapes)), place)
        start = builder.bitcast(place, I8.as_pointer())
        for tile, (rows, _) in enumerate(shapes):
            if rows == 0:
                own = builder.gep(start, [ir.Constant(I32, ROWS_OFFSET + tile)])
                builder.store(builder.trunc(arguments[1], I8), own)
        tile_call(builder, "ldtilecfg", start)
        return context.get_dummy_value()

    return types.void(name, types.int64), emit


@instruction
def end_tiles(context: Any) -> Any:
    """Give the registers up: the system need not save them any more."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit
