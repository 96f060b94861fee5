"""Step 16: what fewer bits cost in accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.formats.blocks import BLOCK, BLOCKS, dequantize, unpack_q4_0, unpack_q8_0
from glassllama.formats.quantize import QUANTIZE, pack_q4_0, pack_q8_0
from glassllama.walkthrough.analysis import predictions
from glassllama.walkthrough.pictures import Table
from glassllama.walkthrough.step import Step, WhatIf, source
from glassllama.walkthrough.trace import Edit, run_with_trace
from glassllama.walkthrough.walk import Walk, shape

Kind = Literal["Q8_0", "Q4_0"]
ROWS = 512  # of a matrix that may have a quarter of a gigabyte, taken at a time
KINDS: tuple[Kind, ...] = ("Q8_0", "Q4_0")


@dataclass(frozen=True)
class Moved:
    """What changed when one matrix was kept in fewer bits; errors relative to the lengths."""

    kind: Kind
    bits: float
    weights: float
    output: float
    logits: float  # the largest move of any logit after the last token
    divergence: float  # bits, of the next token's distribution (Kullback-Leibler)
    says: int


def rounded(matrix: Tensor, kind: Kind) -> Tensor:
    """The matrix as it comes back from such a file; rows are filled up to whole blocks first."""
    columns, back = matrix.shape[1], torch.empty_like(matrix)
    for ours, theirs in zip(torch.split(back, ROWS), torch.split(matrix, ROWS), strict=True):
        filled = F.pad(theirs.float(), (0, -columns % BLOCK)).numpy()
        unpacked = dequantize(QUANTIZE[kind](filled), kind, filled.shape)
        ours.copy_(torch.from_numpy(unpacked)[:, :columns])
    return back


def bits_each(kind: Kind) -> float:
    """Bits that one number takes: 8.5 and 4.5."""
    return 8 * BLOCKS[kind].record.itemsize / BLOCK


def relative_error(ours: Tensor, right: Tensor) -> float:
    """The length of the difference, in lengths of what is right."""
    parts = zip(torch.split(ours, ROWS), torch.split(right, ROWS), strict=True)
    apart = [(a.float() - b.float()).norm() for a, b in parts]
    whole = [b.float().norm() for b in torch.split(right, ROWS)]
    return float(torch.stack(apart).norm() / torch.stack(whole).norm().clamp(min=1e-30))


def moved(walk: Walk, kind: Kind, matrix: Tensor) -> Moved:
    """Run the model with the chosen layer's `down` as it would come back from such a file."""
    place = f"{walk.prefix}.feed_forward.down"
    gated, down = walk.trace[f"{walk.prefix}.feed_forward.gated"], walk.trace[place]
    coarse = rounded(matrix, kind)
    apart, output = relative_error(coarse, matrix), F.linear(gated, coarse)
    del coarse  # before the model runs, which may need the room
    logits = with_output(walk, place, output)
    return Moved(
        kind=kind,
        bits=bits_each(kind),
        weights=apart,
        output=relative_error(output, down),
        logits=float((logits - walk.plain_logits)[0, -1].abs().max()),
        divergence=divergence(walk.plain_logits[0, -1], logits[0, -1]),
        says=int(predictions(logits[0, -1]).ids[0]),
    )


def with_output(walk: Walk, place: str, output: Tensor) -> Tensor:
    """Logits (1, T, V) of a run in which this place gives that."""
    edit = Edit(place, lambda out: output.to(out))
    return run_with_trace(walk.model, walk.ids, watch=(), edits=[edit])[0].cpu()


def divergence(right: Tensor, other: Tensor) -> float:
    """Kullback-Leibler, in bits: how much is lost by believing `other` logits (V,)."""
    p, q = right.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum().clamp(min=0) / torch.tensor(2.0).log())


def quantisation(walk: Walk) -> Step:
    name = f"{walk.prefix}.feed_forward.down"
    matrix, stored = walk.weight(name), walk.checkpoint.info(f"{name}.weight").dtype
    same_way = F.linear(walk.trace[f"{walk.prefix}.feed_forward.gated"], matrix)
    unchanged = with_output(walk, name, same_way)
    results = [moved(walk, kind, matrix) for kind in KINDS]
    return Step(
        number=16,
        name="quantisation",
        title="The same with fewer bits",
        question="What do Q8_0 and Q4_0 do to the numbers?",
        shapes=f"down {shape(matrix)}, stored as {stored} → blocks of 32 → {shape(matrix)}",
        sources=(
            source(pack_q8_0, "scale =", "codes ="),
            source(unpack_q8_0),
            source(pack_q4_0, "codes ="),
            source(unpack_q4_0, "out -=", "out *="),
        ),
        text=(
            f"The matrix {name} alone is rounded: 32 numbers share a scale, each becomes a small "
            "whole number. The model runs again with what comes back.",
        ),
        pictures=(table(walk, results),),
        checks=(
            walk.compare_runs("logits, not rounded, by the same way", unchanged, walk.plain_logits),
        ),
        what_if=WhatIf(
            command=walk.command(f"--step 16 --layer {walk.config.n_layers - 1}"),
            shows="an error in the last layer has no layers after it that could grow or mend it",
        ),
        data={"place": name, "stored": stored, "kinds": [vars(m) for m in results]},
    )  # fmt: skip


def table(walk: Walk, results: list[Moved]) -> Table:
    rows = [
        (m.kind, f"{m.bits:.1f}", f"{m.weights:.3%}", f"{m.output:.3%}", f"{m.logits:.4f}",
         f"{m.divergence:.2e}", walk.piece(m.says)) for m in results
    ]  # fmt: skip
    columns = (
        "kept as",
        "bits>",
        "weights off>",
        "output off>",
        "logits move>",
        "KL bits>",
        "says",
    )
    return Table(columns, rows)
