"""Training by several processes: ranks, sums over ranks, waiting.

`torchrun --nproc-per-node 2 -m glassllama train …` starts the same program twice and tells each its
rank in environment variables. Every rank computes its rows of each batch; sums over all ranks make
losses and gradients those of one process. Rank 0 alone prints, and writes what all have in common.
How weights are sharded is in train/sharding.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor

from glassllama.base.errors import ConfigError, TrainingError

T = TypeVar("T")

# How long a rank waits within a step, where all do the same. Ranks that were killed are noticed at
# once; the limit is for one that hangs, or whose machine is gone.
STEP_TIMEOUT = timedelta(seconds=50)
RANK0_TIMEOUT = timedelta(days=1)  # while rank 0 works alone: tokenizing a corpus, writing files
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
# Words in errors of gloo, NCCL and the address store after a lost connection; PyTorch has no class.
LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "socket")


@dataclass(frozen=True)
class DistContext:
    """The ranks of a run, as seen by one of them. Without torchrun: this process only."""

    rank: int = 0
    world: int = 1  # number of ranks
    _slow_group: torch.distributed.ProcessGroup | None = None  # all ranks, with the long timeout

    @property
    def is_single(self) -> bool:
        return self.world == 1

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, element by element; the same bits on each of them."""
        if self.is_single:
            return values
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values

    def maximum(self, value: int) -> int:
        """The largest value of all ranks."""
        if self.is_single:
            return value
        values = torch.tensor(value)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return int(values)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if not self.is_single:
            torch.distributed.all_reduce(torch.zeros(1), group=self._slow_group)

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 while the others wait, then on them.

        If it fails on rank 0, the others exit silently: rank 0 reports the error.
        """
        if self.is_single:
            return work()
        done = torch.zeros(1)
        try:
            if self.is_rank0:
                result = work()
                done += 1
        finally:
            torch.distributed.broadcast(done, src=0, group=self._slow_group)
        if not done:
            raise SystemExit(1)
        return result if self.is_rank0 else work()

    def require_even(self, batch: int, microbatches: int) -> None:
        """Raise ConfigError if a batch cannot be cut into equal microbatches for all ranks."""
        if batch % (self.world * microbatches):
            raise ConfigError(
                f"data.batch: {batch} rows cannot be shared by {self.world} ranks in "
                f"{microbatches} equal microbatch(es) each (run.accumulate); take a multiple of "
                "their product"
            )


SINGLE_PROCESS = DistContext()


@contextmanager
def connect_ranks(device: str) -> Iterator[DistContext]:
    """Inside, the ranks are connected: by gloo on CPUs, by NCCL on GPUs.

    Raises ConfigError if `device` cannot be shared, TrainingError if a rank is lost.
    """
    torchrun = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    rank, world = (int(os.environ[name]) if torchrun else 0 for name in ("RANK", "WORLD_SIZE"))
    if world <= 1:
        yield SINGLE_PROCESS
        return
    if device not in BACKENDS:
        raise ConfigError(
            f"run.device must be one of {', '.join(BACKENDS)} for several ranks, got {device!r} "
            "(each rank takes its own GPU)"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        torch.distributed.init_process_group(BACKENDS[device], timeout=STEP_TIMEOUT)
        slow_group = torch.distributed.new_group(backend="gloo", timeout=RANK0_TIMEOUT)
        yield DistContext(rank, world, slow_group)
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in LOST):
            raise
        raise TrainingError(
            f"rank {rank} of {world}: lost the others: one was killed, ended with an error, or "
            f"hung for {STEP_TIMEOUT.seconds} s (torchrun says which); go on with --resume auto"
        ) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank has a part of it: a DTensor, whose module takes seconds to import."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; all ranks must call this."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def accept_full_tensors(sharded: bool) -> AbstractContextManager[object]:
    """Inside, full tensors may be copied into sharded ones: each rank takes its part."""
    if not sharded:
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return cast(AbstractContextManager[object], implicit_replication())
