"""Matrix registers of Intel's AMX: eight tiles of up to sixteen rows of 64 bytes each.

An instruction multiplies two tiles and adds to a third: rows of the first are tokens, and the
second holds four bytes (or two bfloat16) of each of sixteen outputs in a row, as in layout.py.
Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter 3 (AMX).
"""

from __future__ import annotations

import ctypes
import struct
import sys
from functools import cache
from typing import Any

from llvmlite import ir

from glassllama.native.jit.intrinsics import (
    I8,
    I32,
    LINE,
    Vectors,
    cgutils,
    instruction,
    number,
    types,
    vector,
)

ROWS_OFFSET = 48  # of the rows of tile 0 in a configuration
# Rows and bytes of a row of each tile; 0: as many rows as there are tokens.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "integers": ((16, 64), (16, 32), (8, 64)),  # see gemm_amx.py
    "floats": ((16, 64),) * 8,  # see gemm_amx.py and gemm_kquant_amx.py
    "floats of few": (*((0, 64),) * 5, *((16, 64),) * 3),
}
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


@cache
def permitted() -> bool:
    """Ask the system for the registers: they are large, so Linux requires a request."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)


def configuration(shapes: tuple[tuple[int, int], ...]) -> Any:
    """The 64 bytes of a tile configuration, as a constant of sixteen words."""
    none = [0] * (16 - len(shapes))
    rows, widths = ([shape[n] for shape in shapes] + none for n in (0, 1))
    words = struct.unpack("<16I", struct.pack("<BB14x16H16B", 1, 0, *widths, *rows))
    return ir.Constant(vector(I32, 16), list(words))


def tile_call(v: Vectors, name: str, *arguments: Any) -> None:
    """An AMX instruction; tiles are named by constants of eight bits."""
    values = [ir.Constant(I8, a) if isinstance(a, int) else a for a in arguments]
    v.call(f"llvm.x86.{name}", ir.VoidType(), *values)


def tile_at(v: Vectors, name: str, tile: int, address: Any, stride: Any = LINE) -> None:
    """Load or store a tile, whose rows are so many bytes apart."""
    apart = number(stride) if isinstance(stride, int) else stride
    tile_call(v, name, tile, v.builder.inttoptr(address, I8.as_pointer()), apart)


@instruction(constants=1, returns=types.int64)
def scratch(v: Vectors, lines: int) -> Any:
    """So many cache lines of the caller's own stack -> their address."""
    location = cgutils.alloca_once(v.builder, vector(I8, LINE), size=lines)
    return v.builder.ptrtoint(location, number(0).type)


@instruction(constants=1)
def begin_tiles(v: Vectors, name: str, tokens: Any) -> None:
    """Give the tiles the shapes of this name."""
    location = cgutils.alloca_once(v.builder, vector(I32, 16))
    v.builder.store(configuration(SHAPES[name]), location)
    start = v.builder.bitcast(location, I8.as_pointer())
    for tile, (rows, _) in enumerate(SHAPES[name]):
        if rows == 0:
            own = v.builder.gep(start, [ir.Constant(I32, ROWS_OFFSET + tile)])
            v.builder.store(v.builder.trunc(tokens, I8), own)
    tile_call(v, "ldtilecfg", start)


@instruction()
def end_tiles(v: Vectors) -> None:
    """Release the registers: the system need not save them any more."""
    tile_call(v, "tilerelease")
