"""How a checkpoint is run: the backend, the weight types of the engine, the memory that it takes.

Options are checked before anything is opened, and memory is computed before it is allocated. The
ways to run a model: the CPU engine with packed weights, float weights quantized on the way or not;
the reference model with all weights in bfloat16 or float32; and the same model streamed, with the
weights of one layer in memory at a time (`streamed_model` of weights/load.py). Needs no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from glassllama.base.errors import ConfigError, quoted
from glassllama.base.interfaces import CACHE_NUMBER, CACHE_SCALE, CacheType, TensorInfo
from glassllama.base.machine import available_memory, gigabytes
from glassllama.formats.blocks import FLOATS
from glassllama.native.engine.layout import BLOCK, WeightType, packed_bytes
from glassllama.weights.checkpoint import Checkpoint

Backend = Literal["auto", "engine", "torch"]
Dtype = Literal["float32", "bfloat16"]
Quantize = Literal["none", "q8_0", "q4_0"]
CHOICES: tuple[Quantize, ...] = get_args(Quantize)  # by decreasing precision

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"

# Measured resident sets of fresh processes that imported and first used them.
PYTORCH_ITSELF = 320_000_000
ENGINE_ITSELF = 150_000_000
PACKING_MEMORY = 200_000_000  # compiled code, activations, slices while the engine packs
WORKING_MEMORY = 100_000_000  # activations of 512 tokens in the reference model
BLOCK_NUMBERS = 1 << 24  # weights of a streamed output matrix at once: 64 MiB of float32


# --- options --------------------------------------------------------------------------------


def choose_backend(
    backend: Backend, device: str, dtype: str | None, stream_layers: bool = False
) -> Literal["engine", "torch"]:
    """Which executor; ConfigError where what was asked for cannot go together."""
    check_choice("backend", backend, get_args(Backend))
    if not isinstance(device, str) and not hasattr(device, "type"):  # torch.device has one
        raise ConfigError(f"device must be a name such as cpu or cuda:0, got {quoted(device)}")
    if backend == "engine" and stream_layers:
        raise ConfigError("--stream-layers is for the torch backend: leave it out, or the engine")
    needs_torch = device != "cpu" or dtype is not None
    if backend == "engine" and needs_torch:
        asked = f"device {quoted(device)}" if device != "cpu" else f"dtype {dtype}"
        raise ConfigError(f"the engine runs on the CPU in its own precision, not with {asked}")
    return "torch" if backend == "torch" or needs_torch or stream_layers else "engine"


def check_numbers(dtype: str | None, quantize: str | None, cache: str, threads: int | None) -> None:
    """ConfigError for a form of numbers that there is not, or threads that cannot be."""
    check_choice("dtype", dtype, (None, *get_args(Dtype)))
    check_choice("quantize", quantize, (None, *CHOICES))
    check_choice("cache", cache, get_args(CacheType))
    whole = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
    if threads is not None and not (whole and threads > 0):
        raise ConfigError(
            "threads must be a whole number of at least 1, or None for every core, got "
            f"{quoted(threads)}"
        )


def check_choice(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be {' or '.join(map(str, allowed))}, got {quoted(value)}")


def check_precision(
    chosen: str, dtype: str | None, exact: bool, quantize: str | None, cache: str,
    stream_layers: bool = False,
) -> None:  # fmt: skip
    """ConfigError where two precisions are asked for, or one that the backend does not have."""
    torch = "--stream-layers" if stream_layers else "the torch backend"
    if exact and dtype == "bfloat16":
        raise ConfigError("exact arithmetic is float32: leave out dtype bfloat16")
    if chosen == "torch" and quantize not in (None, "none"):
        raise ConfigError(f"quantize {quantize} is for the engine, not for {torch}")
    if cache == "int8" and (exact or chosen == "torch"):
        why = "exact arithmetic keeps float32" if exact else f"{torch} has its own"
        raise ConfigError(f"cache int8 is for the engine: {why}")


# --- weight types of the engine -------------------------------------------------------------


@dataclass(frozen=True)
class PackingPlan:
    """How a checkpoint is packed. `weight_types` in the order of the matrices in memory."""

    weight_types: dict[str, WeightType]
    nbytes: int
    notes: list[str]


def packing_plan(checkpoint: Checkpoint, *, exact: bool, quantize: Quantize) -> PackingPlan:
    """The weight type of every matrix. Raises ConfigError if the engine cannot run the model.

    All block types stay as they are: the engine computes with each (native/engine/layout.py). Float
    weights stay floats, or are quantized while they are packed: if asked for, and if memory is too
    short (weights/pack.py).
    """
    weight_types = {
        name: packed_type(checkpoint, name, exact, quantize)
        for name in checkpoint.layer_plan.matrices()
    }
    nbytes = sum(
        packed_bytes(weight_type, *checkpoint.info(name).shape)
        for name, weight_type in weight_types.items()
    )
    stored = {name: checkpoint.info(name).dtype for name in weight_types}
    pairs = {(stored[name], kind.name) for name, kind in weight_types.items()}
    changed = [f"{theirs} as {packed}" for theirs, packed in sorted(pairs) if theirs != packed]
    notes = []
    if changed and not exact:
        notes.append(f"computed in another format than stored: {', '.join(changed)}")
    if quantize != "none" and not set(FLOATS) & {*stored.values()}:
        notes.append(f"quantize {quantize} changes nothing: the file is quantized already")
    return PackingPlan(weight_types, nbytes, notes)


def packed_type(checkpoint: Checkpoint, name: str, exact: bool, quantize: Quantize) -> WeightType:
    """The weight type of one matrix.

    Embeddings and output always have at least eight bits: they are the most sensitive to rounding,
    because every token's logit is computed from them.
    """
    info = checkpoint.info(name)
    if exact:
        return WeightType["F32"]
    if info.dtype in FLOATS:
        if quantize == "none" or info.shape[1] % BLOCK:
            return WeightType["F32" if info.dtype == "F64" else info.dtype]
        return WeightType["Q8_0" if name in (EMBEDDINGS, OUTPUT) else quantize.upper()]
    return WeightType[info.dtype]


# --- memory ---------------------------------------------------------------------------------


RunMode = Literal["engine", "q8_0", "q4_0", "bfloat16", "float32", "streamed"]
OPTIONS: dict[RunMode, str] = {
    "engine": "backend engine",
    "q8_0": "backend engine, quantize q8_0",
    "q4_0": "backend engine, quantize q4_0",
    "bfloat16": "backend torch, dtype bfloat16",
    "float32": "backend torch, dtype float32",
    "streamed": "layer by layer from the file (stream_layers)",
}


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
    cache = checkpoint.layer_plan.kv_bytes(CACHE_NUMBER["int16"], CACHE_SCALE, tokens)
    last = 0
    for quantize in CHOICES:
        size = packing_plan(checkpoint, exact=False, quantize=quantize).nbytes
        if size != last:  # a file that is quantized already stays as it is
            mode: RunMode = "engine" if quantize == "none" else quantize
            yield mode, size + PACKING_MEMORY + ENGINE_ITSELF + cache
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
    """The reference model, one layer at a time (weights/load.py)."""
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
