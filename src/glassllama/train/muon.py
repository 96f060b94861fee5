"""Muon: momentum, made orthogonal, for the matrices inside a network.

A gradient matrix is mostly a few strong directions. Muon keeps a running sum of gradients and
steps along the nearest matrix whose directions are all equally strong: U·Vᵀ of its singular value
decomposition U·S·Vᵀ, approximated by a polynomial iteration that needs matrix products only.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale
of the step relative to AdamW's is Moonshot's (Liu et al., "Muon is scalable for LLM training",
2025, section 2.2). Weight decay is AdamW's, decoupled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from glassllama.train.distributed import is_sharded
from glassllama.train.mfu import product_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The odd polynomial a·x + b·x³ + c·x⁵ of Jordan et al.: lifts every singular value in (0, 1] into
# about 0.7 … 1.2 within five rounds; its slope at zero, 3.4, matters more than landing on one.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
TINY = 1e-7  # a gradient of zeros stays zero
UPDATE_RMS = 0.2  # Liu et al.: what AdamW's steps measure, root mean square per element


def orthogonalise(x: Tensor, rounds: int = ROUNDS) -> Tensor:
    """(N, R, C) with R ≤ C -> about U·Vᵀ of each matrix, in x's dtype.

    Source: Newton–Schulz as in Jordan et al.; dividing by the Frobenius norm puts every singular
    value into (0, 1] first.
    """
    a, b, c = COEFFICIENTS
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    for _ in range(rounds):
        squares = torch.bmm(x, x.mT)  # (N, R, R)
        polynomial = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)  # b·S + c·S²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # (N, R, C): a·X + (b·S + c·S²)·X
    return x


def orthogonalised(stack: Tensor) -> Tensor:
    """`orthogonalise`, also where each rank holds some rows of every matrix."""
    if not is_sharded(stack):
        return orthogonalise(stack)
    from glassllama.train.sharding import by_matrix

    return by_matrix(orthogonalise, cast("DTensor", stack))


class Muon:
    """Muon over hidden matrices, all of one shape orthogonalised in one batch.

    Their momentum lives in one tensor (N, R, C) per shape, R ≤ C, tall matrices transposed: a tiny
    model's step is then a few large products, not many small ones.
    """

    def __init__(
        self,
        matrices: Mapping[str, torch.nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        self.param_groups = [{"lr": lr, "momentum": momentum, "weight_decay": weight_decay}]
        self.products = product_dtype(next(iter(matrices.values())).device.type)
        self.stacks: dict[tuple[int, ...], dict[str, torch.nn.Parameter]] = {}
        for name, matrix in matrices.items():
            self.stacks.setdefault(tuple(flat(matrix).shape), {})[name] = matrix
        self.momenta = {
            shape: torch.stack([torch.zeros_like(flat(m)) for m in stack.values()])
            for shape, stack in self.stacks.items()
        }  # (N, R, C) each

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients that are there: every matrix must have one."""
        rate, share, decay = (self.param_groups[0][k] for k in ("lr", "momentum", "weight_decay"))
        for shape, stack in self.stacks.items():
            matrices: list[Tensor] = list(stack.values())
            gradient = torch.stack([flat(m.grad) for m in matrices if m.grad is not None])
            momentum = self.momenta[shape].lerp_(gradient, 1 - share)  # (N, R, C)
            ahead = gradient.lerp_(momentum, share)  # Nesterov: where momentum will have led
            update = orthogonalised(ahead.to(self.products)).float()  # (N, R, C)
            steps = [like(u, m) for u, m in zip(update, matrices, strict=True)]
            scale = UPDATE_RMS * max(shape) ** 0.5  # U·Vᵀ of (R, C) measures 1/√C, as R ≤ C
            torch._foreach_mul_(matrices, 1 - rate * decay)
            torch._foreach_add_(matrices, steps, alpha=-rate * scale)

    def momentum_by_name(self) -> dict[str, Tensor]:
        """Views of the momenta, each in its matrix's own shape."""
        return {
            name: like(momentum, matrix)
            for shape, stack in self.stacks.items()
            for (name, matrix), momentum in zip(stack.items(), self.momenta[shape], strict=True)
        }


def flat(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where it is tall."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def like(x: Tensor, matrix: Tensor) -> Tensor:
    """`x`, turned back where `matrix` is tall."""
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT
