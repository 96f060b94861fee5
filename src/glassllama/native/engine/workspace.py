"""The workspace of the engine: plan, weights and activation buffers, as one record of addresses.

Compiled code gets this record instead of arrays and instead of the layer plan: sizes that all
layers share are fields of the record, what differs from layer to layer is in the tables
`layer_fields` and `layer_numbers`. Buffers that are never used take no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import ConfigError, WeightsError, join_names, quoted
from glassllama.base.layer_plan import NORM_NAMES, BlockPlan, ModelPlan, RopePlan
from glassllama.native.engine.dispatch import choose, kernel_address, tier
from glassllama.native.engine.get_rows import reader_address
from glassllama.native.engine.layout import (
    BLOCK,
    FACTORS,
    PAGE,
    Q11_BYTES,
    SUPERBLOCK,
    InputFormat,
    Matrix,
    zeros,
)

# The matrices of a layer in the table `matrices`, and the columns of that table.
WQ, WK, WV, WO, GATE, UP, DOWN = range(7)
MATRICES = 7
KERNEL, VALUES, SCALES, BLOCKS, GROUPS, INPUT_FORMAT = range(6)
MATRIX_FIELDS = 6
LANES = 16  # rows of a group
# The columns of the table `layer_fields`; addresses are 0 where a layer has no such norm or bias.
(
    PRE_ATTENTION, POST_ATTENTION, PRE_FFN, POST_FFN,  # addresses of norm weights (C,)
    Q_NORM, K_NORM,  # addresses of weights, (D,) or (H·D,) and (K·D,)
    QK_NORM,  # NO_NORM, …
    QK_NORM_AFTER_ROPE,
    ROPE_TABLE, ROTARY_PAIRS,  # which tables of cosines and sines, and how many of a head's pairs
    INTERLEAVED,  # which coordinates are a pair: (0, 1), (2, 3), … or halves
    WINDOW,  # tokens that a query sees; 0: all before it
    KV_LAYER, KV_LAYERS,  # its number among the layers of its page pool (kv_cache.py), and how many
    QKV_BIAS, O_BIAS, GATE_BIAS, UP_BIAS, DOWN_BIAS,  # addresses of padded rows
    ACTIVATION,  # SILU, GELU_TANH
) = range(20)  # fmt: skip
LAYER_FIELDS = 20
NO_NORM, PER_HEAD, FULL_WIDTH, UNWEIGHTED = range(4)
SILU, GELU_TANH = range(2)
QK_NORMS = {"none": NO_NORM, "per_head": PER_HEAD, "full_width": FULL_WIDTH,
            "unweighted": UNWEIGHTED}  # fmt: skip
ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU_TANH}
# The columns of `layer_numbers`. A soft cap of 0: none; a temperature of 0: none.
SCORE_SCALE, SOFTCAP, RESIDUAL, TEMPERATURE, TEMPERATURE_LENGTH = range(5)
LAYER_NUMBERS = 5
TOKEN_ID, SEQUENCE, POSITION, PREFIX = range(4)  # columns of the table `tokens`
TOKEN_FIELDS = 4
TILE = 8  # most tokens of one sequence whose queries attend together
FIRST_SPANS = 4  # initial length of `partials` in spans: a context of 1,024 tokens

SIZES = (
    "layers", "heads", "kv_heads", "head_dim", "group_size", "dim", "ffn_dim", "rope_tables",
    "max_tokens",  # N
    "rows_with_scratch",  # N and one row for each thread
    "tile_queries",  # most queries of a tile and KV head
    "width", "hidden_width",  # columns of the two sets of activation buffers
    "qkv_width", "hidden_columns", "proj_out_width",  # columns of the output buffers
)  # fmt: skip
ADDRESSES = (
    "matrices",  # (7·layers + 2, MATRIX_FIELDS) int64: the kernel and the place of each packed
    # matrix; the last one, the embeddings, has a row reader instead of a kernel
    "layer_fields",  # (layers, LAYER_FIELDS) int64
    "layer_numbers",  # (layers, LAYER_NUMBERS)
    "last_norm",  # (C,)
    "x",  # (N, C), the residual stream: embeddings at first
    "tokens",  # (N, TOKEN_FIELDS) int64: id, -1 if x has the row already; sequence; position; and
    # the length of the prefix that it is in, whose tokens all see each other, or 0
    "frequencies",  # (tables, D/2), of RoPE
    "rope_factors",  # (tables,): cosines and sines are multiplied by it
    "cos", "sin",  # (tables, N, D/2)
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
NUMBERS = ("eps", "embedding_multiplier", "logit_multiplier", "logit_softcap")
# Sizes, then addresses, then numbers. Buffers are float32 where nothing else is said.
WORKSPACE = np.dtype(
    [(name, np.int64) for name in (*SIZES, *ADDRESSES)] + [(name, np.float32) for name in NUMBERS]
)


@dataclass(frozen=True)
class Weights:
    """A whole model, packed. `matrices` are wq wk wv wo gate up down of every layer, then output.

    `embeddings` is the same object as the last of `matrices` if the two are tied. `vectors` are
    norms and biases by parameter name, such as layers.0.attention_norm.weight, norm.weight,
    layers.0.attention.wq.bias, layers.0.attention.q_norm.weight: those that the plan lists.
    """

    matrices: list[Matrix]
    embeddings: Matrix
    vectors: dict[str, NDArray[np.float32]]

    @property
    def nbytes(self) -> int:
        distinct = {id(m): m.nbytes for m in (*self.matrices, self.embeddings)}
        return sum(distinct.values()) + sum(vector.nbytes for vector in self.vectors.values())


class Workspace:
    """Buffers for a step of at most `max_tokens` tokens, and the record of their addresses."""

    def __init__(self, plan: ModelPlan, weights: Weights, *, max_tokens: int, threads: int) -> None:
        """Raises ConfigError if the engine does not implement the plan, WeightsError if weights
        are missing or of another shape."""
        require_implemented(plan)
        require_shapes(plan, weights)
        ropes = list(dict.fromkeys(b.attention.rope for b in plan.blocks if b.attention.rope))
        self._biases: list[NDArray[np.float32]] = []
        self.tables: dict[str, NDArray[Any]] = {
            "matrices": table_of(weights),
            "last_norm": weights.vectors["norm.weight"],
            "all_rows": np.arange(max_tokens),
            **rope_tables(plan, ropes, max_tokens),
            **token_tables(plan, max_tokens),
            **matrix_tables(plan, weights.matrices, max_tokens, threads),
            **attention_tables(plan, threads),
        }
        self.tables["layer_fields"] = np.array(
            [self._layer_fields(plan, n, weights, ropes) for n in range(plan.n_layers)]
        )
        self.tables["layer_numbers"] = np.array(
            [
                [a.scale, a.softcap or 0, b.residual_multiplier,
                 a.temperature_scale, a.temperature_length]
                for b in plan.blocks for a in [b.attention]
            ],
            np.float32,
        )  # fmt: skip
        self.sizes = sizes_of(plan, self.tables)
        record = np.zeros(1, WORKSPACE)
        for name, size in self.sizes.items():
            record[name] = size
        for name, table in self.tables.items():
            record[name] = table.ctypes.data
        record["eps"], record["logit_softcap"] = plan.norm_eps, plan.logit_softcap or 0
        record["embedding_multiplier"] = plan.embedding_multiplier
        record["logit_multiplier"] = plan.logit_multiplier
        self.record: Any = record[0]
        self._replaced: list[NDArray[Any]] = []

    def _layer_fields(
        self, plan: ModelPlan, layer: int, weights: Weights, ropes: list[RopePlan]
    ) -> list[int]:
        """The row of a layer in the table `layer_fields`."""
        block, prefix = plan.blocks[layer], f"layers.{layer}"
        a = block.attention

        def address(name: str) -> int:
            return weights.vectors[name].ctypes.data if name in names else 0

        def bias(*projections: int) -> int:
            """The biases of some matrices side by side, padded as their outputs are."""
            padded = []
            for m in projections:
                matrix = weights.matrices[layer * MATRICES + m]
                own = weights.vectors.get(f"{prefix}.{MATRIX_NAMES[m]}.bias")
                some = np.zeros(matrix.padded_rows, np.float32)
                some[: 0 if own is None else len(own)] = () if own is None else own
                padded.append(some)
            self._biases.append(np.concatenate(padded))
            return self._biases[-1].ctypes.data

        names = vector_shapes_of_block(block, prefix, 0)
        norms = [address(f"{prefix}.{name}.weight") for name in NORM_NAMES.values()]
        qk_norms = [address(f"{prefix}.attention.{q}_norm.weight") for q in "qk"]
        rope, ffn_bias, windows = a.rope, block.feed_forward.bias, plan.windows()
        pool = [(window > 0) == (windows[layer] > 0) for window in windows]
        return [
            *norms, *qk_norms, QK_NORMS[a.qk_norm], a.qk_norm_after_rope,
            ropes.index(rope) if rope else 0, len(rope.frequencies) if rope else 0,
            rope is not None and rope.layout == "interleaved",
            windows[layer], pool[:layer].count(True), pool.count(True),
            bias(WQ, WK, WV) if a.biases & {"q", "k", "v"} else 0,
            bias(WO) if "o" in a.biases else 0,
            *(bias(m) if ffn_bias else 0 for m in (GATE, UP, DOWN)),
            ACTIVATIONS[block.feed_forward.activation],
        ]  # fmt: skip

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


# --- what is checked ------------------------------------------------------------------------------


MATRIX_NAMES = (
    "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "feed_forward.gate", "feed_forward.up", "feed_forward.down",
)  # fmt: skip
PROJECTIONS = {"q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo"}


def require_implemented(plan: ModelPlan) -> None:
    """Raise ConfigError if blocks differ in a size that all share here: pages and buffers."""
    first = plan.blocks[0]
    for n, block in enumerate(plan.blocks):
        for part, name in (
            ("attention", "n_heads"), ("attention", "n_kv_heads"), ("attention", "head_dim"),
            ("feed_forward", "ffn_dim"),
        ):  # fmt: skip
            came, expected = (getattr(getattr(b, part), name) for b in (block, first))
            if came != expected:
                raise ConfigError(
                    f"block {n}: {name} is {came}, in block 0 it is {expected}: the CPU engine "
                    "needs blocks of the same sizes; use the torch backend"
                )


def vector_shapes_of_block(block: BlockPlan, prefix: str, dim: int) -> dict[str, int]:
    """Parameter names of a block's norms and biases -> their lengths."""
    a, ffn = block.attention, block.feed_forward.ffn_dim
    heads, kv_heads = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    rows = {"q": heads, "k": kv_heads, "v": kv_heads, "o": dim}
    shapes = {f"{prefix}.{name}.weight": dim for name in block.norm_names()}
    if a.qk_norm in ("per_head", "full_width"):
        full = a.qk_norm == "full_width"
        shapes[f"{prefix}.attention.q_norm.weight"] = heads if full else a.head_dim
        shapes[f"{prefix}.attention.k_norm.weight"] = kv_heads if full else a.head_dim
    for projection in sorted(a.biases):
        shapes[f"{prefix}.{PROJECTIONS[projection]}.bias"] = rows[projection]
    if block.feed_forward.bias:
        sizes = {"gate": ffn, "up": ffn, "down": dim}
        shapes |= {f"{prefix}.feed_forward.{name}.bias": size for name, size in sizes.items()}
    return shapes


