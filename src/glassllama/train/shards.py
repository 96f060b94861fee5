"""A sharded run's tensors on disk: PyTorch's distributed checkpoint, in safetensors files.

Every rank writes what it holds into a file of its own; any number of ranks, or a process alone,
reads what it needs of them. PyTorch's usual form keeps names and places in a pickle, `.metadata`,
which runs whatever its writer put there: it is neither written nor read here.
"""

from __future__ import annotations

import errno
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor.experimental import implicit_replication

from glassllama.base.errors import quoted
from glassllama.train.faults import TrainingError
from glassllama.train.run import read_tensors


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """This rank's parts of the tensors, into a folder that all ranks write. Raises OSError."""
    try:
        save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        )
    except CheckpointException as error:
        raise OSError(errno.EIO, reason(error), str(folder)) from None


def read_shards(folder: Path, into: Mapping[str, Tensor], *, alone: bool) -> None:
    """Fill the tensors, or this rank's parts of them, from a folder of such files.

    Raises TrainingError: missing or other tensors, parts that are missing, damage.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
        require_complete(folder, found, into)
        with warnings.catch_warnings():  # one process reads alone on purpose
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(dict(into), storage_reader=reader, no_dist=alone)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{folder}: {error}") from None
    except CheckpointException as error:
        raise TrainingError(f"{folder}: {reason(error)}") from None


def require_complete(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """All names, their shapes, and every part of each: what is not there would not be missed."""
    if odd := sorted(set(found) ^ set(wanted)):
        names = ", ".join(quoted(name) for name in odd[:5])
        raise TrainingError(f"{folder}: missing or not expected: {names}")
    for name, tensor in wanted.items():
        there = sum(math.prod(part.sizes) for part in found[name].chunks)
        shape, dtype = tuple(found[name].size), found[name].properties.dtype
        if shape != tuple(tensor.shape) or dtype != tensor.dtype or there != tensor.numel():
            raise TrainingError(
                f"{folder}: {name}: {there} numbers, {dtype} of shape {quoted(shape)}, expected "
                f"{tensor.dtype} of {tuple(tensor.shape)}: a shard is missing, or another run's"
            )


def read_whole(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fill this rank's parts from a file that a process alone has written (run.read_tensors)."""
    with implicit_replication():
        read_tensors(path, into)


def reason(error: CheckpointException) -> str:
    """What happened on the first rank where something did."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {getattr(cause, 'strerror', None) or cause}"
