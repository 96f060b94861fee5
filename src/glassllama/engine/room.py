"""The room that a crew works in: where weights and intermediate numbers are, for compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.engine.attention import PAGE
from glassllama.engine.layout import BLOCK, Matrix
from glassllama.engine.tiers import kernel_address, tier

# Matrices of a layer in the room's table, and the columns of that table.
WQ, WK, WV, WO, GATE, UP, DOWN = range(7)
MATRICES = 7
KERNEL, VALUES, SCALES, BLOCKS, GROUPS, INTEGERS = range(6)
FIELDS = 6

SIZES = (
    "slots", "layers", "heads", "kv_heads", "head_dim", "group_size", "dim", "ffn_dim",
    "pairs", "qk_norm", "width", "hidden_width", "qkv_width", "hidden_columns", "added_width", "parts_room",
)  # fmt: skip
PLACES = (
    "matrices",  # (7·layers + 1, FIELDS) int64: where each packed matrix is, and its kernel
    "norms",  # (2·layers + 1, C)
    "x",  # (N, C), the residual stream: embeddings at first
    "rows",  # (N,) int64, of the batch
    "positions",  # (N,) int64
    "cos", "sin",  # (N, D/2)
    "everyone",  # (N,) int64: 0, 1, …
    "wanted",  # (N,) int64, tokens whose logits are wanted
    "logits",  # (N, padded V)
    "numbers", "codes", "factors",  # inputs of the matrices that read C or H·D numbers
    "hidden_numbers", "hidden_codes", "hidden_factors",  # of `down`
    "qkv",  # (N, padded H·D + K·D + K·D)
    "mixed",  # (N, H·D): what the heads saw
    "added",  # (N, padded C): what a layer adds to the residual stream
    "hidden",  # (N, 2 · padded F): gates and ups side by side
    "scores",  # (threads, PAGE)
    "part",  # (threads, 2, D + 2): see attention.attend
    "parts",  # (items, D + 2): one for each span that is looked at
)  # fmt: skip
# Sizes, then addresses; tables are float32 where nothing else is said. N is the number of slots.
ROOM = np.dtype([(name, np.int64) for name in (*SIZES, *PLACES)] + [("eps", np.float32)])


class Room:
    """Tables for a step of at most `slots` tokens, and the record of where they are.

    What is never used never becomes real memory.
    """

    def __init__(
        self,
        config: LlamaConfig,
        matrices: list[Matrix],
        norms: NDArray[np.float32],
        *,
        slots: int,
        threads: int,
        parts: int,
    ) -> None:
        mixed, half = config.n_heads * config.head_dim, config.head_dim // 2
        wq, wk, wv, wo, gate, _up, _down = matrices[:7]
        width, hidden_width = blocked(max(config.dim, mixed)), blocked(config.ffn_dim)
        seats = slots + threads  # of inputs: each thread has one of its own
        qkv = wq.padded_rows + wk.padded_rows + wv.padded_rows
        self.sizes = {
            "slots": slots, "layers": config.n_layers, "heads": config.n_heads,
            "kv_heads": config.n_kv_heads, "head_dim": config.head_dim, "group_size": config.group_size, "dim": config.dim,
            "ffn_dim": config.ffn_dim, "pairs": config.rope_layout == "pairs",
            "qk_norm": config.qk_norm, "width": width, "hidden_width": hidden_width,
            "qkv_width": qkv, "hidden_columns": gate.padded_rows, "added_width": wo.padded_rows,
            "parts_room": parts,
        }  # fmt: skip
        self.tables: dict[str, NDArray[Any]] = {
            "matrices": table_of(matrices),
            "norms": norms,
            **tables(np.float32, x=(slots, config.dim), cos=(slots, half), sin=(slots, half)),
            **tables(np.int64, rows=slots, positions=slots, wanted=slots),
            "everyone": np.arange(slots),
            **tables(np.float32, logits=(slots, matrices[-1].padded_rows)),
            **tables(np.float32, numbers=(seats, width), factors=(seats, width // BLOCK, 2)),
            **tables(np.int8, codes=(seats, width), hidden_codes=(slots, hidden_width)),
            **tables(np.float32, hidden_numbers=(slots, hidden_width)),
            **tables(np.float32, hidden_factors=(slots, hidden_width // BLOCK, 2)),
            **tables(np.float32, qkv=(slots, qkv), mixed=(slots, mixed)),
            **tables(np.float32, added=(slots, wo.padded_rows)),
            **tables(np.float32, hidden=(slots, 2 * gate.padded_rows), scores=(threads, PAGE)),
            **tables(np.float32, part=(threads, 2, config.head_dim + 2)),
            **tables(np.float32, parts=(parts, config.head_dim + 2)),
        }
        record = np.zeros(1, ROOM)
        for name, size in self.sizes.items():
            record[name] = size
        for name, table in self.tables.items():
            record[name] = table.ctypes.data
        record["eps"] = config.norm_eps
        self.record: Any = record[0]


def blocked(columns: int) -> int:
    """Columns rounded up to whole blocks."""
    return -(-columns // BLOCK) * BLOCK


def tables(dtype: Any, **shapes: Any) -> dict[str, NDArray[Any]]:
    return {name: np.zeros(shape, dtype) for name, shape in shapes.items()}


def table_of(matrices: list[Matrix]) -> NDArray[np.int64]:
    """What compiled code must know of each matrix: (matrices, FIELDS)."""
    table = np.zeros((len(matrices), FIELDS), np.int64)
    for row, matrix in zip(table, matrices, strict=True):
        row[KERNEL] = kernel_address(matrix.kind.name, tier())
        row[VALUES] = matrix.values.ctypes.data
        row[SCALES] = matrix.scales.ctypes.data
        row[BLOCKS] = matrix.kind.blocks(matrix.columns)
        row[GROUPS] = matrix.groups
        row[INTEGERS] = matrix.kind.integer_inputs
    return table
