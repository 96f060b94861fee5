"""A running mean of the weights: often a better model than the last step's (Polyak, 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """mean ← decay · mean + (1 - decay) · weight, after every step.

    While few steps were made the mean is over all of them: the decay rises as step / (step + 9)
    until it is reached, so that the random beginning is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.means = {name: weight.clone() for name, weight in self.weights.items()}

    def update(self, step: int) -> None:
        """Take in the weights after step `step`, which counts from 1."""
        share = 1 - min(self.decay, step / (step + 9))
        torch._foreach_lerp_(list(self.means.values()), list(self.weights.values()), share)

    def state(self) -> dict[str, Tensor]:
        return {f"average.{name}": mean for name, mean in self.means.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mean in self.means.items():
            mean.copy_(tensors[f"average.{name}"])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model's weights are the means."""
        kept = {name: weight.clone() for name, weight in self.weights.items()}
        self._fill(self.means)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])
