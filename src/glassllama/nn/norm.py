"""RMSNorm: divide a vector by its root mean square (Zhang & Sennrich, 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) along the last axis, computed in float32, returned in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight per channel."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight  # (…, C)
