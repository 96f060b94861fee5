"""Seeing through a model: traces of what it computes, and eighteen steps from bytes to token."""

from glassllama.walkthrough.analysis import (
    attention_entropy,
    logit_lens,
    predictions,
    residual_norms,
)
from glassllama.walkthrough.interventions import ablate_head, patch
from glassllama.walkthrough.trace import Edit, Trace, first_non_finite, run_with_trace

__all__ = [
    "Edit",
    "Trace",
    "ablate_head",
    "attention_entropy",
    "first_non_finite",
    "logit_lens",
    "patch",
    "predictions",
    "residual_norms",
    "run_with_trace",
]
