"""Gated feed-forward network: SwiGLU and GeGLU (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.nn.hooks import HookPoint


class FeedForward(nn.Module):
    """down(activation(gate(x)) · up(x)); usually silu(z) = z / (1 + e⁻ᶻ)."""

    def __init__(
        self, dim: int, ffn_dim: int, activation: Callable[[Tensor], Tensor] = F.silu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(dim, ffn_dim, bias=False)
        self.up = nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)
        self.gated = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        features = self.gated(self.activation(self.gate(x)) * self.up(x))  # (B, T, F)
        return self.down(features)  # (B, T, C)
