"""A model whose weights are shared out over ranks: PyTorch's FSDP2 (`fully_shard`) and DTensor.

Each rank keeps its rows of every weight, of its gradient and of what the optimisers know of it. A
layer's weights are gathered when it computes and let go after; their gradients are summed over the
ranks, and each rank gets its rows of the sum. What is added up is what one process would add up.

Source: Zhao et al., "PyTorch FSDP" (2023); the form per parameter is PyTorch's FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication

from glassllama.models.language_model import LanguageModel
from glassllama.nn.init import shapes_only
from glassllama.train.distributed import Team, whole
from glassllama.train.model_factory import as_module, new_model
from glassllama.train.settings import Settings


def shard(model: LanguageModel, settings: Settings, team: Team) -> None:
    """Share out a model without memory (on the meta device), and give it its first weights.

    They are those that one process would begin with: each rank draws all of them, one tensor at a
    time, and keeps its rows.
    """
    module, device = as_module(model), settings.run.device
    mesh = init_device_mesh(device, (team.world,))
    layers = getattr(module, "layers", [])
    for part in (*layers, module):
        fully_shard(part, mesh=mesh)
        add_up_gradients(cast(FSDPModule, part))
    register_fsdp_forward_method(module, "hidden")  # what the loop calls instead of the model
    module.to_empty(device=device)
    with implicit_replication():
        model.initialize(torch.Generator().manual_seed(settings.run.seed))


def add_up_gradients(part: FSDPModule) -> None:
    """Losses are divided by the targets of all ranks already, so their gradients are just added."""
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)


@contextmanager
def asked(model: LanguageModel) -> Iterator[None]:
    """Within, the model is used without learning.

    A forward pass leaves the weights outside of layers gathered, for the backward pass that would
    follow. None does here; so let go of them, or the next step would compute with old ones.
    """
    try:
        yield
    finally:
        cast(FSDPModule, model).reshard()


def whole_model(model: LanguageModel, settings: Settings, team: Team) -> LanguageModel:
    """All of the weights on the leader's CPU, in a model of its own; elsewhere one without any."""
    with shapes_only():
        copy = new_model(settings, model.config.vocab_size)
    for name, weight in as_module(model).named_parameters():
        full = whole(weight.detach())  # on every rank: it is asked for by all at once
        if team.leads:
            parent, _, own = name.rpartition(".")
            home = as_module(copy).get_submodule(parent)
            setattr(home, own, nn.Parameter(full.cpu(), requires_grad=False))
    return copy


def by_matrix(function: Callable[[Tensor], Tensor], stack: DTensor) -> DTensor:
    """`function` of a stack of sharded matrices (N, R, C), each whole on one rank while it works.

    The ranks exchange rows for matrices, work each on its own N / world, and exchange back.
    """
    apart = exchanged(stack, Shard(0))
    done = function(apart.to_local())  # (n, R, C)
    made = DTensor.from_local(
        done, stack.device_mesh, [Shard(0)], shape=stack.shape, stride=apart.stride()
    )
    return exchanged(made, stack.placements[0])


def exchanged(stack: DTensor, placement: Placement) -> DTensor:
    """The same numbers, shared out along another axis."""
    if stack.device.type == "cpu":  # gloo cannot send each rank its own: all is sent to all
        stack = stack.redistribute(placements=[Replicate()])
    return stack.redistribute(placements=[placement])
