"""Models without data, before weights are initialized or loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glassllama.nn.init import shapes_only


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(3, 4), lambda: nn.Embedding(3, 4), lambda: nn.LayerNorm(3)]
)
def test_shapes_only_allocates_nothing(make: type[nn.Module]) -> None:
    with shapes_only():
        shapes = {name: p.shape for name, p in make().named_parameters()}
        assert all(p.is_meta for p in make().parameters())
    assert shapes == {name: p.shape for name, p in make().named_parameters()}


def test_shapes_only_draws_no_random_numbers() -> None:
    """Random numbers for tensors on the meta device would make PyTorch import its compiler."""
    weight, before = torch.ones(2, 3), torch.get_rng_state()
    with shapes_only():
        nn.init.normal_(weight)
        nn.init.kaiming_uniform_(weight)
        nn.init.uniform_(tensor=weight)
    assert torch.equal(weight, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), before)
    nn.init.normal_(weight)
    assert not torch.equal(weight, torch.ones(2, 3))
