"""GGUF files packed byte by byte, so that any byte of them can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, BOOL, U32, STRING, ARRAY, U64 = 0, 7, 4, 8, 9, 10  # metadata types
F32, Q4_0, Q8_0, Q4_K = 0, 2, 8, 12  # tensor types
HUGE = (2**63 - 1, 2**63, 2**64 - 1)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return u32(kind) + u64(count) + payload


def row(name: str | bytes, sizes: Sequence[int], kind: int = F32, offset: int = 0) -> bytes:
    """A row of the tensor table; `sizes` in the order of the file, fastest-varying first."""
    return text(name) + u32(len(sizes)) + b"".join(map(u64, sizes)) + u32(kind) + u64(offset)


def padded(raw: bytes, alignment: int) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def gguf(
    pairs: Sequence[bytes] = (),
    rows: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    n_rows: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = u64(len(rows) if n_rows is None else n_rows)
    counts += u64(len(pairs) if n_pairs is None else n_pairs)
    return padded(magic + version + counts + b"".join([*pairs, *rows]), alignment) + data
