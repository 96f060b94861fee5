"""What is prepared before a step: embeddings of its tokens, angles of their positions, tiles.

Letters: C model width, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from glassllama.native.engine.layer_ops import matrix_field, row, token_fields
from glassllama.native.engine.workspace import (
    BLOCKS,
    KERNEL,
    MATRICES,
    POSITION,
    SCALES,
    SEQUENCE,
    TILE,
    TOKEN_ID,
    VALUES,
)
from glassllama.native.jit.compile import compiled, entry
from glassllama.native.jit.intrinsics import call_kernel, floats, integers64


@compiled
def embed(workspace: Any, t: int) -> None:
    """Copy the embedding of token t into x[t] (C,)."""
    m = workspace.layers * MATRICES + 1
    arguments = (
        matrix_field(workspace, m, VALUES), matrix_field(workspace, m, SCALES),
        matrix_field(workspace, m, BLOCKS), token_fields(workspace, t)[TOKEN_ID],
        workspace.x + t * workspace.dim * 4,
    )  # fmt: skip
    call_kernel(matrix_field(workspace, m, KERNEL), arguments)


@compiled
def compute_angles(workspace: Any, t: int) -> None:
    """Cosine and sine of position · frequency, for each pair of a head's coordinates: (D/2,)."""
    half, position = workspace.head_dim // 2, np.float32(token_fields(workspace, t)[POSITION])
    frequencies = floats(workspace.frequencies, half)
    cos, sin = row(workspace.cos, t, half), row(workspace.sin, t, half)
    for i in range(half):
        angle = position * frequencies[i]
        cos[i] = math.cos(angle)
        sin[i] = math.sin(angle)


@compiled
def make_tiles(workspace: Any, num_tokens: int) -> Any:
    """Group tokens that attend together into tiles -> how many tiles.

    A tile is up to TILE consecutive tokens of one sequence.
    """
    first = integers64(workspace.tile_first, num_tokens)
    count = integers64(workspace.tile_count, num_tokens)
    tiles = 0
    for t in range(num_tokens):
        fits = tiles > 0 and count[tiles - 1] < TILE
        sequence = token_fields(workspace, t)[SEQUENCE]
        if fits and sequence == token_fields(workspace, t - 1)[SEQUENCE]:
            count[tiles - 1] += 1
        else:
            first[tiles], count[tiles] = t, 1
            tiles += 1
    return tiles


@entry
def prepare_step(workspace: Any, num_tokens: int) -> Any:
    """Fill the buffers that a step reads, from the table `tokens` -> how many tiles."""
    for t in range(num_tokens):
        embed(workspace, t)
        compute_angles(workspace, t)
    return make_tiles(workspace, num_tokens)
