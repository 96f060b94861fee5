"""What a run will take on this machine: memory, before it is taken, and time."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glassllama.base.machine import available_memory, gigabytes, require_memory
from glassllama.train.batches import bytes_of_batch
from glassllama.train.data import Data
from glassllama.train.distributed import ALONE, Team
from glassllama.train.loop import one_step, parts
from glassllama.train.model_factory import as_module, numbers_of, parameters, vocabulary_rows
from glassllama.train.optimizers import Optimisers
from glassllama.train.run import Progress, Run
from glassllama.train.settings import Settings

FLOAT = 4  # bytes
LOGIT_COPIES = 3  # logits of a chunk, their softmax, their gradient
HEAP = 1.15  # freed tensors of less than 32 MiB may stay with the process: a seventh, measured
GRADIENTS = 2  # of the last layer's output: in pieces, and put together
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
    memory = require_step_fits(run)
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


def require_space(settings: Settings, data: Data, team: Team = ALONE) -> None:
    """Raise MemoryShortError, before a model is made, where not even what follows from sizes fits.

    That is this rank's share of the batch and of the numbers beside the weights; what the layers
    keep for the backward pass is counted by `require_step_fits`, which needs the model.
    """
    numbers = numbers_of(settings, data.tokenizer.vocab_size)
    if settings.run.device == "cpu":
        needed = memory_without_layers(settings, data, numbers, team.world)
    else:  # of which the batch is made here
        rows = settings.data.batch // team.world
        needed = bytes_of_batch(data.learnt, rows, settings.data.context)
    require(settings, needed)


def require_step_fits(run: Run) -> int:
    """The bytes that a step takes. Raises MemoryShortError, before it is made, if it cannot be."""
    memory = memory_of_step(run)
    if run.settings.run.device == "cpu":
        require(run.settings, memory)
    return memory


def require(settings: Settings, needed: int) -> None:
    require_memory(
        needed,
        what=f"{settings.name}: a step",
        instead="raise run.accumulate, or lower data.batch, data.context or the model's sizes",
    )


def memory_of_step(run: Run) -> int:
    """Batch, weights, gradients, optimisers, and what a part of a batch keeps for going back."""
    rows = run.settings.data.batch // run.settings.run.accumulate
    rest = memory_without_layers(run.settings, run.data, parameters(run.model), 1)
    one, two = kept_for_backward(run, 1), kept_for_backward(run, 2)
    row = two - one
    once = max(0, one - row)  # joined weights, which serve all rows
    return rest + once + round(HEAP * rows * row)


def memory_without_layers(s: Settings, data: Data, numbers: int, world: int) -> int:
    """Bytes of one rank: the batch, all that is as large as the weights, and a chunk's logits."""
    copies = 2 + 2 + (s.optimiser.ema > 0)  # weights, gradients, AdamW's two means (Muon: one)
    rows = s.data.batch // world
    positions = min(s.run.loss_chunk, rows // s.run.accumulate * s.data.context)
    logits = LOGIT_COPIES * positions * vocabulary_rows(s, data.tokenizer.vocab_size)
    batch = bytes_of_batch(data.learnt, rows, s.data.context)
    return batch + FLOAT * (copies * numbers // world + logits)


def kept_for_backward(run: Run, rows: int) -> int:
    """Bytes at the peak of a step of `rows`: what its forward pass keeps, counted while it does.

    Going back takes the gradients of one layer besides, and those of the vectors that all layers
    end in: in pieces (train/loss.py), then put together. Logits are left out.
    """
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in as_module(run.model).parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = replace(run.batches, batch=rows).at(0)
    ids, _, documents = next(iter(parts(batch, 1, run.settings.run.device)))
    compiled = run.settings.run.compile  # compiling would take longer than this one pass
    as_it_stands = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with as_it_stands, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        held = run.model.hidden(ids, segments=documents)  # while it lives, so does what it keeps
    count(held)
    forward, layers = sum(kept.values()), getattr(run.model.config, "n_layers", 0)
    return forward + (forward // layers if layers else 0) + GRADIENTS * held.nbytes


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s", 4000 -> "1 h 7 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