def vector_shapes(plan: ModelPlan) -> dict[str, int]:
    """Parameter names of all norms and biases of a model -> their lengths."""
    shapes = {"norm.weight": plan.dim}
    for n, block in enumerate(plan.blocks):
        shapes |= vector_shapes_of_block(block, f"layers.{n}", plan.dim)
    return shapes


def require_shapes(plan: ModelPlan, weights: Weights) -> None:
    """Raise WeightsError if a matrix, norm or bias is missing or has another shape than planned.

    Compiled code takes all sizes from the plan and checks nothing.
    """
    table = (plan.vocab_size, plan.dim)
    layers = [shape for block in plan.blocks for shape in block.matrices(plan.dim).values()]
    expected, every = [*layers, table, table], (*weights.matrices, weights.embeddings)
    came = [(matrix.rows, matrix.columns) for matrix in every]
    vectors = {name: vector.shape for name, vector in weights.vectors.items()}
    planned = {name: (size,) for name, size in vector_shapes(plan).items()}
    if came != expected:
        wrong = [pair for pair in zip(came, expected, strict=False) if pair[0] != pair[1]]
        raise WeightsError(
            f"{len(came)} packed matrices, expected {len(expected)}; shapes that differ (came, "
            f"expected): {quoted(wrong)}"
        )
    if wrong_names := sorted({n for n, _ in set(vectors.items()) ^ set(planned.items())}):
        raise WeightsError(
            f"norms and biases that are missing, unexpected or of another length: "
            f"{join_names(wrong_names)}"
        )
    for matrix in every:
        cells = (-(-matrix.rows // LANES), matrix.weight_type.blocks(matrix.columns))
        sizes = matrix.weight_type.value_bytes, matrix.weight_type.scale_bytes
        assert (matrix.values.shape, matrix.scales.shape) == tuple((*cells, n) for n in sizes)
    for vector in weights.vectors.values():
        assert vector.dtype == np.float32
        assert vector.flags.c_contiguous


# --- tables and buffers ---------------------------------------------------------------------------


def sizes_of(plan: ModelPlan, tables: dict[str, NDArray[Any]]) -> dict[str, int]:
    a = plan.blocks[0].attention
    columns = {
        "width": "act_f32", "hidden_width": "hidden_f32", "qkv_width": "qkv",
        "proj_out_width": "proj_out", "tile_queries": "scores",
    }  # fmt: skip
    return {
        "layers": plan.n_layers, "heads": a.n_heads, "kv_heads": a.n_kv_heads,
        "head_dim": a.head_dim, "group_size": a.group_size, "dim": plan.dim,
        "ffn_dim": plan.blocks[0].feed_forward.ffn_dim, "rope_tables": len(tables["cos"]),
        "max_tokens": len(tables["x"]), "rows_with_scratch": len(tables["act_f32"]),
        "hidden_columns": tables["hidden"].shape[1] // 2,
        **{size: tables[name].shape[1] for size, name in columns.items()},
    }  # fmt: skip


def rope_tables(plan: ModelPlan, ropes: list[RopePlan], max_tokens: int) -> dict[str, NDArray[Any]]:
    """Frequencies of each different RoPE of the model, and room for cosines and sines."""
    half = max(1, plan.blocks[0].attention.head_dim // 2)
    frequencies = zeros(np.float32, len(ropes), half)
    for table, rope in zip(frequencies, ropes, strict=True):
        table[: len(rope.frequencies)] = rope.frequencies
    factors = np.array([rope.attention_factor for rope in ropes], np.float32)
    angles = (len(ropes), max_tokens, half)
    return {
        "frequencies": frequencies, "rope_factors": factors,
        **tables(np.float32, cos=angles, sin=angles),
    }  # fmt: skip


def token_tables(plan: ModelPlan, max_tokens: int) -> dict[str, NDArray[Any]]:
    """The buffers that describe the tokens of a step."""
    words = ("output_rows", "tile_first", "tile_count")
    return {
        "tokens": np.zeros((max_tokens, TOKEN_FIELDS), np.int64),
        "x": zeros(np.float32, max_tokens, plan.dim),
        **{name: np.zeros(max_tokens, np.int64) for name in words},
    }


def matrix_tables(
    plan: ModelPlan, matrices: list[Matrix], max_tokens: int, threads: int
) -> dict[str, NDArray[Any]]:
    """Inputs and outputs of the matrices.

    Rows are a little longer than necessary. A kernel writes a few columns of many rows; if rows
    were a multiple of the page size apart, those columns would compete for the same few lines of
    the first-level cache. There is one superblock more than necessary, because AMX tiles read past
    the last row.
    """
    wq, wk, wv, wo, gate, _up, _down = matrices[:7]
    rows = max_tokens + threads  # each thread has an input row of its own: layer_ops.norm_rows
    width, hidden = blocked(max(plan.dim, wq.rows)) + BLOCK, blocked(gate.rows) + BLOCK
    qkv = wq.padded_rows + wk.padded_rows + wv.padded_rows + LANES
    return {
        **tables(np.float32, act_f32=(rows, width), act_scales=(rows, width // BLOCK, FACTORS)),
        **tables(np.float32, hidden_f32=(max_tokens, hidden)),
        **tables(np.float32, hidden_scales=(max_tokens, hidden // BLOCK, FACTORS)),
        **tables(np.int8, act_q8=(rows, width), hidden_q8=(max_tokens, hidden)),
        **tables(np.uint16, act_bf16=(rows, width), hidden_bf16=(max_tokens, hidden)),
        **tables(np.uint8, act_q11=(width // SUPERBLOCK + 1, rows, Q11_BYTES)),
        **tables(np.uint8, hidden_q11=(hidden // SUPERBLOCK + 1, max_tokens, Q11_BYTES)),
        **tables(np.float32, qkv=(max_tokens, qkv), attn_out=(max_tokens, wq.rows)),
        **tables(np.float32, proj_out=(max_tokens, wo.padded_rows + LANES)),
        **tables(np.float32, hidden=(max_tokens, 2 * (gate.padded_rows + LANES))),
    }


def attention_tables(plan: ModelPlan, threads: int) -> dict[str, NDArray[Any]]:
    """Queries of a tile, their scores, and accumulators."""
    a = plan.blocks[0].attention
    queries = TILE * a.group_size
    return {
        **tables(np.float32, queries=(threads, queries, a.head_dim)),
        **tables(np.float32, scores=(threads, queries, PAGE)),
        **tables(np.float32, kv_f32=(threads, a.head_dim * PAGE)),
        **tables(np.float32, accumulators=(threads, 2, queries, a.head_dim + 2)),
        **tables(np.float32, partials=(FIRST_SPANS, a.n_heads, a.head_dim + 2)),
    }


def blocked(columns: int) -> int:
    """Columns rounded up to whole blocks."""
    return -(-columns // BLOCK) * BLOCK


def tables(dtype: Any, **shapes: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    return {name: zeros(dtype, *shape) for name, shape in shapes.items()}


def table_of(weights: Weights) -> NDArray[np.int64]:
    """The table `matrices`: one row for each matrix, the embeddings last."""
    rows = []
    for matrix in weights.matrices:
        input_format = choose(matrix.weight_type, matrix.columns)
        kernel = kernel_address(matrix.weight_type, tier(), input_format)
        rows.append(entry_of(matrix, kernel, input_format))
    reader = reader_address(weights.embeddings.weight_type)
    return np.array([*rows, entry_of(weights.embeddings, reader, InputFormat.F32)])


def entry_of(matrix: Matrix, kernel: int, input_format: InputFormat) -> list[int]:
    values, scales = matrix.values.ctypes.data, matrix.scales.ctypes.data
    blocks = matrix.weight_type.blocks(matrix.columns)
    return [kernel, values, scales, blocks, matrix.groups, int(input_format)]
