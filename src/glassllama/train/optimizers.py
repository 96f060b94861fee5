"""AdamW, Muon, the averaged weights (EMA) and the learning rate schedule.

Sources: Kingma and Ba, "Adam" (2015), algorithm 1; decoupled weight decay: Loshchilov and Hutter
(2019), algorithm 2. Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
(2024); its step size relative to AdamW's: Liu et al., "Muon is scalable for LLM training" (2025),
section 2.2. The wsd schedule: Hu et al., MiniCPM (2024). Averaged weights: Polyak (1992).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from glassllama.train.distributed import is_sharded
from glassllama.train.model import product_dtype
from glassllama.train.settings import OptimizerSettings, ScheduleSettings

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def lr_factor(step: int, schedule: ScheduleSettings) -> float:
    """The share of the peak learning rate in step 0 … steps - 1."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.kind == "cosine":
        decayed = (step - schedule.warmup) / (schedule.steps - schedule.warmup)
        share = (1 + math.cos(math.pi * decayed)) / 2
    else:
        share = min(1.0, (schedule.steps - step) / (schedule.decay * schedule.steps))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share


# --- AdamW ----------------------------------------------------------------------------------

STATE = ("step", "exp_avg", "exp_avg_sq")  # t, m and v of a parameter, under PyTorch's names


class AdamW:
    """Every weight has its own step size, from the mean and the mean square of its gradients.

        m ← β₁·m + (1 - β₁)·g        v ← β₂·v + (1 - β₂)·g²
        w ← (1 - rate · decay) · w - rate · m̂ / (√v̂ + ε)

    m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ), for step t, correct for the zeros that m and v start
    with. Groups of parameters are `{"params": […], "weight_decay": …}`. `step` updates those that
    have gradients, whose memory it overwrites. `state` has t as a float32 on the CPU, m and v like
    the parameter. torch.optim.AdamW computes the same, but the first optimizer of PyTorch's in a
    process imports its compiler, which takes seconds.
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
        weights = [weight for group in groups for weight in group["params"]]
        zeros = ((torch.zeros(()), torch.zeros_like(w), torch.zeros_like(w)) for w in weights)
        self.state: dict[Tensor, dict[str, Tensor]] = {
            weight: dict(zip(STATE, values, strict=True))
            for weight, values in zip(weights, zeros, strict=True)
        }

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, group["lr"], group["weight_decay"])

    def _update(self, weights: list[Tensor], rate: float, decay: float) -> None:
        gradients: list[Tensor] = [w.grad for w in weights if w.grad is not None]
        counts, means, squares = ([self.state[w][key] for w in weights] for key in STATE)
        torch._foreach_add_(counts, 1)
        (b1, b2), steps = self.betas, [float(count) for count in counts]
        torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_lerp_(means, gradients, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        roots = gradients  # reuses their memory
        for root, square in zip(roots, squares, strict=True):
            root.copy_(square)  # one by one: there is no list operation for sharded tensors
        torch._foreach_sqrt_(roots)
        torch._foreach_div_(roots, [(1 - b2**t) ** 0.5 for t in steps])
        torch._foreach_add_(roots, self.eps)
        torch._foreach_addcdiv_(weights, means, roots, [-rate / (1 - b1**t) for t in steps])


# --- Muon -----------------------------------------------------------------------------------

# The odd polynomial a·x + b·x³ + c·x⁵ of Jordan et al.: raises every singular value in (0, 1] to
# about 0.7 … 1.2 within five rounds; its slope at zero, 3.4, matters more than reaching 1 exactly.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
TINY = 1e-7  # a gradient of zeros stays zero
UPDATE_RMS = 0.2  # Liu et al.: root mean square per element of AdamW's steps


def orthogonalize(x: Tensor, rounds: int = ROUNDS) -> Tensor:
    """(N, R, C) with R ≤ C -> about U·Vᵀ of each matrix U·S·Vᵀ, in x's dtype.

    Newton–Schulz iteration as in Jordan et al.; dividing by the Frobenius norm first brings every
    singular value into (0, 1].
    """
    a, b, c = COEFFICIENTS
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    for _ in range(rounds):
        squares = torch.bmm(x, x.mT)  # (N, R, R)
        polynomial = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)  # b·S + c·S²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # (N, R, C): a·X + (b·S + c·S²)·X
    return x


class Muon:
    """Steps along the orthogonalized momentum, for the matrices inside a network.

    A gradient matrix has a few strong directions. The step is the nearest matrix whose directions
    are all equally strong, U·Vᵀ of the momentum's singular value decomposition. All matrices of
    one shape are orthogonalized in one batch; their momentum is one tensor (N, R, C) per shape,
    R ≤ C, tall matrices transposed: a few large products instead of many small ones.
    """

    def __init__(
        self,
        matrices: Mapping[str, nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        self.param_groups = [{"lr": lr, "momentum": momentum, "weight_decay": weight_decay}]
        self.dtype = product_dtype(next(iter(matrices.values())).device.type)
        self.stacks: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
        for name, matrix in matrices.items():
            self.stacks.setdefault(tuple(wide(matrix).shape), {})[name] = matrix
        self.momenta = {
            shape: torch.stack([torch.zeros_like(wide(m)) for m in stack.values()])
            for shape, stack in self.stacks.items()
        }  # (N, R, C) each

    @torch.no_grad()
    def step(self) -> None:
        """One update; every matrix must have a gradient."""
        rate, share, decay = (self.param_groups[0][k] for k in ("lr", "momentum", "weight_decay"))
        for shape, stack in self.stacks.items():
            matrices: list[Tensor] = list(stack.values())
            gradient = torch.stack([wide(m.grad) for m in matrices if m.grad is not None])
            momentum = self.momenta[shape].lerp_(gradient, 1 - share)  # (N, R, C)
            nesterov = gradient.lerp_(momentum, share).to(self.dtype)
            if is_sharded(nesterov):
                from glassllama.train.sharding import by_matrix

                update = by_matrix(orthogonalize, cast("DTensor", nesterov)).float()
            else:
                update = orthogonalize(nesterov).float()  # (N, R, C)
            steps = [like(u, m) for u, m in zip(update, matrices, strict=True)]
            scale = UPDATE_RMS * max(shape) ** 0.5  # the RMS of U·Vᵀ (R, C) is 1/√C, as R ≤ C
            torch._foreach_mul_(matrices, 1 - rate * decay)
            torch._foreach_add_(matrices, steps, alpha=-rate * scale)

    def momentum_by_name(self) -> dict[str, Tensor]:
        """Views of the momenta, each in its matrix's own shape."""
        return {
            name: like(momentum, matrix)
            for shape, stack in self.stacks.items()
            for (name, matrix), momentum in zip(stack.items(), self.momenta[shape], strict=True)
        }


