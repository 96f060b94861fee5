"""What a run will take on this machine: memory before anything is allocated, and time."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glassllama.base.machine import available_memory, gigabytes, require_memory
from glassllama.train.build import as_module, parameters
from glassllama.train.loop import one_step, parts
from glassllama.train.optimisers import Optimisers
from glassllama.train.run import Progress, Run

FLOAT = 4  # bytes
LOGIT_COPIES = 3  # logits of a chunk, their softmax, their gradient
PATIENCE = 2.0  # seconds of trial steps, after which no other is begun
FORWARD_SHARE = 1 / 3  # of a training step: the backward pass has two products for each


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`memory` in bytes at the peak of a step, beside what PyTorch itself takes."""

    parameters: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        free = available_memory()
        of = "" if free is None else f" of {gigabytes(free)} free"
        return (
            f"{self.parameters:,} parameters, about {gigabytes(self.memory)}{of}, "
            f"about {duration(self.seconds)}"
        )


def estimate(run: Run) -> Estimate:
    """Measured on a copy of the run, which makes one step.

    Raises MemoryShortError, before that step, where it would not fit.
    """
    memory = memory_of_step(run)
    if run.settings.run.device == "cpu":
        require_memory(
            memory,
            what=f"{run.settings.name}: a step",
            instead="raise run.accumulate, or lower data.batch or data.context",
        )
    twin = copy.deepcopy(run.model)
    trial = replace(
        run,
        model=twin,
        optimisers=Optimisers(as_module(twin), run.settings.optimiser),
        average=None,
        progress=Progress(),
    )
    one = seconds_of_step(trial)
    s = run.settings
    looks = s.schedule.steps // s.run.eval_every if s.run.eval_every else 1
    look = FORWARD_SHARE * len(run.data.held_out) / run.tokens_per_step * one
    return Estimate(
        parameters=parameters(run.model),
        memory=memory,
        seconds=s.schedule.steps * one + looks * look,
    )


def seconds_of_step(trial: Run) -> float:
    """The first step is slower: caches are cold. It has to do where steps are long."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < PATIENCE:
        started = time.perf_counter()
        one_step(trial)
        times.append(time.perf_counter() - started)
    return min(times)


def memory_of_step(run: Run) -> int:
    """Weights, gradients, optimisers, and what a part of a batch keeps for its backward pass."""
    s = run.settings
    numbers = parameters(run.model)
    copies = 2 + 2 + (s.optimiser.ema > 0)  # weights, gradients, AdamW's two means (Muon: one)
    rows = s.data.batch // s.run.accumulate
    positions = min(s.run.loss_chunk, rows * s.data.context)
    logits = LOGIT_COPIES * positions * run.model.config.vocab_size
    return FLOAT * (copies * numbers + logits) + rows * kept_for_backward(run)


def kept_for_backward(run: Run) -> int:
    """Bytes that the layers keep of one row, counted while they keep them; logits left out."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in as_module(run.model).parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = run.batches.at(0)
    segments = None if batch.segments is None else batch.segments[:1]
    row = type(batch)(batch.ids[:1], batch.targets[:1], segments)
    ids, _, documents = next(iter(parts(row, 1, run.settings.run.device)))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        held = run.model.hidden(ids, segments=documents)  # while it lives, so does what it keeps
    del held
    return sum(kept.values())


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s", 4000 -> "1 h 7 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
