"""What each matrix of a checkpoint is packed as, and what that takes: decided before it is read.

Formats that the engine computes with stay as they are (native/engine/layout.py). Other block types
become Q8_0, the nearest richer one. Float weights stay floats, or are quantised on the way: where
it is asked for, and where memory is too short for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError, MemoryShortError, quoted
from glassllama.base.machine import available_memory, gigabytes
from glassllama.formats.blocks import FLOATS
from glassllama.native.engine.layout import BLOCK, WEIGHT_TYPES, WeightType, packed_bytes
from glassllama.weights.open import Checkpoint

Quantize = Literal["none", "q8_0", "q4_0"]
CHOICES: tuple[Quantize, ...] = get_args(Quantize)  # from the richest to the smallest

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"
LAYER_MATRICES = (
    "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "feed_forward.gate", "feed_forward.up", "feed_forward.down",
)  # fmt: skip
WORKING_MEMORY = 200_000_000  # compiled code, a step's intermediate numbers, slices in the making


@dataclass(frozen=True)
class PackingPlan:
    """How a checkpoint is to be packed. `weight_types` in the order in which matrices lie in
    memory.
    """

    weight_types: dict[str, WeightType]
    nbytes: int
    notes: list[str]


def choose(checkpoint: Checkpoint, *, exact: bool, quantize: Quantize | None) -> PackingPlan:
    """As asked for; else the richest form that fits into memory, and a note if not the file's.

    Raises ConfigError where exact and quantised are both asked for, and MemoryShortError.
    """
    if quantize not in (None, *CHOICES):
        raise ConfigError(f"quantize must be one of {', '.join(CHOICES)}, got {quoted(quantize)}")
    if exact and quantize not in (None, "none"):
        raise ConfigError("exact arithmetic keeps every weight as it is: leave out quantize")
    free = available_memory()
    if quantize is not None or exact:
        packed = packing_plan(checkpoint, exact=exact, quantize=quantize or "none")
        if free is not None and packed.nbytes + WORKING_MEMORY > free:
            raise too_large(checkpoint, packed, free)
        return packed
    first = packing_plan(checkpoint, exact=False, quantize="none")
    if free is None or first.nbytes + WORKING_MEMORY <= free:
        return first
    for choice in CHOICES[1:]:
        packed = packing_plan(checkpoint, exact=False, quantize=choice)
        if packed.nbytes < first.nbytes and packed.nbytes + WORKING_MEMORY <= free:
            said = (
                f"{stored_floats(checkpoint)} weights need {gigabytes(first.nbytes)}, "
                f"{gigabytes(free)} are free: quantised to {choice} ({gigabytes(packed.nbytes)}); "
                "decide yourself with quantize none, q8_0 or q4_0"
            )
            return replace(packed, notes=[said])
    raise too_large(checkpoint, first, free)


def packing_plan(checkpoint: Checkpoint, *, exact: bool, quantize: Quantize) -> PackingPlan:
    weight_types = {
        name: packed_type(checkpoint, name, exact, quantize)
        for name in matrix_names(checkpoint.config)
    }
    nbytes = sum(packed_bytes(kind, *checkpoint.info(n).shape) for n, kind in weight_types.items())
    notes = [] if exact else conversions(checkpoint, weight_types)
    if quantize != "none" and not any(
        checkpoint.info(name).dtype in FLOATS for name in weight_types
    ):
        notes.append(f"quantize {quantize} changes nothing: the file is quantised already")
    return PackingPlan(weight_types, nbytes, notes)


def matrix_names(config: LlamaConfig) -> list[str]:
    """All matrices in the order of a forward pass; tied embeddings are the output, and last."""
    layers = [
        f"layers.{n}.{name}.weight" for n in range(config.n_layers) for name in LAYER_MATRICES
    ]
    return [*layers, EMBEDDINGS] if config.tie_embeddings else [EMBEDDINGS, *layers, OUTPUT]


def packed_type(
    checkpoint: Checkpoint, name: str, exact: bool = False, quantize: Quantize = "none"
) -> WeightType:
    """What a matrix is packed as.

    Embeddings and output never have fewer than eight bits: every token's probability is read from
    them, and they are the first to suffer.
    """
    info = checkpoint.info(name)
    if exact:
        return WEIGHT_TYPES["F32"]
    if info.dtype in FLOATS:
        if quantize == "none" or info.shape[1] % BLOCK:
            return WEIGHT_TYPES["F32" if info.dtype == "F64" else info.dtype]
        return WEIGHT_TYPES["Q8_0" if name in (EMBEDDINGS, OUTPUT) else quantize.upper()]
    return WEIGHT_TYPES.get(info.dtype, WEIGHT_TYPES["Q8_0"])


def conversions(checkpoint: Checkpoint, weight_types: dict[str, WeightType]) -> list[str]:
    """One line on what is not computed in its own format."""
    pairs = {(checkpoint.info(name).dtype, kind.name) for name, kind in weight_types.items()}
    changed = [f"{stored} as {kind}" for stored, kind in sorted(pairs) if stored != kind]
    return [f"computed in another format than stored: {', '.join(changed)}"] if changed else []


def stored_floats(checkpoint: Checkpoint) -> str:
    """The float type that most of the numbers are of."""
    return checkpoint.info("layers.0.feed_forward.gate.weight").dtype


def too_large(checkpoint: Checkpoint, packed: PackingPlan, free: int) -> MemoryShortError:
    """Says what would do instead (weights/memory.py)."""
    from glassllama.weights.memory import plan

    return MemoryShortError(
        f"{checkpoint.path.name}, packed for the engine, needs "
        f"{gigabytes(packed.nbytes + WORKING_MEMORY)} of memory, {gigabytes(free)} are free; "
        f"{plan(checkpoint, tokens=1, memory=free).advice()}"
    )
