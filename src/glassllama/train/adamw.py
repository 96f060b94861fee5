"""AdamW: each weight has a rate of its own, from the mean and the mean square of its gradients.

    m ← β₁·m + (1 - β₁)·g        v ← β₂·v + (1 - β₂)·g²
    w ← (1 - rate · decay) · w - rate · m̂ / (√v̂ + ε)

m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ), for step t, undo that m and v begin as zeros.

Source: Kingma and Ba, "Adam" (2015), algorithm 1; the decay, which does not pass through m and v:
Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2. PyTorch has the
same; but the first optimiser of PyTorch's that is made imports its compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STATE = ("step", "exp_avg", "exp_avg_sq")  # t, m and v of a parameter, under PyTorch's names


class AdamW:
    """Groups of parameters, each `{"params": […], "weight_decay": …}`; `step` moves those that have
    gradients, which are used up. `state` has t as a float32 on the CPU, m and v like the parameter.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.param_groups = [{"lr": lr, **group} for group in groups]
        self.betas, self.eps = betas, eps
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if moved:
                self._move(moved, group["lr"], group["weight_decay"])

    def _move(self, weights: list[Tensor], rate: float, decay: float) -> None:
        gradients: list[Tensor] = [w.grad for w in weights if w.grad is not None]
        counts, means, squares = (
            list(of) for of in zip(*map(self._state_of, weights), strict=True)
        )
        torch._foreach_add_(counts, 1)
        (b1, b2), steps = self.betas, [float(count) for count in counts]
        torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_lerp_(means, gradients, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        below = gradients  # their memory: they are not needed any more
        for root, square in zip(below, squares, strict=True):
            root.copy_(square)  # one by one: sharded tensors cannot be copied in a list
        torch._foreach_sqrt_(below)
        torch._foreach_div_(below, [(1 - b2**t) ** 0.5 for t in steps])
        torch._foreach_add_(below, self.eps)
        torch._foreach_addcdiv_(weights, means, below, [-rate / (1 - b1**t) for t in steps])

    def _state_of(self, weight: Tensor) -> list[Tensor]:
        """t, m and v, which begin as zeros."""
        if weight not in self.state:
            zeros = (torch.zeros(()), torch.zeros_like(weight), torch.zeros_like(weight))
            self.state[weight] = dict(zip(STATE, zeros, strict=True))
        return [self.state[weight][key] for key in STATE]
