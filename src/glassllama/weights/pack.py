"""A checkpoint → the CPU engine: matrices are packed in slices of rows, by all threads, in order.

backend.py says as which weight type a matrix is packed. The packed weights of large models
are cached on disk by packed_cache.py and mapped the next time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from glassllama.base.errors import ConfigError, MemoryShortError
from glassllama.base.interfaces import CacheType, Progress
from glassllama.base.machine import available_memory, gigabytes
from glassllama.native.engine.executor import Engine
from glassllama.native.engine.layout import Matrix, allocate_matrices
from glassllama.native.engine.repack import pack_matrix, row_slices
from glassllama.native.engine.thread_pool import num_processors
from glassllama.native.engine.workspace import Weights, vector_shapes
from glassllama.native.jit.code_cache import save_checksums
from glassllama.weights.backend import (
    CHOICES,
    EMBEDDINGS,
    PACKING_MEMORY,
    PackingPlan,
    Quantize,
    check_choice,
    estimate_memory,
    packing_plan,
)
from glassllama.weights.checkpoint import Checkpoint
from glassllama.weights.packed_cache import open_buffer

SLICE_NUMBERS = 1 << 18  # numbers that a thread packs at once
MAPPED_BYTES = 1 << 26  # of the file that are mapped before their pages are released


def pack(
    checkpoint: Checkpoint,
    *,
    exact: bool = False,
    quantize: Quantize | None = None,
    cache: CacheType = "int16",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """The engine with this checkpoint's weights. `exact` computes everything in float32.

    `quantize` makes float weights Q8_0 or Q4_0, or leaves them ("none"); None takes the most
    precise form that fits into memory. `cache` is the type of the KV cache. Peak memory is the
    packed model and little more. Raises MemoryShortError before it allocates, ConfigError.
    """
    packed = choose_packing(checkpoint, exact=exact, quantize=quantize)
    notes, plan = list(packed.notes), checkpoint.layer_plan
    with open_buffer(checkpoint, packed, notes) as (memory, filled):
        types = {}
        for name, weight_type in packed.weight_types.items():
            rows, columns = checkpoint.info(name).shape
            types[name] = (weight_type, rows, columns)
        matrices = allocate_matrices(types, memory)
        if not filled:
            pack_all(checkpoint, matrices, threads or num_processors(), progress)
    weights = Weights(
        matrices=[m for name, m in matrices.items() if name != EMBEDDINGS or plan.tie_embeddings],
        embeddings=matrices[EMBEDDINGS],
        vectors={name: np.array(checkpoint.float32(name)) for name in vector_shapes(plan)},
    )
    engine = Engine(
        checkpoint.config, weights, exact=exact, cache=cache, threads=threads, notes=notes,
        plan=plan,
    )  # fmt: skip
    save_checksums()
    return engine


def pack_all(
    checkpoint: Checkpoint, matrices: dict[str, Matrix], threads: int, progress: Progress | None
) -> None:
    """Pack every tensor, in slices of rows, by so many threads; mapped pages are released."""

    def pack_rows(piece: tuple[str, slice]) -> None:
        (name, rows), matrix = piece, matrices[piece[0]]
        as_stored = checkpoint.info(name).dtype == matrix.weight_type.name
        read = checkpoint.read if as_stored else checkpoint.float32
        pack_matrix(matrix, rows.start, read(name, rows))

    done, mapped = 0, 0
    with ThreadPoolExecutor(threads) as pool:
        pieces = [
            (name, rows)
            for name, matrix in matrices.items()
            for rows in row_slices(matrix, SLICE_NUMBERS)
        ]
        for (name, rows), _ in zip(pieces, pool.map(pack_rows, pieces), strict=True):
            info = checkpoint.info(name)
            mapped += info.nbytes // info.shape[0] * (rows.stop - rows.start)
            last = rows.stop == info.shape[0]
            if last or mapped >= MAPPED_BYTES:
                checkpoint.release_pages(name)
                mapped = 0
            done += last
            if last and progress is not None:
                progress(done, len(matrices))


def choose_packing(
    checkpoint: Checkpoint, *, exact: bool, quantize: Quantize | None
) -> PackingPlan:
    """How to pack: as asked for, else the most precise form that fits into memory, with a note.

    Raises ConfigError if both exact and quantized weights are asked for, and MemoryShortError.
    """
    check_choice("quantize", quantize, (None, *CHOICES))
    if exact and quantize not in (None, "none"):
        raise ConfigError("exact arithmetic keeps every weight as it is: leave out quantize")
    free = available_memory()
    first = packing_plan(checkpoint, exact=exact, quantize=quantize or "none")
    if free is None or first.nbytes + PACKING_MEMORY <= free:
        return first
    for choice in CHOICES[1:] if quantize is None and not exact else ():
        packed = packing_plan(checkpoint, exact=False, quantize=choice)
        if packed.nbytes < first.nbytes and packed.nbytes + PACKING_MEMORY <= free:
            stored = checkpoint.info("layers.0.feed_forward.gate.weight").dtype
            note = (
                f"{stored} weights need {gigabytes(first.nbytes)}, {gigabytes(free)} are free: "
                f"quantized to {choice} ({gigabytes(packed.nbytes)}); decide yourself with "
                "quantize none, q8_0 or q4_0"
            )
            return replace(packed, notes=[note])
    raise MemoryShortError(
        f"{checkpoint.path.name}, packed for the engine, needs "
        f"{gigabytes(first.nbytes + PACKING_MEMORY)} of memory, {gigabytes(free)} are free; "
        f"{estimate_memory(checkpoint, tokens=1, memory=free).advice()}"
    )
