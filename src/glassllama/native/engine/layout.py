"""Memory layout of packed weights and of the inputs they are multiplied by, and all weight types.

One 64-byte vector serves sixteen outputs at once.

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

Inputs (activations) of a row, in the formats of `InputFormat`:

    F32    float32
    INT8   int8 codes, and beside them factors: two float32 for every block of 32 (the scale s, and
           s · Σ codes), then four int32 for every block: the zero-point corrections, the initial
           values of integer sums where weights are stored 128, 8 or 32 too large (−128 · Σ codes
           and so on; for 32, of either half of the block)
    BF16   bfloat16
    Q11    256 inputs with one scale s in two parts, each is s · (8 · hi + lo): see gemm_kquant_amx
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.memory import own_memory

GROUP = 16  # rows interleaved: the 32-bit lanes of a 64-byte vector
BLOCK = 32  # inputs that share a scale, in every block type of a file that is packed as it is
SUPERBLOCK = 256  # inputs that share d and dmin in K-quants
ALIGNMENT = 64
PAGE = 64  # tokens of a page of the KV cache
INT8_MAX = 127  # int8 without -128, so that the sign can always be changed

# Factors of INT8 inputs.
SCALE, TOTAL = range(2)
CORRECTION_128, CORRECTION_8, CORRECTION_32_LOW, CORRECTION_32_HIGH = range(4)
SCALE_BYTES, CORRECTION_BYTES = 8, 16  # of a block
FACTORS = (SCALE_BYTES + CORRECTION_BYTES) // 4

# Q11 inputs: offsets in bytes within a superblock of a row.
LOW_STEPS, Q11_MAX = 8, 8 * INT8_MAX
Q11_HI, Q11_LO = 0, 320  # hi and lo of all rows are equally far apart: rows of an AMX tile
Q11_SUMS = 256  # Σ of each half block as two bfloat16 that add up to it
Q11_TOTALS = 576  # the same as int16
Q11_SCALE = 608
Q11_BYTES = 2 * (Q11_LO - Q11_HI)


class InputFormat(IntFlag):
    """The input formats of kernels. They are flags: several kernels may read the same inputs."""

    F32 = 0
    INT8 = 1
    BF16 = 2
    Q11 = 4


class KVType(IntEnum):
    """How the KV cache stores keys and values: see attention_kernels.py."""

    INT16 = 0
    FLOAT32 = 1
    INT8 = 2


# For compiled code, which needs plain integers.
KV_INT16, KV_FLOAT32, KV_INT8 = (int(kv_type) for kv_type in KVType)
ITEM_BYTES = {KV_INT16: 2, KV_FLOAT32: 4, KV_INT8: 1}
IN_F32, IN_INT8, IN_BF16, IN_Q11 = (int(InputFormat[n]) for n in ("F32", "INT8", "BF16", "Q11"))


class WeightType(Enum):
    """A packed weight type, by its name in GGUF. Sizes are bytes per sixteen rows and block.

    Every other module asks this table; functions for a type are next to the code that uses them.
    """

    #       block, values, scales, in a file: dtype, or bytes of 256 inputs of a row
    F32 = (1, GROUP * 4, 0, np.float32)
    F16 = (1, GROUP * 2, 0, np.float16)
    BF16 = (1, GROUP * 2, 0, ml_dtypes.bfloat16)
    Q8_0 = (BLOCK, GROUP * 32, GROUP * 2, 8 * 34, (CORRECTION_128,))
    Q4_0 = (BLOCK, GROUP * 16, GROUP * 2, 8 * 18, (CORRECTION_8,))
    Q4_1 = (BLOCK, GROUP * 16, GROUP * 4, 8 * 20, (), True)
    Q4_K = (BLOCK, GROUP * 16, GROUP * 5 // 2, 144, (), True)
    Q6_K = (BLOCK, GROUP * 24, GROUP * 9 // 4, 210, (CORRECTION_32_LOW, CORRECTION_32_HIGH))

    def __init__(
        self,
        block: int,
        value_bytes: int,
        scale_bytes: int,
        stored: Any,
        corrections: tuple[int, ...] = (),
        has_minima: bool = False,
    ) -> None:
        self.block = block  # inputs per block
        self.value_bytes = value_bytes
        self.scale_bytes = scale_bytes
        self.stored_bytes: int = stored if isinstance(stored, int) else 0
        self.dtype: Any = None if self.stored_bytes else np.dtype(stored)
        self.corrections = corrections  # zero-point corrections: one, or one for each half block
        self.has_minima = has_minima  # the second scale is multiplied by the sum of the inputs

    @property
    def is_float(self) -> bool:
        return self.stored_bytes == 0

    @property
    def input_format(self) -> InputFormat:
        """What its kernels read, but for kernels of special tiers (dispatch.choose)."""
        return InputFormat.F32 if self.is_float else InputFormat.INT8

    @property
    def sums(self) -> int:
        """Integer sums of a block: two where sixteen inputs share a scale, not 32."""
        return max(1, len(self.corrections))

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block)


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


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def packed_bytes(weight_type: WeightType, rows: int, columns: int) -> int:
    """Memory of one packed matrix."""
    cells = -(-rows // GROUP) * weight_type.blocks(columns)
    return aligned(cells * weight_type.value_bytes) + aligned(cells * weight_type.scale_bytes)


def allocate_matrices(
    types: Mapping[str, tuple[WeightType, int, int]], memory: NDArray[np.uint8] | None = None
) -> dict[str, Matrix]:
    """Matrices by name from (type, rows, columns), one after another in one piece of memory.

    `memory` begins at a multiple of ALIGNMENT: zeros, or weights packed earlier; None allocates.
    """
    free = memory if memory is not None else own_memory(
        sum(packed_bytes(*of_matrix) for of_matrix in types.values())
    )  # fmt: skip

    def allocate(*shape: int) -> NDArray[np.uint8]:
        nonlocal free
        size = int(np.prod(shape, dtype=np.int64))
        taken, free = free[:size].reshape(shape), free[aligned(size) :]
        return taken

    matrices = {}
    for name, (weight_type, rows, columns) in types.items():
        cells = (-(-rows // GROUP), weight_type.blocks(columns))
        parts = [
            allocate(*cells, weight_type.value_bytes),
            allocate(*cells, weight_type.scale_bytes),
        ]
        matrices[name] = Matrix(weight_type, rows, columns, *parts)
    return matrices
