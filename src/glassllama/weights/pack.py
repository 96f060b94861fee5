"""A checkpoint → the packed CPU engine: in slices of rows, by all threads, strictly in order.

What is packed as what is decided in quantization.py; what large models were packed to is kept on
disk by packed_cache.py, and mapped the next time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from glassllama.base.interfaces import CacheType, Progress
from glassllama.native.engine.executor import Engine, Weights
from glassllama.native.engine.layout import GROUP, Arena, Matrix, empty_matrix
from glassllama.native.engine.repack import fill, fill_rounded
from glassllama.native.engine.thread_pool import num_processors
from glassllama.native.jit.code_cache import seal
from glassllama.weights.open import Checkpoint
from glassllama.weights.packed_cache import open_buffer
from glassllama.weights.quantization import EMBEDDINGS, Quantize, choose

SLICE_NUMBERS = 1 << 18  # numbers of a tensor in the making at once, per thread
MAPPED_BYTES = 1 << 26  # of the file, in memory at once before they are let go

Matrices = dict[str, Matrix]


def pack(
    checkpoint: Checkpoint,
    *,
    exact: bool = False,
    quantize: Quantize | None = None,
    cache: CacheType = "int16",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """The engine with this checkpoint's weights. `exact` keeps everything in float32.

    `quantize` makes float weights Q8_0 or Q4_0 on the way, or leaves them ("none"); None takes the
    richest form that fits into memory. `cache` is how keys and values are kept. Peak memory is the
    packed model and little more. Raises MemoryShortError before it allocates, ConfigError.
    """
    packed = choose(checkpoint, exact=exact, quantize=quantize)
    notes = list(packed.notes)
    with open_buffer(checkpoint, packed, notes) as place:
        arena = Arena(packed.nbytes, place.memory)
        matrices: Matrices = {}
        for name, kind in packed.weight_types.items():
            matrices[name] = empty_matrix(arena, kind, *checkpoint.info(name).shape)
        if not place.filled:
            fill_all(checkpoint, matrices, threads or num_processors(), progress)
            place.keep()
    weights = Weights(
        matrices=[
            matrix
            for name, matrix in matrices.items()
            if name != EMBEDDINGS or checkpoint.config.tie_embeddings
        ],
        embeddings=matrices[EMBEDDINGS],
        norms=read_norms(checkpoint),
    )
    engine = Engine(
        checkpoint.config, weights, exact=exact, cache=cache, threads=threads, notes=notes
    )
    seal()
    return engine


def fill_all(
    checkpoint: Checkpoint, matrices: Matrices, threads: int, progress: Progress | None
) -> None:
    """Every slice of every tensor, by so many threads; mapped pages are let go on the way."""

    def move(piece: tuple[str, slice]) -> None:
        name, rows = piece
        move_rows(checkpoint, name, matrices[name], rows)

    done, mapped = 0, 0
    with ThreadPoolExecutor(threads) as pool:
        pieces = [(name, rows) for name, matrix in matrices.items() for rows in slices(matrix)]
        for (name, rows), _ in zip(pieces, pool.map(move, pieces), strict=True):
            info = checkpoint.info(name)
            mapped += info.nbytes // info.shape[0] * (rows.stop - rows.start)
            last = rows.stop == info.shape[0]
            if last or mapped >= MAPPED_BYTES:
                checkpoint.release_pages(name)
                mapped = 0
            done += last
            if last and progress is not None:
                progress(done, len(matrices))


def slices(matrix: Matrix) -> Iterator[slice]:
    """The rows of a matrix in pieces of whole groups, small enough to make several at once."""
    step = max(1, SLICE_NUMBERS // (GROUP * matrix.columns)) * GROUP
    for first in range(0, matrix.rows, step):
        yield slice(first, min(first + step, matrix.rows))


def move_rows(checkpoint: Checkpoint, name: str, matrix: Matrix, rows: slice) -> None:
    """Some rows of a tensor: as the file has them if of that kind, else by way of floats."""
    if checkpoint.info(name).dtype == matrix.weight_type.name:
        fill(matrix, rows.start, checkpoint.read(name, rows))
    elif matrix.weight_type.name == "F32":
        fill(matrix, rows.start, checkpoint.float32(name, rows))
    else:
        fill_rounded(matrix, rows.start, checkpoint.float32(name, rows))


def read_norms(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """(2·layers + 1, C): attention and feed-forward norm of every layer, then the last."""
    names = [
        f"layers.{n}.{name}.weight"
        for n in range(checkpoint.config.n_layers)
        for name in ("attention_norm", "ffn_norm")
    ]
    return np.stack([checkpoint.float32(name) for name in [*names, "norm.weight"]])