def wide(matrix: Tensor) -> Tensor:
    """The matrix, transposed if it is tall."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def like(x: Tensor, matrix: Tensor) -> Tensor:
    """The inverse of `wide`: `x`, transposed if `matrix` is tall."""
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


# --- both together --------------------------------------------------------------------------


class Optimizers:
    """AdamW, and Muon besides if the settings ask for it.

    Muon gets the matrices inside `layers`; embeddings, output and vectors are AdamW's, as Jordan
    et al. recommend. Weight decay is for matrices only.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        self.named = named = dict(model.named_parameters())
        inside = {n: p for n, p in named.items() if n.startswith("layers.") and p.ndim == 2}
        hidden = inside if settings.kind == "muon" else {}
        self.adamw_names = [name for name in named if name not in hidden]
        rest = [named[name] for name in self.adamw_names]
        matrices, vectors = ([p for p in rest if (p.ndim > 1) == two] for two in (True, False))
        decay, betas = settings.weight_decay, (settings.beta1, settings.beta2)
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": decay}]
        groups.append({"params": vectors, "weight_decay": 0.0})
        self.adamw = AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)
        self.muon: Muon | None = None
        if hidden:
            lr, momentum = settings.matrix_lr, settings.momentum
            self.muon = Muon(hidden, lr=lr, momentum=momentum, weight_decay=decay)
        self.all: list[AdamW | Muon] = [self.adamw, *([] if self.muon is None else [self.muon])]
        self.peaks = [(group, group["lr"]) for each in self.all for group in each.param_groups]

    def step(self, factor: float) -> None:
        """Update the weights with `factor` times the peak rates, and drop the gradients."""
        for group, peak in self.peaks:
            group["lr"] = peak * factor
        for optimizer in self.all:
            optimizer.step()
        for parameter in self.named.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on: `adamw.exp_avg.NAME`, …, `muon.momentum.NAME`."""
        tensors = {
            f"adamw.{key}.{name}": self.adamw.state[self.named[name]][key]
            for name in self.adamw_names
            for key in STATE
        }
        if self.muon is not None:
            tensors |= {f"muon.momentum.{n}": t for n, t in self.muon.momentum_by_name().items()}
        return tensors


class EMA:
    """Averaged weights: mean ← decay · mean + (1 - decay) · weight, after every step.

    Often a better model than the last step's. During the first steps the decay is step / (step +
    9), until it reaches `decay`, so that the random initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.means = {name: weight.clone() for name, weight in self.weights.items()}

    def update(self, step: int) -> None:
        """Include the weights after step `step`, which counts from 1."""
        share = 1 - min(self.decay, step / (step + 9))
        torch._foreach_lerp_(list(self.means.values()), list(self.weights.values()), share)

    def state(self) -> dict[str, Tensor]:
        return {f"average.{name}": mean for name, mean in self.means.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the means."""
        trained = {name: weight.clone() for name, weight in self.weights.items()}
        self._fill(self.means)
        try:
            yield
        finally:
            self._fill(trained)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])
