"""The weight type in which the engine keeps each matrix of a checkpoint, and the memory it takes.

Types that the engine computes with stay as they are (native/engine/layout.py). Other block types
become Q8_0, the nearest type with more precision. Float weights stay floats, or are quantized while
they are packed: if asked for, and if memory is too short for them (weights/pack.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from glassllama.formats.blocks import FLOATS
from glassllama.native.engine.layout import BLOCK, WeightType, packed_bytes
from glassllama.weights.checkpoint import Checkpoint

Quantize = Literal["none", "q8_0", "q4_0"]
CHOICES: tuple[Quantize, ...] = get_args(Quantize)  # by decreasing precision

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"
WORKING_MEMORY = 200_000_000  # bytes: compiled code, activations, slices while packing


@dataclass(frozen=True)
class PackingPlan:
    """How a checkpoint is packed. `weight_types` in the order of the matrices in memory."""

    weight_types: dict[str, WeightType]
    nbytes: int
    notes: list[str]


def packing_plan(checkpoint: Checkpoint, *, exact: bool, quantize: Quantize) -> PackingPlan:
    """The weight type of every matrix. Raises ConfigError if the engine cannot run the model."""
    weight_types = {
        name: packed_type(checkpoint, name, exact, quantize)
        for name in checkpoint.layer_plan.matrices()
    }
    nbytes = sum(
        packed_bytes(weight_type, *checkpoint.info(name).shape)
        for name, weight_type in weight_types.items()
    )
    notes = [] if exact else conversions(checkpoint, weight_types)
    if quantize != "none" and not any(
        checkpoint.info(name).dtype in FLOATS for name in weight_types
    ):
        notes.append(f"quantize {quantize} changes nothing: the file is quantized already")
    return PackingPlan(weight_types, nbytes, notes)


def packed_type(
    checkpoint: Checkpoint, name: str, exact: bool = False, quantize: Quantize = "none"
) -> WeightType:
    """The weight type of one matrix.

    Embeddings and output always have at least eight bits: they are the most sensitive to rounding,
    because every token's logit is computed from them.
    """
    info = checkpoint.info(name)
    if exact:
        return WeightType["F32"]
    if info.dtype in FLOATS:
        if quantize == "none" or info.shape[1] % BLOCK:
            return WeightType["F32" if info.dtype == "F64" else info.dtype]
        return WeightType["Q8_0" if name in (EMBEDDINGS, OUTPUT) else quantize.upper()]
    return WeightType.__members__.get(info.dtype, WeightType.Q8_0)


def conversions(checkpoint: Checkpoint, weight_types: dict[str, WeightType]) -> list[str]:
    """A note on matrices that are not computed in the type in which they are stored."""
    pairs = {(checkpoint.info(name).dtype, kind.name) for name, kind in weight_types.items()}
    changed = [f"{stored} as {packed}" for stored, packed in sorted(pairs) if stored != packed]
    return [f"computed in another format than stored: {', '.join(changed)}"] if changed else []
