"""Memory layout of packed weights and of the inputs they are multiplied by, and all weight types.

One 64-byte vector serves sixteen outputs at once.

Sixteen rows (outputs) make a group. Within a group the rows are interleaved, four inputs of each
row at a time, because the processor's dot instructions multiply four bytes per 32-bit lane:

    lane        0                1                     15
    bytes   row0 k0 k1 k2 k3 │ row1 k0 k1 k2 k3 │ … │ row15 k0 k1 k2 k3      one vector, 64 bytes

A block is 32 inputs of the sixteen rows. Its codes are stored in planes of w bits each, w vectors a
plane: the codes of inputs 4q … 4q+3 are in vector q % w, from bit w · (q // w) on. One plane of
eight bits is plain bytes; a plane of four has inputs 0 … 15 in the low and 16 … 31 in the high
nibbles. A code of five bits has four lower ones in the first plane and the highest one in a second.

    F32   values (G, columns, 16) float32     one input of sixteen rows is a vector already
    F16   values (G, columns, 16) half
    BF16  values (G, columns/2, 16, 2) bf16   inputs in pairs; an odd last one alone, as F16's

             planes  a weight
    Q8_0     8       d · (code − 128)
    Q4_0     4       d · (code − 8)
    Q5_0     4, 1    d · (code − 16)
    Q4_1     4       d · code + m
    Q5_1     4, 1    d · code + m
    IQ4_NL   4       d · STEPS[code]
    MXFP4    4       d · E2M1[code]
    Q4_K     4       d · scale · code − dmin · minimum
    Q5_K     4, 1    d · scale · code − dmin · minimum
    Q2_K     2       d · scale · code − dmin · minimum
    Q3_K     2, 1    d · scale · (code − 4)
    Q6_K     4, 2    d · scale · (code − 32)
    IQ4_XS   4       d · scale · STEPS[code]

The scales of a block are beside it; in K types and IQ4_XS those of a superblock of eight blocks,
whose d and dmin are halves, are together (`ScaleLayout`):

    D          16 halves d                  DM  16 halves d, 16 halves m
    E8M0       16 bfloat16, powers of two
    SUPER_32   16 d; for each of eight blocks 16 signed bytes, the scales
    SUPER_32M  16 d, 16 dmin; for each of eight blocks 16 bytes of scales, 16 of minima
    SUPER_16   16 d; for each of sixteen half blocks 16 signed bytes
    SUPER_16M  16 d, 16 dmin; for each of sixteen half blocks 16 bytes, scale in the low nibble and
               minimum in the high one

G is the number of groups; a last group that is not full is padded with rows of zeros. Numbers are
those of the file: repack.py only rearranges them.

Inputs (activations) of a row, in the formats of `InputFormat`:

    F32    float32
    INT8   int8 codes, and beside them factors: two float32 for every block of 32 (the scale s, and
           s · Σ codes), then three int32 for every block: −Σ codes of the block and of its halves.
           Times the zero point they are the initial values of integer sums where weights are
           stored so much too large
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
BLOCK = 32  # inputs of a block, of all types of integers
SUPERBLOCK = 256  # inputs that share d and dmin in K-quants
ALIGNMENT = 64
PAGE = 64  # tokens of a page of the KV cache
INT8_MAX = 127  # int8 without -128, so that the sign can always be changed

# Factors of INT8 inputs.
SCALE, TOTAL = range(2)
NEGATED, NEGATED_LOW, NEGATED_HIGH = range(3)  # −Σ codes of a block and of its halves
SCALE_BYTES, NEGATED_BYTES = 8, 12  # of a block
FACTORS = (SCALE_BYTES + NEGATED_BYTES) // 4

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


class ScaleLayout(Enum):
    """How the scales of a block lie in memory: see above."""

    #      bytes of a block, scales of a block, has minima, d is bfloat16
    NONE = (0, 1, False)
    D = (GROUP * 2, 1, False)
    DM = (GROUP * 4, 1, True)
    E8M0 = (GROUP * 2, 1, False, True)
    SUPER_32 = (GROUP * 10 // 8, 1, False)
    SUPER_32M = (GROUP * 20 // 8, 1, True)
    SUPER_16 = (GROUP * 18 // 8, 2, False)
    SUPER_16M = (GROUP * 20 // 8, 2, True)

    def __init__(self, nbytes: int, sums: int, has_minima: bool, is_bf16: bool = False) -> None:
        self.bytes = nbytes
        self.sums = sums
        self.has_minima = has_minima
        self.is_bf16 = is_bf16

    @property
    def is_super(self) -> bool:
        """d, and dmin, are those of eight blocks."""
        return self.name.startswith("SUPER")


# What the codes of a table stand for: IQ4_NL and IQ4_XS (ggml), and e2m1 of MXFP4 (OCP Microscaling
# Formats v1.0), doubled so that they are whole.
STEPS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class WeightType(Enum):
    """A packed weight type, by its name in GGUF. Sizes are bytes per sixteen rows and block.

    Every other module asks this table. `zero_point` is by how much codes are stored too large; the
    steps of a table are stored too large by that for processors that multiply unsigned bytes.
    """

    #      planes, zero point, scales; in a file: dtype, or bytes of 256 inputs of a row; table
    F32 = ((), 0, ScaleLayout.NONE, np.float32)
    F16 = ((), 0, ScaleLayout.NONE, np.float16)
    BF16 = ((), 0, ScaleLayout.NONE, ml_dtypes.bfloat16)
    Q8_0 = ((8,), 128, ScaleLayout.D, 8 * 34)
    Q4_0 = ((4,), 8, ScaleLayout.D, 8 * 18)
    Q4_1 = ((4,), 0, ScaleLayout.DM, 8 * 20)
    Q5_0 = ((4, 1), 16, ScaleLayout.D, 8 * 22)
    Q5_1 = ((4, 1), 0, ScaleLayout.DM, 8 * 24)
    IQ4_NL = ((4,), 128, ScaleLayout.D, 8 * 18, STEPS)
    MXFP4 = ((4,), 16, ScaleLayout.E8M0, 8 * 17, E2M1)
    Q2_K = ((2,), 0, ScaleLayout.SUPER_16M, 84)
    Q3_K = ((2, 1), 4, ScaleLayout.SUPER_16, 110)
    Q4_K = ((4,), 0, ScaleLayout.SUPER_32M, 144)
    Q5_K = ((4, 1), 0, ScaleLayout.SUPER_32M, 176)
    Q6_K = ((4, 2), 32, ScaleLayout.SUPER_16, 210)
    IQ4_XS = ((4,), 128, ScaleLayout.SUPER_32, 136, STEPS)

    def __init__(
        self,
        planes: tuple[int, ...],
        zero_point: int,
        scales: ScaleLayout,
        stored: Any,
        steps: tuple[int, ...] = (),
    ) -> None:
        self.planes = planes  # bits of a code, the lowest first
        self.zero_point = zero_point
        self.scales = scales
        self.stored_bytes: int = stored if isinstance(stored, int) else 0
        self.dtype: Any = None if self.stored_bytes else np.dtype(stored)
        self.steps = steps  # what codes stand for, if not themselves
        self.block = BLOCK if planes else 1  # inputs per block
        self.value_bytes = GROUP * (4 * sum(planes) if planes else np.dtype(stored).itemsize)
        self.scale_bytes = scales.bytes
        self.sums = scales.sums  # integer sums of a block: two where 16 inputs share a scale
        self.has_minima = scales.has_minima  # multiplied by the sum of the inputs

    @property
    def is_float(self) -> bool:
        return self.stored_bytes == 0

    @property
    def input_format(self) -> InputFormat:
        """What its kernels read, but for kernels of special tiers (dispatch.choose)."""
        return InputFormat.F32 if self.is_float else InputFormat.INT8

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
