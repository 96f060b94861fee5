"""What a step begins with: the embedding of every token, the angles of its position, the tiles.

Letters: C model width, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from glassllama.engine.compiled import compiled, entry
from glassllama.engine.intrinsics import call_kernel, floats, integers64
from glassllama.engine.layer_ops import field, row, told
from glassllama.engine.workspace import (
    BLOCKS,
    ID,
    KERNEL,
    MATRICES,
    POSITION,
    ROW,
    SCALES,
    TILE,
    VALUES,
)


@compiled
def embed(room: Any, t: int) -> None:
    """A token's row of the embedding matrix -> x[t] (C,)."""
    m = room.layers * MATRICES + 1
    values, scales, blocks = field(room, m, VALUES), field(room, m, SCALES), field(room, m, BLOCKS)
    out = room.x + t * room.dim * 4
    call_kernel(field(room, m, KERNEL), (values, scales, blocks, told(room, t)[ID], out))


@compiled
def find_angles(room: Any, t: int) -> None:
    """Cosine and sine of position · frequency, of each pair of a head's numbers: (D/2,)."""
    half, position = room.head_dim // 2, np.float32(told(room, t)[POSITION])
    frequencies = floats(room.frequencies, half)
    cos, sin = row(room.cos, t, half), row(room.sin, t, half)
    for i in range(half):
        angle = position * frequencies[i]
        cos[i] = math.cos(angle)
        sin[i] = math.sin(angle)


@compiled
def share_out(room: Any, tokens: int) -> Any:
    """Tokens that may look at the cache together become a tile -> how many tiles.

    They are of one row, next to each other, and not too many.
    """
    first, count = integers64(room.tile_first, tokens), integers64(room.tile_count, tokens)
    tiles = 0
    for t in range(tokens):
        fits = tiles > 0 and count[tiles - 1] < TILE
        if fits and told(room, t)[ROW] == told(room, t - 1)[ROW]:
            count[tiles - 1] += 1
        else:
            first[tiles], count[tiles] = t, 1
            tiles += 1
    return tiles


@entry
def set_out(room: Any, tokens: int) -> Any:
    """Make the tables that a step reads from what it was told of its tokens -> tiles."""
    for t in range(tokens):
        embed(room, t)
        find_angles(room, t)
    return share_out(room, tokens)
