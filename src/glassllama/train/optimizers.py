"""Which optimiser moves which parameter, and their state under the parameters' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from glassllama.train.adamw import STATE, AdamW
from glassllama.train.muon import Muon
from glassllama.train.settings import OptimiserSettings


class Optimisers:
    """AdamW, and Muon beside it where the settings say so, driven as one.

    Muon takes the matrices inside `layers`; embeddings, output and everything with one axis are
    AdamW's, as Jordan et al. (2024) recommend. Weight decay is for matrices only.
    """

    def __init__(self, model: nn.Module, settings: OptimiserSettings) -> None:
        named = dict(model.named_parameters())
        hidden = {n for n, p in named.items() if n.startswith("layers.") and p.ndim == 2}
        to_muon = hidden if settings.kind == "muon" else set()
        self.adamw_names = [name for name in named if name not in to_muon]
        decayed = [named[n] for n in self.adamw_names if named[n].ndim > 1]
        plain = [named[n] for n in self.adamw_names if named[n].ndim <= 1]
        self.named = named
        self.adamw = AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )
        self.muon = (
            Muon(
                {name: named[name] for name in named if name in to_muon},
                lr=settings.matrix_lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            )
            if to_muon
            else None
        )
        self.all: list[AdamW | Muon] = [self.adamw, *([] if self.muon is None else [self.muon])]
        self.peaks = [(group, group["lr"]) for each in self.all for group in each.param_groups]

    def step(self, factor: float) -> None:
        """Move the weights, each learning rate at `factor` times its peak; forget the gradients."""
        for group, peak in self.peaks:
            group["lr"] = peak * factor
        for optimiser in self.all:
            optimiser.step()
        for parameter in self.named.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on: `adamw.exp_avg.NAME`, …, `muon.momentum.NAME`."""
        tensors = {}
        for name in self.adamw_names:
            for key, value in self.adamw.state[self.named[name]].items():
                tensors[f"adamw.{key}.{name}"] = value
        if self.muon is not None:
            tensors |= {f"muon.momentum.{n}": t for n, t in self.muon.momentum_by_name().items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name in self.adamw_names:
            self.adamw.state[self.named[name]] = {
                key: tensors[f"adamw.{key}.{name}"] for key in STATE
            }
        if self.muon is not None:
            for name, momentum in self.muon.momentum_by_name().items():
                momentum.copy_(tensors[f"muon.momentum.{name}"])

    def state_names(self) -> Iterator[str]:
        """The names that `state` has once a step was made."""
        for name in self.adamw_names:
            yield from (f"adamw.{key}.{name}" for key in STATE)
        if self.muon is not None:
            yield from (f"muon.momentum.{name}" for name in self.muon.momentum_by_name())
