"""Weights sharded over ranks by PyTorch's FSDP2 (`fully_shard`, DTensor), and their checkpoints.

Each rank stores its rows of every weight, of its gradient and of its optimizer state. A layer's
weights are gathered while it computes and freed afterwards; gradients are summed over the ranks,
and each rank gets its rows of the sum.

In a checkpoint every rank writes its rows into a safetensors file of its own; any number of ranks,
or a single process, can read them. PyTorch's usual distributed checkpoint has a pickle,
`.metadata`, which may run any code: it is neither written nor read.

Imported only when there are several ranks or such a checkpoint: the imports take seconds. Source:
Zhao et al., "PyTorch FSDP" (2023); sharding per parameter is PyTorch's FSDP2.
"""

from __future__ import annotations

import errno
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from glassllama.base.errors import TrainingError, quoted
from glassllama.models.language_model import LanguageModel
from glassllama.nn.init import shapes_only
from glassllama.train.distributed import DistContext, accept_full_tensors, full_tensor
from glassllama.train.model import new_model
from glassllama.train.settings import Settings


def shard(model: LanguageModel, settings: Settings, dist: DistContext) -> None:
    """Shard a model on the meta device, and give it its first weights.

    They are those of a single process: each rank draws all of them, one tensor at a time, and
    keeps its rows.
    """
    device = settings.run.device
    mesh = init_device_mesh(device, (dist.world,))
    for part in (*getattr(model, "layers", []), model):
        fully_shard(part, mesh=mesh)
        # The loss is divided by the targets of all ranks, so gradients are summed, not averaged.
        cast(FSDPModule, part).set_gradient_divide_factor(1.0)
        cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")  # the loop calls it instead of the model
    model.to_empty(device=device)
    with accept_full_tensors(True):
        model.initialize(torch.Generator().manual_seed(settings.run.seed))


@contextmanager
def inference(model: LanguageModel) -> Iterator[None]:
    """Inside, forward passes are not followed by backward passes.

    A forward pass leaves the weights outside of layers gathered, for the backward pass. Without
    one they are freed here, or the next step would compute with old weights.
    """
    try:
        yield
    finally:
        cast(FSDPModule, model).reshard()


def gathered_model(model: LanguageModel, settings: Settings, dist: DistContext) -> LanguageModel:
    """On rank 0 a new model on the CPU with all weights; on other ranks one without memory."""
    with shapes_only():
        copy = new_model(settings, model.config.vocab_size)
    for name, weight in model.named_parameters():
        full = full_tensor(weight.detach())  # on every rank
        if dist.is_rank0:
            parent, _, own = name.rpartition(".")
            parameter = nn.Parameter(full.cpu(), requires_grad=False)
            setattr(copy.get_submodule(parent), own, parameter)
    return copy


def by_matrix(function: Callable[[Tensor], Tensor], stack: DTensor) -> DTensor:
    """`function` of a stack of sharded matrices (N, R, C), which needs each matrix whole.

    The ranks exchange rows for matrices, each computes its N / world of them, and exchange back.
    """
    matrices = redistribute(stack, Shard(0))
    done = function(matrices.to_local())  # (n, R, C)
    result = DTensor.from_local(
        done, stack.device_mesh, [Shard(0)], shape=stack.shape, stride=matrices.stride()
    )
    return redistribute(result, stack.placements[0])


def redistribute(stack: DTensor, placement: Placement) -> DTensor:
    """The same tensor, sharded along another axis."""
    if stack.device.type == "cpu":  # gloo has no all-to-all: gather first
        stack = stack.redistribute(placements=[Replicate()])
    return stack.redistribute(placements=[placement])


# --- checkpoint files -----------------------------------------------------------------------


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's rows into a folder that all ranks write. Raises OSError."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(errno.EIO, reason(error), str(folder)) from None


def read_shards(folder: Path, into: Mapping[str, Tensor], *, single: bool) -> None:
    """Fill the tensors, or this rank's rows of them.

    Raises TrainingError: missing or unexpected tensors, missing rows, damage.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
        require_complete(folder, found, into)
        with warnings.catch_warnings():  # a single process reads without the others on purpose
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(dict(into), storage_reader=reader, no_dist=single)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{folder}: {error}") from None
    except CheckpointException as error:
        raise TrainingError(f"{folder}: {reason(error)}") from None


def require_complete(
    folder: Path, found: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> None:
    """Names, shapes, and all rows of each tensor: PyTorch does not notice missing ones."""
    if odd := sorted(set(found) ^ set(expected)):
        names = ", ".join(quoted(name) for name in odd[:5])
        raise TrainingError(f"{folder}: missing or not expected: {names}")
    for name, tensor in expected.items():
        there = sum(math.prod(part.sizes) for part in found[name].chunks)
        shape, dtype = tuple(found[name].size), found[name].properties.dtype
        if shape != tuple(tensor.shape) or dtype != tensor.dtype or there != tensor.numel():
            raise TrainingError(
                f"{folder}: {name}: {there} numbers, {dtype} of shape {quoted(shape)}, expected "
                f"{tensor.dtype} of {tuple(tensor.shape)}: a shard is missing, or another run's"
            )


def reason(error: CheckpointException) -> str:
    """The error of the first rank that had one."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {getattr(cause, 'strerror', None) or cause}"
