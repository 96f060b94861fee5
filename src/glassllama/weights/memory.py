"""What running a checkpoint would take here, said before anything is allocated.

The ways: the CPU engine with packed weights, float weights quantised on the way or not; the
reference model whole in bfloat16 or in float32; and the same model streamed, one layer in memory
at a time (weights/stream.py). Each has a price in
memory, in bytes read from the disk and in time. At most 64 megabytes of the file are read here,
to learn how fast it comes. No PyTorch is needed to plan for it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glassllama.base.config import kv_bytes
from glassllama.base.interfaces import CACHE_NUMBER, CACHE_SCALE, TensorInfo
from glassllama.base.machine import available_memory, gigabytes
from glassllama.weights.open import Checkpoint

WayName = Literal["engine", "q8_0", "q4_0", "bfloat16", "float32", "streamed"]
HOW: dict[WayName, str] = {
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
BLOCK_NUMBERS = 1 << 24  # weights of a streamed output matrix in hand at once: 64 MiB of float32

SAMPLES, SAMPLE_BYTES = 4, 16 << 20  # read from random places of the file to learn its speed


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a checkpoint, with its price. Sizes in bytes."""

    name: WayName
    memory: int  # at the peak, everything: imports, weights, cache
    reads_once: int  # while loading
    reads_per_pass: int  # a prompt is a pass, and every new token is one


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All ways to run one checkpoint, the fastest first."""

    model: str
    tokens: int  # prompt and answer together, for which the cache has room
    free: int | None  # bytes of memory that can be had; None: the system does not say
    speed: float  # bytes of the file that are read and converted in a second, just measured
    ways: tuple[Way, ...]

    def fits(self, way: Way) -> bool:
        return self.free is None or way.memory <= self.free

    @property
    def best(self) -> Way | None:
        """The fastest way that fits; None where nothing does."""
        return next((way for way in self.ways if self.fits(way)), None)

    def way(self, name: WayName) -> Way:
        return next(way for way in self.ways if way.name == name)

    def seconds_to_load(self, way: Way) -> float:
        """Reading alone, at the speed that was sampled: an estimate."""
        return way.reads_once / self.speed

    def seconds_per_pass(self, way: Way) -> float:
        """Reading alone, an estimate; zero where the weights stay in memory."""
        return way.reads_per_pass / self.speed

    def describe(self) -> str:
        """A few plain lines: what is there, what each way takes, which one to use."""
        there = "memory unknown" if self.free is None else f"{gigabytes(self.free)} of memory free"
        head = f"{self.model}, {self.tokens} tokens: {there}, file at {gigabytes(self.speed)}/s"
        return "\n".join([head, *(f"  {self._line(way)}" for way in self.ways), self.advice()])

    def advice(self) -> str:
        """One sentence: what to use here, for a person who asked for something too large."""
        if self.best is not None:
            return f"use {HOW[self.best.name]}: it takes {gigabytes(self.best.memory)}"
        least = min(self.ways, key=lambda way: way.memory)
        return (
            f"nothing fits; the least is {gigabytes(least.memory)}, {HOW[least.name]}: close other "
            "programs, or use a smaller model"
        )

    def _line(self, way: Way) -> str:
        verdict = "fits" if self.fits(way) else "too large"
        once, each = self.seconds_to_load(way), self.seconds_per_pass(way)
        if way.reads_per_pass:
            reads = (
                f"reads {gigabytes(way.reads_per_pass)} for every token: about {each:.1f} s each"
            )
        else:
            reads = f"reads {gigabytes(way.reads_once)} once: about {once:.1f} s"
        return f"{way.name:9} {gigabytes(way.memory):>10}  {verdict:10} {reads}"


def plan(checkpoint: Checkpoint, *, tokens: int, memory: int | None = None) -> Plan:
    """What running `checkpoint` on one row of up to `tokens` takes, each way.

    `memory` is what may be used, in bytes; None asks the system.
    """
    ways = (
        *engine_ways(checkpoint, tokens),
        whole_way(checkpoint, tokens, "bfloat16"),
        whole_way(checkpoint, tokens, "float32"),
        streamed_way(checkpoint, tokens, kept_itemsize(checkpoint)),
    )
    return Plan(
        model=checkpoint.path.name,
        tokens=tokens,
        free=available_memory() if memory is None else memory,
        speed=read_speed(checkpoint),
        ways=ways,
    )


def engine_ways(checkpoint: Checkpoint, tokens: int) -> Iterator[Way]:
    """Packed weights (weights/pack.py), as they are or quantised; the default cache."""
    from glassllama.weights import quantization

    cache = tokens * kv_bytes(checkpoint.config, CACHE_NUMBER["int16"], CACHE_SCALE)
    beside = quantization.WORKING_MEMORY + ENGINE_ITSELF + cache
    reads, last = stored_bytes(checkpoint), 0
    names: dict[quantization.Quantize, WayName] = {"none": "engine", "q8_0": "q8_0", "q4_0": "q4_0"}
    for choice, name in names.items():
        size = quantization.packing_plan(checkpoint, exact=False, quantize=choice).nbytes
        if size != last:  # a file that is quantised already stays as it is
            yield Way(name=name, memory=size + beside, reads_once=reads, reads_per_pass=0)
        last = size


def whole_way(checkpoint: Checkpoint, tokens: int, dtype: Literal["bfloat16", "float32"]) -> Way:
    """The reference model with all its weights (weights/load.py)."""
    size = 2 if dtype == "bfloat16" else 4
    infos = [checkpoint.info(name) for name in checkpoint.names]
    memory = (
        sum(size * numel(info) for info in infos)
        + max(while_reading(info, size) for info in infos)
        + tokens * kv_bytes(checkpoint.config, size)
        + PYTORCH_ITSELF
        + WORKING_MEMORY
    )
    return Way(name=dtype, memory=memory, reads_once=stored_bytes(checkpoint), reads_per_pass=0)


def streamed_way(checkpoint: Checkpoint, tokens: int, itemsize: int) -> Way:
    """The reference model, one layer at a time (weights/stream.py)."""
    layer = [checkpoint.info(name) for name in checkpoint.names if name.startswith("layers.0.")]
    in_layer = sum(itemsize * numel(info) for info in layer)
    in_layer += max(while_reading(info, itemsize) for info in layer)
    embeddings = checkpoint.info("tok_embeddings.weight")
    # A block of the output's rows: as stored, in float32, and as wanted.
    block = min(BLOCK_NUMBERS, numel(embeddings)) * (4 + 4 + itemsize)
    memory = max(in_layer, block) + tokens * kv_bytes(checkpoint.config, itemsize)
    unread = 0 if checkpoint.config.tie_embeddings else embeddings.nbytes  # but for a few rows
    return Way(
        name="streamed",
        memory=memory + PYTORCH_ITSELF + WORKING_MEMORY,
        reads_once=0,
        reads_per_pass=stored_bytes(checkpoint) - unread,
    )


def while_reading(info: TensorInfo, itemsize: int) -> int:
    """What is there beside the tensor as wanted: its mapped pages, and float32 on the way."""
    direct = itemsize == 4 or info.dtype == "BF16"
    return info.nbytes + (0 if direct else 4 * numel(info))


def stored_bytes(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.info(name).nbytes for name in checkpoint.names)


def numel(info: TensorInfo) -> int:
    return math.prod(info.shape)


def kept_itemsize(checkpoint: Checkpoint) -> int:
    """Bytes of a number if the model chooses: bfloat16 files stay so, all else is float32."""
    return 2 if checkpoint.info("tok_embeddings.weight").dtype == "BF16" else 4


def read_speed(checkpoint: Checkpoint) -> float:
    """Bytes per second that come out of the file, read as loading reads them.

    From random places, so that neither the system's cache of a few pages nor a former measurement
    flatters; a file that is in the cache as a whole is as fast as it looks.
    """
    chance, done, seconds = random.Random(), 0, 0.0
    matrices = [name for name in checkpoint.names if len(checkpoint.info(name).shape) > 1]
    for _ in range(SAMPLES):
        name = chance.choice(matrices)
        info = checkpoint.info(name)
        row = info.nbytes // info.shape[0]
        count = min(info.shape[0], max(1, SAMPLE_BYTES // row))
        first = chance.randrange(info.shape[0] - count + 1)
        rows = slice(first, first + count)
        started = time.perf_counter()
        if info.dtype == "BF16":
            np.array(checkpoint.read(name, rows))
        else:
            checkpoint.float32(name, rows)
        checkpoint.release_pages(name)
        seconds += time.perf_counter() - started
        done += count * row
    return done / max(seconds, 1e-9)
