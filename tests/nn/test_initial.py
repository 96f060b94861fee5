"""Weights before anything is learned or loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glassllama.nn.init import shapes_only


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(3, 4), lambda: nn.Embedding(3, 4), lambda: nn.LayerNorm(3)]
)
def test_shapes_without_numbers(make: type[nn.Module]) -> None:
    with shapes_only():
        shapes = {name: p.shape for name, p in make().named_parameters()}
        assert all(p.is_meta for p in make().parameters())
    assert shapes == {name: p.shape for name, p in make().named_parameters()}


def test_no_numbers_are_drawn() -> None:
    """Drawing for tensors without memory is what PyTorch imports its compiler for."""
    weight, before = torch.ones(2, 3), torch.get_rng_state()
    with shapes_only():
        nn.init.normal_(weight)
        nn.init.kaiming_uniform_(weight)
        nn.init.uniform_(tensor=weight)
    assert torch.equal(weight, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), before)
    nn.init.normal_(weight)
    assert not torch.equal(weight, torch.ones(2, 3))
