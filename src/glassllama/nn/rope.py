"""RoPE: each pair of coordinates of a head is rotated by an angle proportional to the position.

Source: RoFormer (Su et al., 2021), section 3.2. Which coordinates form a pair is a convention of
the checkpoint: "interleaved" rotates neighbors (0,1), (2,3), …; "half" rotates (0, D/2),
(1, D/2+1), …. There are two implementations: multiplication of complex numbers, as in textbooks,
and real arithmetic, which the models use; a test compares them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glassllama.base.config import RopeLayout


class RopeTable(NamedTuple):
    """Cosine and sine of every angle, (B or 1, 1, T, D/2) float32; broadcast over heads.

    Fewer than D/2 angles rotate the first coordinates of a head only.
    """

    cos: Tensor
    sin: Tensor


def rope_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles in radians: position × frequency. (B, T), (D/2,) -> (B, T, D/2) float32."""
    return positions.float().unsqueeze(-1) * frequencies


def rope_table(angles: Tensor, factor: float = 1.0) -> RopeTable:
    """(B, T, D/2) angles -> their cosines and sines, times a factor (YaRN, LongRoPE)."""
    angles = angles.unsqueeze(1)  # (B, 1, T, D/2)
    return RopeTable(angles.cos() * factor, angles.sin() * factor)


def rotate_interleaved(x: Tensor, rope: RopeTable) -> Tensor:
    """Rotate neighbors (0,1), (2,3), …: Meta's and GGUF's layout. (B, H, T, D) -> same."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # two (B, H, T, D/2)
    rotated = torch.stack((a * rope.cos - b * rope.sin, a * rope.sin + b * rope.cos), dim=-1)
    return rotated.flatten(-2).type_as(x)  # (B, H, T, D)


def rotate_half(x: Tensor, rope: RopeTable) -> Tensor:
    """Rotate (0, D/2), (1, D/2+1), …: Hugging Face's layout. (B, H, T, D) -> same."""
    a, b = x.float().chunk(2, dim=-1)  # two (B, H, T, D/2)
    rotated = torch.cat((a * rope.cos - b * rope.sin, a * rope.sin + b * rope.cos), dim=-1)
    return rotated.type_as(x)  # (B, H, T, D)


ROTATE = {"interleaved": rotate_interleaved, "half": rotate_half}


def rotate_part(x: Tensor, rope: RopeTable, layout: RopeLayout) -> Tensor:
    """Rotate the first R = 2 · (number of angles) coordinates. (B, H, T, D) -> same."""
    width = 2 * rope.cos.shape[-1]
    if width == x.shape[-1]:
        return ROTATE[layout](x, rope)
    return torch.cat((ROTATE[layout](x[..., :width], rope), x[..., width:]), dim=-1)


def rotate_complex(x: Tensor, angles: Tensor, layout: RopeLayout) -> Tensor:
    """The textbook form: a pair (a, b) is the number a + bi, and is multiplied by e^(i·angle).

    (B, H, T, D), (B, T, D/2) -> (B, H, T, D).
    """
    wide = x.float()
    if layout == "interleaved":
        numbers = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    else:
        numbers = torch.complex(*wide.chunk(2, dim=-1))  # (B, H, T, D/2)
    numbers = numbers * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    if layout == "interleaved":
        return torch.view_as_real(numbers).flatten(-2).type_as(x)
    return torch.cat((numbers.real, numbers.imag), dim=-1).type_as(x)
