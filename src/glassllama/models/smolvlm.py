"""Idefics3, SmolVLM and SmolVLM2: SigLIP's patches, r × r of them in one row of a Llama.

A picture is cut into tiles of the tower's size, and a small version of the whole is one more tile.
Everything is causal, as in a text. Sources: Building and better understanding vision-language
models (Laurençon et al., 2024), section 3; SmolVLM (Marafioti et al., 2025), section 2.

Shapes: N tiles, P patches, R = P / r² rows, C width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glassllama.base.config import require_sizes
from glassllama.base.errors import ConfigError
from glassllama.models.paligemma import PaliGemma, PaliGemmaConfig
from glassllama.models.siglip import VisionTower


@dataclass(frozen=True, kw_only=True)
class SmolVLMConfig(PaliGemmaConfig):
    """`scale`: r, patches of a row and of a column that become one row of the decoder."""

    scale: int
    prefix: bool = False

    def __post_init__(self) -> None:
        require_sizes(self, "scale")
        if self.vision.side % self.scale:
            raise ConfigError(
                f"scale_factor {self.scale} must divide the {self.vision.side} patches of a side"
            )

    @property
    def rows_of_tile(self) -> int:
        return (self.vision.side // self.scale) ** 2


class SmolVLMImages(nn.Module):
    """The vision tower, the joining of patches, and a projection."""

    def __init__(self, config: SmolVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = VisionTower(config.vision)
        width = config.vision.dim * config.scale**2
        self.connector = nn.Linear(width, config.text.dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) tiles -> (N, R, C). Raises ConfigError: not of the tower's size."""
        size = self.config.vision.image_size
        if tuple(pixels.shape[2:]) != (size, size):
            raise ConfigError(
                f"pixels: expected tiles of {size} × {size} pixels, got {tuple(pixels.shape[2:])}"
            )
        patches = self.tower(pixels, self.positions(pixels.device))  # (N, P, Cv)
        rows: Tensor = self.connector(join_patches(patches, self.config.scale))
        return rows  # (N, R, C)

    def positions(self, device: torch.device) -> Tensor:
        """The rows of the table of positions, (P,).

        Idefics3 places a patch by its share of the side, i / side, among the limits 1 / side,
        2 / side, … In float32, for some sides, a few shares fall just below their own limit, and
        these patches get the position of their neighbor, as in transformers.
        """
        side = self.config.vision.side
        limits = torch.arange(1 / side, 1.0, 1 / side, device=device)
        step = 1.0 / torch.tensor(float(side), device=device)
        shares = torch.arange(side, dtype=torch.float32, device=device) * step
        places = torch.bucketize(shares.clamp(max=1.0 - 1e-6), limits, right=True)  # (side,)
        return (places[:, None] * side + places).flatten()  # (P,)


def join_patches(patches: Tensor, scale: int) -> Tensor:
    """(N, P, Cv) -> (N, P / r², Cv · r²): squares of r × r patches side by side, row by row."""
    count, total, width = patches.shape
    side = int(total**0.5)
    squares = patches.view(count, side // scale, scale, side // scale, scale, width)
    return squares.transpose(2, 3).reshape(count, -1, scale * scale * width)  # (N, R, Cv · r²)


class SmolVLM(PaliGemma):
    """The same five steps without a prefix: an answer may follow several pictures and texts."""

    config: SmolVLMConfig
