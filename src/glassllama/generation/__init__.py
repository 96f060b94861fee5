"""From logits to ids: samplers, requests, and the scheduler that drives an executor. Ids only."""

from glassllama.generation.request import (
    FinishReason,
    GenerationSettings,
    Overflow,
    Request,
    Timings,
    TokenEvent,
    TokenLogprob,
)
from glassllama.generation.sampler import Sampler, make_sampler
from glassllama.generation.scheduler import Generation, Scheduler, generate

__all__ = [
    "FinishReason", "Generation", "GenerationSettings", "Overflow", "Request", "Sampler",
    "Scheduler", "Timings", "TokenEvent", "TokenLogprob", "generate", "make_sampler",
]  # fmt: skip
