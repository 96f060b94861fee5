"""The workspace of the engine: all weights and activation buffers, as one record of addresses.

Compiled code gets this record instead of arrays. Buffers that are never used take no memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig, rope_frequencies
from glassllama.base.errors import WeightsError, quoted
from glassllama.native.engine.dispatch import choose, kernel_address, tier
from glassllama.native.engine.get_rows import reader_address
from glassllama.native.engine.kv_pages import PAGE
from glassllama.native.engine.layout import BLOCK, FLOAT32, Matrix, zeros
from glassllama.native.engine.quantize_activations import FACTORS, Q11_BYTES, SUPERBLOCK

# The matrices of a layer in the table `matrices`, and the columns of that table.
WQ, WK, WV, WO, GATE, UP, DOWN = range(7)
MATRICES = 7
KERNEL, VALUES, SCALES, BLOCKS, GROUPS, INPUT_FORMAT = range(6)
MATRIX_FIELDS = 6
LANES = 16  # rows of a group
TOKEN_ID, SEQUENCE, POSITION = range(3)  # columns of the table `tokens`
TOKEN_FIELDS = 3
TILE = 8  # most tokens of one sequence whose queries attend together
FIRST_SPANS = 4  # spans that `partials` has room for at first: a context of 1,024 tokens

SIZES = (
    "layers", "heads", "kv_heads", "head_dim", "group_size", "dim", "ffn_dim", "interleaved",
    "qk_norm",
    "max_tokens",  # N
    "rows_with_scratch",  # N and one row for each thread
    "tile_queries",  # most queries of a tile and KV head
    "width", "hidden_width",  # columns of the two sets of activation buffers
    "qkv_width", "hidden_columns", "proj_out_width",  # columns of the output buffers
)  # fmt: skip
ADDRESSES = (
    "matrices",  # (7·layers + 2, MATRIX_FIELDS) int64: the kernel and the place of each packed
    # matrix; the last one, the embeddings, has a row reader instead of a kernel
    "norms",  # (2·layers + 1, C)
    "x",  # (N, C), the residual stream: embeddings at first
    "tokens",  # (N, 3) int64: id, sequence, position
    "frequencies",  # (D/2,), of RoPE
    "cos", "sin",  # (N, D/2)
    "tile_first", "tile_count",  # (tiles,) int64: consecutive tokens of one sequence
    "all_rows",  # (N,) int64: 0, 1, …
    "output_rows",  # (N,) int64: the tokens whose logits are computed
    # Inputs of the matrices that read C or H·D numbers: float32, int8 with scales, bfloat16.
    "act_f32", "act_q8", "act_scales", "act_bf16",
    "hidden_f32", "hidden_q8", "hidden_scales", "hidden_bf16",  # the inputs of `down`
    # The same in 11 bits, (superblocks, rows, Q11_BYTES) bytes: one superblock of all rows, then
    # the next superblock.
    "act_q11", "hidden_q11",
    "qkv",  # (N, padded H·D + K·D + K·D)
    "attn_out",  # (N, H·D): output of attention, all heads
    "proj_out",  # (N, padded C): what a projection adds to the residual stream
    "hidden",  # (N, 2 · padded F): outputs of gate and up, side by side
    "queries", "scores",  # (threads, tile queries, D), (threads, tile queries, PAGE)
    "kv_f32",  # (threads, D · PAGE): keys or values of a page, converted to float32
    "accumulators",  # (threads, 2, tile queries, D + 2): see attention_kernels.init_accumulator
    "partials",  # (spans, H, D + 2): accumulators where threads share the spans of one token
)  # fmt: skip
# Sizes, then addresses. Buffers are float32 where nothing else is said.
WORKSPACE = np.dtype([(name, np.int64) for name in (*SIZES, *ADDRESSES)] + [("eps", np.float32)])


class Workspace:
    """Buffers for a step of at most `max_tokens` tokens, and the record of their addresses."""

    def __init__(
        self,
        config: LlamaConfig,
        matrices: list[Matrix],
        embeddings: Matrix,
        norms: NDArray[np.float32],
        *,
        max_tokens: int,
        threads: int,
    ) -> None:
        require_shapes(config, matrices, embeddings, norms)
        self.tables: dict[str, NDArray[Any]] = {
            "matrices": table_of(matrices, embeddings),
            "frequencies": rope_frequencies(config),
            "norms": norms,
            "all_rows": np.arange(max_tokens),
            **token_tables(config, max_tokens),
            **matrix_tables(config, matrices, max_tokens, threads),
            **attention_tables(config, threads),
        }
        self.sizes = sizes_of(config, self.tables)
        record = np.zeros(1, WORKSPACE)
        for name, size in self.sizes.items():
            record[name] = size
        for name, table in self.tables.items():
            record[name] = table.ctypes.data
        record["eps"] = config.norm_eps
        self.record: Any = record[0]
        self._replaced: list[NDArray[Any]] = []

    def reserve_partials(self, spans: int) -> None:
        """Make `partials` large enough for that many spans. Not to be called during a step.

        The buffer doubles; the longest context may be any number, so it is not allocated at once.
        The old buffer is kept: a late thread of a step that is over may still read it.
        """
        partials = self.tables["partials"]
        if spans > len(partials):
            self._replaced.append(partials)
            larger = zeros(np.float32, max(spans, 2 * len(partials)), *partials.shape[1:])
            self.tables["partials"], self.record["partials"] = larger, larger.ctypes.data


def require_shapes(
    config: LlamaConfig, matrices: list[Matrix], embeddings: Matrix, norms: NDArray[np.float32]
) -> None:
    """Raise WeightsError if a matrix has another shape than the configuration says.

    Compiled code takes all sizes from the configuration and checks nothing.
    """
    dim, ffn, vocab = config.dim, config.ffn_dim, config.vocab_size
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = [
        (heads, dim), (kv_heads, dim), (kv_heads, dim), (dim, heads),
        (ffn, dim), (ffn, dim), (dim, ffn),
    ]  # fmt: skip
    expected = [*layer * config.n_layers, (vocab, dim), (vocab, dim)]
    came = [(matrix.rows, matrix.columns) for matrix in (*matrices, embeddings)]
    if came != expected or norms.shape != (2 * config.n_layers + 1, dim):
        wrong = [pair for pair in zip(came, expected, strict=False) if pair[0] != pair[1]]
        raise WeightsError(
            f"{len(came)} packed matrices, expected {len(expected)}; norms of shape {norms.shape}; "
            f"shapes that differ (came, expected): {quoted(wrong)}"
        )
    for matrix in (*matrices, embeddings):
        cells = (-(-matrix.rows // LANES), matrix.weight_type.blocks(matrix.columns))
        sizes = matrix.weight_type.value_bytes, matrix.weight_type.scale_bytes
        assert (matrix.values.shape, matrix.scales.shape) == tuple((*cells, n) for n in sizes)
    assert norms.dtype == np.float32
    assert norms.flags.c_contiguous


def sizes_of(config: LlamaConfig, tables: dict[str, NDArray[Any]]) -> dict[str, int]:
    columns = {
        "width": "act_f32", "hidden_width": "hidden_f32", "qkv_width": "qkv",
        "proj_out_width": "proj_out", "tile_queries": "scores",
    }  # fmt: skip
    return {
        "layers": config.n_layers, "heads": config.n_heads, "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "group_size": config.group_size, "dim": config.dim,
        "ffn_dim": config.ffn_dim, "interleaved": config.rope_layout == "interleaved",
        "qk_norm": config.qk_norm, "max_tokens": len(tables["x"]),
        "rows_with_scratch": len(tables["act_f32"]),
        "hidden_columns": tables["hidden"].shape[1] // 2,
        **{size: tables[name].shape[1] for size, name in columns.items()},
    }  # fmt: skip


def token_tables(config: LlamaConfig, max_tokens: int) -> dict[str, NDArray[Any]]:
    """The buffers that describe the tokens of a step."""
    half = config.head_dim // 2
    words = ("output_rows", "tile_first", "tile_count")
    return {
        "tokens": np.zeros((max_tokens, TOKEN_FIELDS), np.int64),
        **tables(
            np.float32, x=(max_tokens, config.dim), cos=(max_tokens, half), sin=(max_tokens, half)
        ),
        **{name: np.zeros(max_tokens, np.int64) for name in words},
    }


def matrix_tables(
    config: LlamaConfig, matrices: list[Matrix], max_tokens: int, threads: int
) -> dict[str, NDArray[Any]]:
    """Inputs and outputs of the matrices.

    Rows are a little longer than necessary. A kernel writes a few columns of many rows; if rows
    were a multiple of the page size apart, those columns would compete for the same few lines of
    the first-level cache. There is one superblock more than necessary, because AMX tiles read past
    the last row.
    """
    wq, wk, wv, wo, gate, _up, _down = matrices[:7]
    rows = max_tokens + threads  # each thread has an input row of its own: layer_ops.norm_rows
    attn_out = config.n_heads * config.head_dim
    width, hidden = blocked(max(config.dim, attn_out)) + BLOCK, blocked(config.ffn_dim) + BLOCK
    qkv = wq.padded_rows + wk.padded_rows + wv.padded_rows + LANES
    return {
        **tables(np.float32, act_f32=(rows, width), act_scales=(rows, width // BLOCK, FACTORS)),
        **tables(np.float32, hidden_f32=(max_tokens, hidden)),
        **tables(np.float32, hidden_scales=(max_tokens, hidden // BLOCK, FACTORS)),
        **tables(np.int8, act_q8=(rows, width), hidden_q8=(max_tokens, hidden)),
        **tables(np.uint16, act_bf16=(rows, width), hidden_bf16=(max_tokens, hidden)),
        **tables(np.uint8, act_q11=(width // SUPERBLOCK + 1, rows, Q11_BYTES)),
        **tables(np.uint8, hidden_q11=(hidden // SUPERBLOCK + 1, max_tokens, Q11_BYTES)),
        **tables(np.float32, qkv=(max_tokens, qkv), attn_out=(max_tokens, attn_out)),
        **tables(np.float32, proj_out=(max_tokens, wo.padded_rows + LANES)),
        **tables(np.float32, hidden=(max_tokens, 2 * (gate.padded_rows + LANES))),
    }


def attention_tables(config: LlamaConfig, threads: int) -> dict[str, NDArray[Any]]:
    """Queries of a tile, their scores, and accumulators."""
    queries = TILE * config.group_size
    return {
        **tables(np.float32, queries=(threads, queries, config.head_dim)),
        **tables(np.float32, scores=(threads, queries, PAGE)),
        **tables(np.float32, kv_f32=(threads, config.head_dim * PAGE)),
        **tables(np.float32, accumulators=(threads, 2, queries, config.head_dim + 2)),
        **tables(np.float32, partials=(FIRST_SPANS, config.n_heads, config.head_dim + 2)),
    }


def blocked(columns: int) -> int:
    """Columns rounded up to whole blocks."""
    return -(-columns // BLOCK) * BLOCK


def tables(dtype: Any, **shapes: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    return {name: zeros(dtype, *shape) for name, shape in shapes.items()}


def table_of(matrices: list[Matrix], embeddings: Matrix) -> NDArray[np.int64]:
    """The table `matrices`: one row for each matrix, the embeddings last."""
    kernels = [choose(matrix.weight_type, matrix.columns) for matrix in matrices]
    rows = [
        entry_of(matrix, kernel_address(kernel, tier()), input_format)
        for matrix, (kernel, input_format) in zip(matrices, kernels, strict=True)
    ]
    return np.array(
        [*rows, entry_of(embeddings, reader_address(embeddings.weight_type.name), FLOAT32)]
    )


def entry_of(matrix: Matrix, kernel: int, input_format: int) -> list[int]:
    values, scales = matrix.values.ctypes.data, matrix.scales.ctypes.data
    blocks = matrix.weight_type.blocks(matrix.columns)
    return [kernel, values, scales, blocks, matrix.groups, input_format]
