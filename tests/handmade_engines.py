"""Engines with random weights of any shape, without a file, and memory between guard pages."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.base.layer_plan import ModelPlan, llama_plan
from glassllama.native.engine.executor import Engine
from glassllama.native.engine.layout import BLOCK, Matrix, WeightType, allocate_matrices
from glassllama.native.engine.repack import pack_matrix
from glassllama.native.engine.workspace import Weights, vector_shapes

PROT_NONE = 0
SMALL = LlamaConfig(
    dim=96, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=40, ffn_dim=160, vocab_size=203,
    max_seq_len=2048, norm_eps=1e-5, rope_theta=10_000.0,
)  # fmt: skip


def matrix(chance: np.random.Generator, kind: str, rows: int, columns: int) -> Matrix:
    """Random numbers as F32, or quantized to Q8_0 or Q4_0 if columns are whole blocks."""
    weight_type = WeightType["F32" if columns % BLOCK else kind]
    made = allocate_matrices({"": (weight_type, rows, columns)})[""]
    pack_matrix(made, 0, chance.normal(0, columns**-0.5, (rows, columns)).astype(np.float32))
    return made


def weights(config: LlamaConfig | ModelPlan, kind: str = "F32") -> Weights:
    plan = llama_plan(config) if isinstance(config, LlamaConfig) else config
    chance = np.random.default_rng(3)
    shapes = [shape for block in plan.blocks for shape in block.matrices(plan.dim).values()]
    matrices = [matrix(chance, kind, *shape) for shape in (*shapes, (plan.vocab_size, plan.dim))]
    ones = {name: np.ones(size, np.float32) for name, size in vector_shapes(plan).items()}
    return Weights(matrices, matrices[-1], ones)


def handmade(config: LlamaConfig = SMALL, kind: str = "F32", **options: Any) -> Engine:
    return Engine(config, weights(config, kind), plan=llama_plan(config), **options)


def with_windows(window: int, **options: Any) -> Engine:
    """Of three layers; the first and the last have a sliding window."""
    whole = llama_plan(SMALL)
    local = replace(whole.blocks[0], attention=replace(whole.blocks[0].attention, window=window))
    plan = replace(whole, blocks=(local, whole.blocks[1], local))
    return Engine(replace(SMALL, n_layers=3), weights(plan), plan=plan, **options)


def with_guard_pages(array: NDArray[Any]) -> NDArray[Any]:
    """A copy between two guard pages (no access), ending at the second one.

    It starts at a cache line: if its size is no multiple of 64, up to 63 bytes are between.
    """
    page, size = mmap.PAGESIZE, -(-max(array.nbytes, 1) // 64) * 64
    pages = -(-size // page)
    memory = np.frombuffer(mmap.mmap(-1, (pages + 2) * page), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for wall in (0, pages + 1):
        place = ctypes.c_void_p(memory.ctypes.data + wall * page)
        assert protect(place, ctypes.c_size_t(page), PROT_NONE) == 0
    start = (1 + pages) * page - size
    copy: NDArray[Any] = memory[start : start + array.nbytes].view(array.dtype)
    copy = copy.reshape(array.shape)
    copy[...] = array
    return copy


def guarded_engine(config: LlamaConfig, kind: str, **options: Any) -> Engine:
    """An engine whose tables and weights end at guard pages; for pages and logits see
    `add_guard_pages`."""
    plain = weights(config, kind)
    matrices = [
        replace(m, values=with_guard_pages(m.values), scales=with_guard_pages(m.scales))
        for m in plain.matrices
    ]
    vectors = {name: with_guard_pages(vector) for name, vector in plain.vectors.items()}
    packed = Weights(matrices, matrices[-1], vectors)
    engine = Engine(config, packed, plan=llama_plan(config), **options)
    workspace = engine._workspace
    for name, table in workspace.tables.items():
        workspace.tables[name] = with_guard_pages(table)
        workspace.record[name] = workspace.tables[name].ctypes.data
    return engine
