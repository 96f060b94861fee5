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
    F16   values (G, columns, 16) half         BF16 likewise

G is the number of groups; a last group that is not full is padded with rows of zeros. Numbers and
nibble order are those of the file: nothing is rounded here, only moved.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

GROUP = 16  # rows interleaved: the 32-bit lanes of a 64-byte vector
BLOCK = 32  # inputs that share a scale, in every format of the file that we keep
QUAD = 4  # inputs per lane
ALIGNMENT = 64
HUGE_PAGE = 2 << 20

Raw = NDArray[Any]
FLOAT_TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


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


class Arena:
    """One aligned stretch of memory for all weights, in huge pages where the system has them."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE) + HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(self._map, np.uint8)
        start = -memory.ctypes.data % HUGE_PAGE
        self._free = memory[start : start + nbytes]

    def take(self, *shape: int) -> NDArray[np.uint8]:
        """The next free bytes, aligned, all zero."""
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
    groups, blocks = -(-rows // GROUP), kind.blocks(columns)
    values = arena.take(groups, blocks, kind.value_bytes)
    return Matrix(kind, rows, columns, values, arena.take(groups, blocks, kind.scale_bytes))


def interleave(rows: NDArray[Any]) -> NDArray[Any]:
    """(16·G, blocks, quads, 4) -> (G, blocks, quads, 16, 4): four inputs of each row in turn."""
    return rows.reshape(-1, GROUP, *rows.shape[1:]).transpose(0, 2, 3, 1, 4)


def beside(rows: NDArray[Any]) -> NDArray[Any]:
    """(16·G, blocks, n bytes) scales -> (G, blocks, n/2, 16) halves: each lane's own."""
    halves = np.ascontiguousarray(rows).view(np.uint16)
    return halves.reshape(-1, GROUP, *halves.shape[1:]).transpose(0, 2, 3, 1)


def pack_floats(raw: Raw, values: Raw, scales: Raw) -> None:
    lanes = raw.reshape(len(values), GROUP, -1).transpose(0, 2, 1)  # (G, columns, 16)
    values.view(raw.dtype)[:] = lanes


def pack_q8_0(raw: Raw, values: Raw, scales: Raw) -> None:
    """File block: half d, 32 signed bytes."""
    blocks = raw.reshape(len(raw), -1, 34)
    quads = (blocks[..., 2:] ^ 0x80).reshape(*blocks.shape[:2], -1, QUAD)  # signed -> plus 128
    values.reshape(*values.shape[:2], -1, GROUP, QUAD)[:] = interleave(quads)
    scales.view(np.uint16).reshape(*scales.shape[:2], -1, GROUP)[:] = beside(blocks[..., :2])


def pack_nibbles(raw: Raw, values: Raw, scales: Raw, header: int) -> None:
    """File block: half d (and half m), then sixteen bytes, low nibbles first."""
    blocks = raw.reshape(len(raw), -1, header + BLOCK // 2)
    quads = blocks[..., header:].reshape(*blocks.shape[:2], -1, QUAD)
    values.reshape(*values.shape[:2], -1, GROUP, QUAD)[:] = interleave(quads)
    scales.view(np.uint16).reshape(*scales.shape[:2], -1, GROUP)[:] = beside(blocks[..., :header])


def pack_q4_0(raw: Raw, values: Raw, scales: Raw) -> None:
    pack_nibbles(raw, values, scales, header=2)


def pack_q4_1(raw: Raw, values: Raw, scales: Raw) -> None:
    pack_nibbles(raw, values, scales, header=4)


PACK: dict[str, Callable[[Raw, Raw, Raw], None]] = {
    "F32": pack_floats, "F16": pack_floats, "BF16": pack_floats,
    "Q8_0": pack_q8_0, "Q4_0": pack_q4_0, "Q4_1": pack_q4_1,
}  # fmt: skip


def fill(matrix: Matrix, first: int, raw: Raw) -> None:
    """Put rows `first` … (a multiple of sixteen) in their place.

    `raw` is (rows, columns) numbers for F32, F16 and BF16, else the file's blocks as uint8 (rows,
    bytes of a row); where it ends within a group it must be the matrix's end, and zeros follow.
    """
    short = -len(raw) % GROUP
    if short:
        raw = np.concatenate([raw, np.zeros((short, *raw.shape[1:]), raw.dtype)])
    place = slice(first // GROUP, (first + len(raw)) // GROUP)
    PACK[matrix.kind.name](raw, matrix.values[place], matrix.scales[place])


def to_q8_0(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Quantise float32 (rows, columns) to the file's Q8_0: the nearest of 255 steps per block."""
    blocks = numbers.reshape(len(numbers), -1, BLOCK)
    d = (np.abs(blocks).max(-1, keepdims=True) / np.float32(127)).astype(np.float16)
    step = d.astype(np.float32)
    steps = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
    q = np.clip(np.rint(steps), -127, 127).astype(np.int8)
    return np.concatenate([d.view(np.uint8), q.view(np.uint8)], -1).reshape(len(numbers), -1)


def read_rows(matrix: Matrix, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The numbers of some rows, unpacked: (n,) -> (n, columns) float32."""
    group, lane = np.divmod(rows, GROUP)
    cells = (len(rows), matrix.values.shape[1])
    if matrix.kind.name in FLOAT_TYPES:
        lanes = matrix.values.view(FLOAT_TYPES[matrix.kind.name])[group, :, lane]
        return np.asarray(lanes, np.float32)
    scales = matrix.scales.view(np.float16).reshape(*matrix.scales.shape[:2], -1, GROUP)
    scale = scales[group, :, :, lane].astype(np.float32)  # (n, blocks, 1 or 2)
    bytes_ = matrix.values.reshape(*matrix.values.shape[:2], -1, GROUP, QUAD)
    codes = bytes_[group, :, :, lane].reshape(*cells, -1)
    if matrix.kind.name == "Q8_0":
        centred = codes.astype(np.float32) - np.float32(128)
    else:
        centred = np.concatenate([codes & 15, codes >> 4], -1).astype(np.float32)
    if matrix.kind.name == "Q4_0":
        centred -= np.float32(8)
    numbers = centred * scale[..., :1]
    if matrix.kind.name == "Q4_1":
        numbers += scale[..., 1:]
    return numbers.reshape(len(rows), -1)[:, : matrix.columns]
