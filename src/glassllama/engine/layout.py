"""How a weight matrix lies in memory, so that one 64-byte vector feeds sixteen outputs at once.

Sixteen rows (outputs) make a group. Within a group the rows are interleaved, four inputs of each
row at a time, because the processor's dot instructions multiply four bytes per 32-bit lane:

    lane        0                1                     15
    bytes   row0 k0 k1 k2 k3 │ row1 k0 k1 k2 k3 │ … │ row15 k0 k1 k2 k3      one vector, 64 bytes

A block is 32 inputs of the sixteen rows, and has its scales beside it:

    Q8_0  values (G, blocks, 8, 16, 4) uint8   vector v holds inputs 4v … 4v+3, plus 128
          scales (G, blocks, 16) half          value = d · (byte − 128)
    Q4_0  values (G, blocks, 4, 16, 4) uint8   low nibble: input 4v+t, high nibble: 16+4v+t
          scales (G, blocks, 16) half          value = d · (nibble − 8)
    Q4_1  values as Q4_0
          scales (G, blocks, 2, 16) half       value = d · nibble + m, first d then m
    F32   values (G, columns, 16) float32      one input of sixteen rows is a vector already
    F16   values (G, columns, 16) half
    BF16  values (G, columns/2, 16, 2) bf16    inputs in pairs; an odd last one alone, as F16's

    Q4_K  values as Q4_0                       value = d · scale · nibble − dmin · minimum
          scales (G, blocks/8, 320) bytes      16 halves d, 16 dmin; for each of eight blocks
                                               16 bytes of scales, 16 of minima
    Q6_K  values (G, blocks, 6, 16, 4) uint8   four vectors as Q4_0, then two with the upper bits:
                                               inputs 4q+t in vector q%2, from bit 2·(q//2) on
          scales (G, blocks/8, 288) bytes      16 halves d; for each of sixteen half blocks
                                               16 signed bytes; value = d · scale · (code − 32)

G is the number of groups; a last group that is not full is padded with rows of zeros. Numbers and
nibble order are those of the file: engine/repack.py only moves them.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 16  # rows interleaved: the 32-bit lanes of a 64-byte vector
BLOCK = 32  # inputs that share a scale, in every format of the file that we keep
QUAD = 4  # inputs per lane
ALIGNMENT = 64
HUGE_PAGE = 2 << 20

# What a kernel reads its inputs as; flags, where several kernels read the same inputs.
FLOAT32, INT8, BFLOAT16, WIDE = 0, 1, 2, 4
# Python maps shared memory where nothing is said, and that gets no huge pages.
PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)


@dataclass(frozen=True)
class Kind:
    """One packed format. Sizes in bytes, per group of sixteen rows and block of inputs."""

    name: str
    block: int  # inputs per block
    value_bytes: int
    scale_bytes: int
    integer_inputs: bool  # reads its inputs as int8 with scales, else as float32

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("F32", 1, GROUP * 4, 0, integer_inputs=False),
        Kind("F16", 1, GROUP * 2, 0, integer_inputs=False),
        Kind("BF16", 1, GROUP * 2, 0, integer_inputs=False),
        Kind("Q8_0", BLOCK, GROUP * BLOCK, GROUP * 2, integer_inputs=True),
        Kind("Q4_0", BLOCK, GROUP * BLOCK // 2, GROUP * 2, integer_inputs=True),
        Kind("Q4_1", BLOCK, GROUP * BLOCK // 2, GROUP * 4, integer_inputs=True),
        Kind("Q4_K", BLOCK, GROUP * BLOCK // 2, GROUP * 5 // 2, integer_inputs=True),
        Kind("Q6_K", BLOCK, GROUP * BLOCK * 3 // 4, GROUP * 9 // 4, integer_inputs=True),
    )
}


@dataclass(frozen=True)
class Matrix:
    """A packed weight matrix: rows are outputs, columns inputs."""

    kind: Kind
    rows: int
    columns: int
    values: NDArray[np.uint8]  # (G, blocks, value_bytes)
    scales: NDArray[np.uint8]  # (G, blocks, scale_bytes)

    @property
    def groups(self) -> int:
        return len(self.values)

    @property
    def padded_rows(self) -> int:
        return self.groups * GROUP

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def zeros(dtype: Any, *shape: int) -> NDArray[Any]:
    """An array that begins at a cache line. What is never used never becomes real memory."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    array: NDArray[Any] = memory[start : start + nbytes].view(dtype).reshape(shape)
    return array


def own_memory(nbytes: int) -> NDArray[np.uint8]:
    """Zeros of this process alone, aligned, in huge pages where the system has them."""
    room = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE) + HUGE_PAGE, **PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(room, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    return memory[start : start + nbytes]


class Arena:
    """One aligned stretch of memory for all weights, handed out from front to back."""

    def __init__(self, nbytes: int, memory: NDArray[np.uint8] | None = None) -> None:
        """`memory` begins at a multiple of ALIGNMENT; zeros, or what was packed there before."""
        self._free = own_memory(nbytes) if memory is None else memory

    def take(self, *shape: int) -> NDArray[np.uint8]:
        """The next bytes, aligned."""
        size = int(np.prod(shape, dtype=np.int64))
        taken = self._free[:size].reshape(shape)
        self._free = self._free[aligned(size) :]
        return taken


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def packed_bytes(kind: Kind, rows: int, columns: int) -> int:
    """What an empty matrix takes from an arena."""
    cells = -(-rows // GROUP) * kind.blocks(columns)
    return aligned(cells * kind.value_bytes) + aligned(cells * kind.scale_bytes)


def empty_matrix(arena: Arena, kind: Kind, rows: int, columns: int) -> Matrix:
    """A matrix in the arena's next bytes: empty, or as it was packed there."""
    groups, blocks = -(-rows // GROUP), kind.blocks(columns)
    values = arena.take(groups, blocks, kind.value_bytes)
    return Matrix(kind, rows, columns, values, arena.take(groups, blocks, kind.scale_bytes))
