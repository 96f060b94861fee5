"""A checkpoint → the packed CPU engine: one tensor at a time, in slices of rows, strictly in order.

Formats that the engine computes with are moved as they are (engine/layout.py). Other block types
become Q8_0, the nearest richer one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.base.interfaces import Progress
from glassllama.base.machine import require_memory
from glassllama.engine.crew import processors
from glassllama.engine.executor import Engine, Weights
from glassllama.engine.layout import (
    GROUP,
    KINDS,
    Arena,
    Kind,
    Matrix,
    empty_matrix,
    packed_bytes,
)
from glassllama.engine.packing import fill, to_q8_0
from glassllama.weights.open import Checkpoint

EMBEDDINGS = "tok_embeddings.weight"
LAYER_MATRICES = (
    "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "feed_forward.gate", "feed_forward.up", "feed_forward.down",
)  # fmt: skip
SLICE_NUMBERS = 1 << 20  # numbers of a tensor in the making at once, per thread
WORKING_MEMORY = 200_000_000  # compiled code, a step's intermediate numbers, slices in the making


def pack(
    checkpoint: Checkpoint,
    *,
    exact: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """The engine with this checkpoint's weights. `exact` keeps everything in float32.

    Peak memory is the packed model and little more. Raises MemoryShortError before it allocates.
    """
    config = checkpoint.config
    names = matrix_names(config)
    kinds = {name: packed_kind(checkpoint, name, exact) for name in names}
    shapes = {name: checkpoint.info(name).shape for name in names}
    needed = sum(packed_bytes(kinds[name], *shapes[name]) for name in names)
    require_memory(
        needed + WORKING_MEMORY,
        what=f"{checkpoint.path.name}, packed for the engine,",
        instead="use a file with fewer bits per weight" + (", or leave out exact" * exact),
    )
    arena, matrices = Arena(needed), {}
    with ThreadPoolExecutor(threads or processors()) as pool:
        for done, name in enumerate(names, start=1):
            matrices[name] = empty_matrix(arena, kinds[name], *shapes[name])
            fill_from(checkpoint, name, matrices[name], pool)
            if progress is not None:
                progress(done, len(names))
    weights = Weights(
        matrices=[matrices[name] for name in names if name != EMBEDDINGS or config.tie_embeddings],
        embeddings=matrices[EMBEDDINGS],
        norms=read_norms(checkpoint),
    )
    return Engine(
        config, weights, exact=exact, threads=threads, notes=conversions(checkpoint, kinds)
    )


def matrix_names(config: LlamaConfig) -> list[str]:
    """All matrices in the order of a forward pass; tied embeddings are the output, and last."""
    layers = [
        f"layers.{n}.{name}.weight" for n in range(config.n_layers) for name in LAYER_MATRICES
    ]
    return (
        [*layers, EMBEDDINGS] if config.tie_embeddings else [EMBEDDINGS, *layers, "output.weight"]
    )


def packed_kind(checkpoint: Checkpoint, name: str, exact: bool) -> Kind:
    """What a tensor is packed as."""
    stored = checkpoint.info(name).dtype
    if exact or stored == "F64":
        return KINDS["F32"]
    return KINDS.get(stored, KINDS["Q8_0"])


def slices(matrix: Matrix) -> Iterator[slice]:
    """The rows of a matrix in pieces of whole groups, small enough to make several at once."""
    step = max(1, SLICE_NUMBERS // (GROUP * matrix.columns)) * GROUP
    for first in range(0, matrix.rows, step):
        yield slice(first, min(first + step, matrix.rows))


def fill_from(checkpoint: Checkpoint, name: str, matrix: Matrix, pool: ThreadPoolExecutor) -> None:
    """One tensor, in slices that the pool's threads move; then its mapped pages are let go."""

    def move(rows: slice) -> None:
        fill(matrix, rows.start, stored_as(checkpoint, name, matrix.kind, rows))

    for _ in pool.map(move, slices(matrix)):
        pass
    checkpoint.drop(name)


def stored_as(checkpoint: Checkpoint, name: str, kind: Kind, rows: slice) -> NDArray[Any]:
    """Some rows in the form that `fill` takes: as the file has them, if they are of that kind."""
    if checkpoint.info(name).dtype == kind.name:
        return checkpoint.read(name, rows)
    numbers = checkpoint.float32(name, rows)
    return numbers if kind.name == "F32" else to_q8_0(numbers)


def read_norms(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """(2·layers + 1, C): attention and feed-forward norm of every layer, then the last."""
    names = [
        f"layers.{n}.{name}.weight"
        for n in range(checkpoint.config.n_layers)
        for name in ("attention_norm", "ffn_norm")
    ]
    return np.stack([checkpoint.float32(name) for name in [*names, "norm.weight"]])


def conversions(checkpoint: Checkpoint, kinds: dict[str, Kind]) -> list[str]:
    """One line on what is not computed in its own format, for `show`."""
    pairs = {(checkpoint.info(name).dtype, kind.name) for name, kind in kinds.items()}
    changed = [f"{stored} as {kind}" for stored, kind in sorted(pairs) if stored != kind]
    return [f"computed in another format than stored: {', '.join(changed)}"] if changed else []
