"""One run by several processes: who is who, and how they agree.

`torchrun --nproc-per-node 2 -m glassllama train …` starts the same program twice and tells each, by
its environment, which of them it is: its rank. Every rank computes its rows of each batch; sums
over all of them make losses and gradients those of one process. The first rank leads: it alone
prints, and writes what all have in common. How weights are shared out is train/sharding.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from glassllama.base.errors import ConfigError
from glassllama.train.faults import TrainingError

T = TypeVar("T")

# How long a rank waits for the others within a step, where all do the same. Of one that was killed
# they hear at once; this is for one that hangs, or whose machine is gone.
PATIENCE = timedelta(seconds=50)
LONG_WORK = timedelta(days=1)  # that the leader does alone: a corpus to tokenize, files to write
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
# What gloo, NCCL and the store of addresses say when somebody is gone; PyTorch has no class for it.
LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "socket")


@dataclass(frozen=True)
class Team:
    """The ranks of a run, seen from one of them. Without torchrun: this process alone."""

    rank: int = 0
    world: int = 1  # how many there are
    _patient: dist.ProcessGroup | None = None  # all of them, for waits of any length

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks, element by element; the same bits on each of them."""
        if self.alone:
            return numbers
        numbers = numbers.clone()
        dist.all_reduce(numbers)
        return numbers

    def greatest(self, number: int) -> int:
        """The largest of what the ranks have."""
        if self.alone:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def wait(self) -> None:
        """Until all ranks have come here."""
        if not self.alone:
            dist.all_reduce(torch.zeros(1), group=self._patient)

    def lead_first(self, work: Callable[[], T]) -> T:
        """Let the leader work while the others wait, and then them.

        Where it fails there, the others end without a word: the leader has said why.
        """
        if self.alone:
            return work()
        done = torch.zeros(1)
        try:
            if self.leads:
                result = work()
                done += 1
        finally:
            dist.broadcast(done, src=0, group=self._patient)
        if not done:
            raise SystemExit(1)
        return result if self.leads else work()

    def require_even(self, batch: int, parts: int) -> None:
        """Raise ConfigError where a batch cannot be cut into equal parts for all ranks."""
        if batch % (self.world * parts):
            raise ConfigError(
                f"data.batch: {batch} rows cannot be shared by {self.world} ranks in {parts} equal "
                "part(s) each (run.accumulate); take a multiple of their product"
            )


ALONE = Team()


def torchrun_rank() -> tuple[int, int]:
    """(rank, number of ranks), as torchrun says; (0, 1) in a process that it did not start."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def together(device: str) -> Iterator[Team]:
    """Within, the ranks are connected: by gloo on CPUs, by NCCL on GPUs.

    Raises ConfigError where `device` cannot be shared out, TrainingError where a rank is lost.
    """
    rank, world = torchrun_rank()
    if world == 1:
        yield ALONE
        return
    backend = choose_backend(device)
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        yield Team(rank, world, dist.new_group(backend="gloo", timeout=LONG_WORK))
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in LOST):
            raise
        raise TrainingError(
            f"rank {rank} of {world}: lost the others: one was killed, ended with an error, or "
            f"hung for {PATIENCE.seconds} s (torchrun says which); go on with --resume auto"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_backend(device: str) -> str:
    """What carries tensors between ranks; on GPUs each rank takes its own of its machine's."""
    if device not in BACKENDS:
        raise ConfigError(
            f"run.device: want one of {', '.join(BACKENDS)} for several ranks, got {device!r} "
            "(each rank takes its own GPU)"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return BACKENDS[device]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it: a DTensor, whose module takes seconds to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; all ranks must ask."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor
