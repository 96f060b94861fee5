"""Memory layout of packed weight matrices: one 64-byte vector serves sixteen outputs at once.

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
nibble order are those of the file: repack.py only rearranges them.
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

# Input formats of kernels. They are flags, because several kernels may read the same inputs.
FLOAT32, INT8, BFLOAT16, Q11 = 0, 1, 2, 4
# By default Python maps shared memory, which gets no huge pages.
PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)


@dataclass(frozen=True)
class WeightType:
    """A packed format of weights. Sizes in bytes, per group of sixteen rows and block of inputs."""

    name: str
    block: int  # inputs per block
    value_bytes: int
    scale_bytes: int
    integer_inputs: bool  # its kernels read int8 inputs with scales, else float32

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block)


WEIGHT_TYPES = {
    weight_type.name: weight_type
    for weight_type in (
        WeightType("F32", 1, GROUP * 4, 0, integer_inputs=False),
        WeightType("F16", 1, GROUP * 2, 0, integer_inputs=False),
        WeightType("BF16", 1, GROUP * 2, 0, integer_inputs=False),
        WeightType("Q8_0", BLOCK, GROUP * BLOCK, GROUP * 2, integer_inputs=True),
        WeightType("Q4_0", BLOCK, GROUP * BLOCK // 2, GROUP * 2, integer_inputs=True),
        WeightType("Q4_1", BLOCK, GROUP * BLOCK // 2, GROUP * 4, integer_inputs=True),
        WeightType("Q4_K", BLOCK, GROUP * BLOCK // 2, GROUP * 5 // 2, integer_inputs=True),
        WeightType("Q6_K", BLOCK, GROUP * BLOCK * 3 // 4, GROUP * 9 // 4, integer_inputs=True),
    )
}


@dataclass(frozen=True)
class Matrix:
    """A packed weight matrix: rows are outputs, columns inputs."""

    weight_type: WeightType
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
    """A zeroed array that begins at a cache line. Parts that are never used take no memory."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    array: NDArray[Any] = memory[start : start + nbytes].view(dtype).reshape(shape)
    return array


def own_memory(nbytes: int) -> NDArray[np.uint8]:
    """Private zeroed memory, aligned, in huge pages if the system has them."""
    mapping = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE) + HUGE_PAGE, **PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    return memory[start : start + nbytes]


class Arena:
    """One aligned block of memory for all weights, allocated from front to back."""

    def __init__(self, nbytes: int, memory: NDArray[np.uint8] | None = None) -> None:
        """`memory` begins at a multiple of ALIGNMENT: zeros, or weights packed earlier."""
        self._free = own_memory(nbytes) if memory is None else memory

    def take(self, *shape: int) -> NDArray[np.uint8]:
        """The next bytes, aligned."""
        size = int(np.prod(shape, dtype=np.int64))
        taken = self._free[:size].reshape(shape)
        self._free = self._free[aligned(size) :]
        return taken


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def packed_bytes(weight_type: WeightType, rows: int, columns: int) -> int:
    """How many bytes of an arena a matrix takes."""
    cells = -(-rows // GROUP) * weight_type.blocks(columns)
    return aligned(cells * weight_type.value_bytes) + aligned(cells * weight_type.scale_bytes)


def empty_matrix(arena: Arena, weight_type: WeightType, rows: int, columns: int) -> Matrix:
    """A matrix in the next bytes of the arena."""
    groups, blocks = -(-rows // GROUP), weight_type.blocks(columns)
    values = arena.take(groups, blocks, weight_type.value_bytes)
    scales = arena.take(groups, blocks, weight_type.scale_bytes)
    return Matrix(weight_type, rows, columns, values, scales)
