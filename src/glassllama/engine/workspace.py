"""The room that a crew works in: where weights and intermediate numbers are, for compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig, rope_frequencies
from glassllama.base.errors import WeightsError, quoted
from glassllama.engine.dispatch import choose, kernel_address, tier
from glassllama.engine.get_rows import reader_address
from glassllama.engine.kv_pages import PAGE
from glassllama.engine.layout import BLOCK, FLOAT32, Matrix, zeros
from glassllama.engine.quantize_activations import FACTORS, SUPERBLOCK, WIDE_BYTES

# Matrices of a layer in the room's table, and the columns of that table.
WQ, WK, WV, WO, GATE, UP, DOWN = range(7)
MATRICES = 7
KERNEL, VALUES, SCALES, BLOCKS, GROUPS, READS = range(6)
FIELDS = 6
LANES = 16  # rows of a group
ID, ROW, POSITION = range(3)  # what a step is told of each token
TOLD = 3
TILE = 8  # tokens of one row whose queries look at the cache together
FIRST_SPANS = 4  # room for a context of 1,024 tokens at first, see `make_room_for`

SIZES = (
    "layers", "heads", "kv_heads", "head_dim", "group_size", "dim", "ffn_dim", "pairs", "qk_norm",
    "slots", "seats",  # N, and with one of each thread's own
    "tile_queries",  # of one tile and kv head, at most
    "width", "hidden_width",  # columns of the two sets of inputs
    "qkv_width", "hidden_columns", "added_width",  # columns of outputs
)  # fmt: skip
PLACES = (
    "matrices",  # (7·layers + 2, FIELDS) int64: where each packed matrix is, and its kernel; the
    # last one, the embeddings, has a reader instead
    "norms",  # (2·layers + 1, C)
    "x",  # (N, C), the residual stream: embeddings at first
    "told",  # (N, 3) int64: id, row of the batch, position
    "frequencies",  # (D/2,), of RoPE
    "cos", "sin",  # (N, D/2)
    "tile_first", "tile_count",  # (tiles,) int64: tokens of one row, next to each other
    "everyone",  # (N,) int64: 0, 1, …
    "wanted",  # (N,) int64, tokens whose logits are wanted
    # Inputs of the matrices that read C or H·D numbers: float32, int8 with factors, bfloat16.
    "numbers", "codes", "factors", "bfloats",
    "hidden_numbers", "hidden_codes", "hidden_factors", "hidden_bfloats",  # of `down`
    # The same in two digits, (superblocks, seats, WIDE_BYTES) bytes: one superblock of all rows,
    # then the next.
    "wides", "hidden_wides",
    "qkv",  # (N, padded H·D + K·D + K·D)
    "mixed",  # (N, H·D): what the heads saw
    "added",  # (N, padded C): what a layer adds to the residual stream
    "hidden",  # (N, 2 · padded F): gates and ups side by side
    "queries", "scores",  # (threads, tile queries, D), (threads, tile queries, PAGE)
    "opened",  # (threads, D · PAGE): keys or values of a page, unpacked
    "part",  # (threads, 2, tile queries, D + 2): see attention.begin
    "parts",  # (spans, H, D + 2), where threads share the spans of one token
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
        embeddings: Matrix,
        norms: NDArray[np.float32],
        *,
        slots: int,
        threads: int,
    ) -> None:
        require_shapes(config, matrices, embeddings, norms)
        self.tables: dict[str, NDArray[Any]] = {
            "matrices": table_of(matrices, embeddings),
            "frequencies": rope_frequencies(config),
            "norms": norms,
            "everyone": np.arange(slots),
            **token_tables(config, slots),
            **matrix_tables(config, matrices, slots, threads),
            **attention_tables(config, threads),
        }
        self.sizes = sizes_of(config, self.tables)
        record = np.zeros(1, ROOM)
        for name, size in self.sizes.items():
            record[name] = size
        for name, table in self.tables.items():
            record[name] = table.ctypes.data
        record["eps"] = config.norm_eps
        self.record: Any = record[0]
        self._outgrown: list[NDArray[Any]] = []

    def make_room_for(self, spans: int) -> None:
        """See to it that `parts` holds so many. Not while a step is computed.

        Doubled, not made for the longest context at once, which may be any number. The old table
        stays: a thread that is late in a step that is over may still read it.
        """
        parts = self.tables["parts"]
        if spans > len(parts):
            self._outgrown.append(parts)
            grown = zeros(np.float32, max(spans, 2 * len(parts)), *parts.shape[1:])
            self.tables["parts"], self.record["parts"] = grown, grown.ctypes.data


def require_shapes(
    config: LlamaConfig, matrices: list[Matrix], embeddings: Matrix, norms: NDArray[np.float32]
) -> None:
    """Raise WeightsError where a matrix is not as the configuration says: compiled code counts by
    the configuration, and checks nothing."""
    dim, ffn, vocab = config.dim, config.ffn_dim, config.vocab_size
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = [
        (heads, dim), (kv_heads, dim), (kv_heads, dim), (dim, heads),
        (ffn, dim), (ffn, dim), (dim, ffn),
    ]  # fmt: skip
    wanted = [*layer * config.n_layers, (vocab, dim), (vocab, dim)]
    came = [(matrix.rows, matrix.columns) for matrix in (*matrices, embeddings)]
    if came != wanted or norms.shape != (2 * config.n_layers + 1, dim):
        wrong = [pair for pair in zip(came, wanted, strict=False) if pair[0] != pair[1]]
        raise WeightsError(
            f"{len(came)} packed matrices for {len(wanted)}, norms of shape {norms.shape}; shapes "
            f"that differ (came, expected): {quoted(wrong)}"
        )
    for matrix in (*matrices, embeddings):
        cells = (-(-matrix.rows // LANES), matrix.kind.blocks(matrix.columns))
        sizes = matrix.kind.value_bytes, matrix.kind.scale_bytes
        assert (matrix.values.shape, matrix.scales.shape) == tuple((*cells, n) for n in sizes)
    assert norms.dtype == np.float32
    assert norms.flags.c_contiguous


def sizes_of(config: LlamaConfig, tables: dict[str, NDArray[Any]]) -> dict[str, int]:
    columns = {
        "width": "numbers", "hidden_width": "hidden_numbers", "qkv_width": "qkv",
        "added_width": "added", "tile_queries": "scores",
    }  # fmt: skip
    return {
        "layers": config.n_layers, "heads": config.n_heads, "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "group_size": config.group_size, "dim": config.dim,
        "ffn_dim": config.ffn_dim, "pairs": config.rope_layout == "pairs",
        "qk_norm": config.qk_norm, "slots": len(tables["x"]),
        "seats": len(tables["numbers"]),
        "hidden_columns": tables["hidden"].shape[1] // 2,
        **{size: tables[name].shape[1] for size, name in columns.items()},
    }  # fmt: skip


def token_tables(config: LlamaConfig, slots: int) -> dict[str, NDArray[Any]]:
    """What a step is told of its tokens."""
    half = config.head_dim // 2
    words = ("wanted", "tile_first", "tile_count")
    return {
        "told": np.zeros((slots, TOLD), np.int64),
        **tables(np.float32, x=(slots, config.dim), cos=(slots, half), sin=(slots, half)),
        **{name: np.zeros(slots, np.int64) for name in words},
    }


def matrix_tables(
    config: LlamaConfig, matrices: list[Matrix], slots: int, threads: int
) -> dict[str, NDArray[Any]]:
    """What goes into the matrices and what comes out of them.

    Rows are a little longer than they must be. A kernel writes a few columns of many rows; where
    those are whole pages apart, they meet in the same few places of the nearest cache.
    Of superblocks there is one more than there must be: tiles read on beyond the last row.
    """
    wq, wk, wv, wo, gate, _up, _down = matrices[:7]
    seats = slots + threads  # of inputs: each thread has one of its own
    mixed = config.n_heads * config.head_dim
    width, hidden = blocked(max(config.dim, mixed)) + BLOCK, blocked(config.ffn_dim) + BLOCK
    return {
        **tables(np.float32, numbers=(seats, width), factors=(seats, width // BLOCK, FACTORS)),
        **tables(np.float32, hidden_numbers=(slots, hidden)),
        **tables(np.float32, hidden_factors=(slots, hidden // BLOCK, FACTORS)),
        **tables(np.int8, codes=(seats, width), hidden_codes=(slots, hidden)),
        **tables(np.uint16, bfloats=(seats, width), hidden_bfloats=(slots, hidden)),
        **tables(np.uint8, wides=(width // SUPERBLOCK + 1, seats, WIDE_BYTES)),
        **tables(np.uint8, hidden_wides=(hidden // SUPERBLOCK + 1, slots, WIDE_BYTES)),
        **tables(np.float32, qkv=(slots, wq.padded_rows + wk.padded_rows + wv.padded_rows + LANES)),
        **tables(np.float32, mixed=(slots, mixed), added=(slots, wo.padded_rows + LANES)),
        **tables(np.float32, hidden=(slots, 2 * (gate.padded_rows + LANES))),
    }


def attention_tables(config: LlamaConfig, threads: int) -> dict[str, NDArray[Any]]:
    """Room for the queries of a tile, and what they have seen."""
    queries = TILE * config.group_size
    return {
        **tables(np.float32, queries=(threads, queries, config.head_dim)),
        **tables(np.float32, scores=(threads, queries, PAGE)),
        **tables(np.float32, opened=(threads, config.head_dim * PAGE)),
        **tables(np.float32, part=(threads, 2, queries, config.head_dim + 2)),
        **tables(np.float32, parts=(FIRST_SPANS, config.n_heads, config.head_dim + 2)),
    }


def blocked(columns: int) -> int:
    """Columns rounded up to whole blocks."""
    return -(-columns // BLOCK) * BLOCK


def tables(dtype: Any, **shapes: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    return {name: zeros(dtype, *shape) for name, shape in shapes.items()}


def table_of(matrices: list[Matrix], embeddings: Matrix) -> NDArray[np.int64]:
    """What compiled code must know of each matrix, embeddings last: (matrices + 1, FIELDS)."""
    kernels = [choose(matrix.kind, matrix.columns) for matrix in matrices]
    rows = [
        entry_of(matrix, kernel_address(kernel, tier()), reads)
        for matrix, (kernel, reads) in zip(matrices, kernels, strict=True)
    ]
    return np.array([*rows, entry_of(embeddings, reader_address(embeddings.kind.name), FLOAT32)])


def entry_of(matrix: Matrix, kernel: int, reads: int) -> list[int]:
    values, scales = matrix.values.ctypes.data, matrix.scales.ctypes.data
    return [kernel, values, scales, matrix.kind.blocks(matrix.columns), matrix.groups, reads]
