"""From logits to ids, step by step: samplers, and the loop that drives an executor. Ids only."""

from glassllama.generation.loop import (
    FinishReason,
    Generation,
    GenerationSettings,
    Overflow,
    Step,
    Timings,
    TokenLogprob,
    checked_ids,
    generate,
)
from glassllama.generation.sampler import Sampler, make_sampler

__all__ = [
    "FinishReason",
    "Generation",
    "GenerationSettings",
    "Overflow",
    "Sampler",
    "Step",
    "Timings",
    "TokenLogprob",
    "checked_ids",
    "generate",
    "make_sampler",
]
