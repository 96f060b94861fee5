"""Look inside a model: record and change its tensors; follow a prompt through it in 18 steps."""

from glassllama.walkthrough.tracing import (
    Intervention,
    Trace,
    ablate_head,
    attention_entropy,
    logit_lens,
    patch,
    predictions,
    residual_norms,
    trace,
)

__all__ = [
    "Intervention", "Trace", "ablate_head", "attention_entropy", "logit_lens", "patch",
    "predictions", "residual_norms", "trace",
]  # fmt: skip
