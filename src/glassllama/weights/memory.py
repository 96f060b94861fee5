"""The memory that each way to run a checkpoint takes, computed before anything is allocated.

The ways: the CPU engine with packed weights, float weights quantized on the way or not; the
reference model with all weights in bfloat16 or float32; and the same model streamed, with the
weights of one layer in memory at a time (weights/stream.py). Needs no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from glassllama.base.interfaces import CACHE_NUMBER, CACHE_SCALE, TensorInfo
from glassllama.base.machine import available_memory, gigabytes
from glassllama.weights.checkpoint import Checkpoint

RunMode = Literal["engine", "q8_0", "q4_0", "bfloat16", "float32", "streamed"]
OPTIONS: dict[RunMode, str] = {
    "engine": "backend engine",
    "q8_0": "backend engine, quantize q8_0",
    "q4_0": "backend engine, quantize q4_0",
    "bfloat16": "backend torch, dtype bfloat16",
    "float32": "backend torch, dtype float32",
    "streamed": "layer by layer from the file (stream_layers)",
}

# Measured resident sets of fresh processes that imported and first used them.
PYTORCH_ITSELF = 320_000_000
ENGINE_ITSELF = 150_000_000
WORKING_MEMORY = 100_000_000  # activations of 512 tokens in the reference model
BLOCK_NUMBERS = 1 << 24  # weights of a streamed output matrix at once: 64 MiB of float32


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak for each way to run a checkpoint, the fastest first."""

    free: int | None  # bytes that can be had; None: the system does not say
    peaks: dict[RunMode, int]  # imports, weights and cache

    @property
    def best(self) -> RunMode | None:
        """The fastest way that fits; None if nothing does."""
        fits = (mode for mode, peak in self.peaks.items() if self.free is None or peak <= self.free)
        return next(fits, None)

    def advice(self) -> str:
        """One sentence for an error message: the way to run this model here."""
        if self.best is not None:
            return f"use {OPTIONS[self.best]}: it takes {gigabytes(self.peaks[self.best])}"
        least = min(self.peaks, key=lambda mode: self.peaks[mode])
        return (
            f"nothing fits; the least is {gigabytes(self.peaks[least])}, {OPTIONS[least]}: close "
            "other programs, or use a smaller model"
        )


def estimate_memory(
    checkpoint: Checkpoint, *, tokens: int, memory: int | None = None
) -> MemoryEstimate:
    """The memory for one sequence of up to `tokens` tokens, prompt and answer together.

    `memory` is what may be used, in bytes; None asks the system. Raises ConfigError for a model
    that only PyTorch runs.
    """
    own = 2 if checkpoint.info("tok_embeddings.weight").dtype == "BF16" else 4
    return MemoryEstimate(
        free=available_memory() if memory is None else memory,
        peaks={
            **dict(engine_memory(checkpoint, tokens)),
            "bfloat16": model_memory(checkpoint, tokens, 2),
            "float32": model_memory(checkpoint, tokens, 4),
            "streamed": streamed_memory(checkpoint, tokens, own),
        },
    )


def engine_memory(checkpoint: Checkpoint, tokens: int) -> Iterator[tuple[RunMode, int]]:
    """Packed weights (weights/pack.py), with the default KV cache."""
    from glassllama.weights import quantization  # imports the engine

    cache = tokens * checkpoint.layer_plan.kv_bytes(CACHE_NUMBER["int16"], CACHE_SCALE)
    others = quantization.WORKING_MEMORY + ENGINE_ITSELF + cache
    modes: dict[quantization.Quantize, RunMode] = {"none": "engine", "q8_0": "q8_0", "q4_0": "q4_0"}
    last = 0
    for choice, mode in modes.items():
        size = quantization.packing_plan(checkpoint, exact=False, quantize=choice).nbytes
        if size != last:  # a file that is quantized already stays as it is
            yield mode, size + others
        last = size


def model_memory(checkpoint: Checkpoint, tokens: int, itemsize: int) -> int:
    """The reference model with all its weights (weights/load.py)."""
    infos = [checkpoint.info(name) for name in checkpoint.names]
    return (
        sum(itemsize * math.prod(info.shape) for info in infos)
        + max(reading_memory(info, itemsize) for info in infos)
        + tokens * checkpoint.layer_plan.kv_bytes(itemsize)
        + PYTORCH_ITSELF
        + WORKING_MEMORY
    )


def streamed_memory(checkpoint: Checkpoint, tokens: int, itemsize: int) -> int:
    """The reference model, one layer at a time (weights/stream.py)."""
    layer = [checkpoint.info(name) for name in checkpoint.names if name.startswith("layers.0.")]
    in_layer = sum(itemsize * math.prod(info.shape) for info in layer)
    in_layer += max(reading_memory(info, itemsize) for info in layer)
    embeddings = math.prod(checkpoint.info("tok_embeddings.weight").shape)
    # A block of rows of the output matrix: as stored, in float32, and as computed with.
    block = min(BLOCK_NUMBERS, embeddings) * (4 + 4 + itemsize)
    cache = tokens * checkpoint.layer_plan.kv_bytes(itemsize)
    return max(in_layer, block) + cache + PYTORCH_ITSELF + WORKING_MEMORY


def reading_memory(info: TensorInfo, itemsize: int) -> int:
    """Memory besides the tensor itself while it is read: mapped pages, float32 in between."""
    direct = itemsize == 4 or info.dtype == "BF16"
    return info.nbytes + (0 if direct else 4 * math.prod(info.shape))
