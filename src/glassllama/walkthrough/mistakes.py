"""Common mistakes in implementations of a transformer, and what they change in the predictions.

The mistakes are made by replacing functions of the attention modules for a while; nn/ has no code
for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glassllama.base.errors import GlassError
from glassllama.walkthrough.step import Check, HeatMap, Picture, Source, Table, source
from glassllama.walkthrough.tracing import Predictions, kl_divergence, predictions_by_row, trace
from glassllama.walkthrough.walkthrough import Walkthrough

TOP = 10
CONTINUATION = 16  # tokens that each of both models generates


@dataclass(frozen=True)
class Mistake:
    """One common mistake; `apply` makes it in an attention module."""

    name: str
    title: str
    explanation: str
    apply: Callable[[Any], None]


def without_mask(attention: Any) -> None:
    correct = attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        first = k.shape[2] - q.shape[2]  # earlier tokens are in the cache
        visible = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        if mask is not None:  # a window of the layer stays
            visible = mask | visible.triu(first + 1)
        return correct(q, k, v, visible)  # type: ignore[no-any-return]

    attention.__dict__["attend"] = attend  # hides the method of the class


def other_rope_layout(attention: Any) -> None:
    other = {"half": "interleaved", "interleaved": "half"}
    attention.rope_layout = other[attention.rope_layout]


def without_scale(attention: Any) -> None:
    correct, scale = attention.attend, getattr(attention, "scale", None)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        unscaled = q * math.sqrt(q.shape[-1]) if scale is None else q / scale
        return correct(unscaled, k, v, mask)  # type: ignore[no-any-return]

    attention.__dict__["attend"] = attend


NO_MASK = Mistake(
    "no-mask",
    "Attention without the causal mask",
    "Every position sees the tokens after it. In training the model could read the answer there; a "
    "model that was trained with the mask makes wrong predictions without it.",
    without_mask,
)
ROPE_LAYOUT = Mistake(
    "rope-layout",
    "RoPE rotates the wrong coordinates",
    "The layout is interleaved where the checkpoint has half, or the reverse. This is the most "
    "common mistake when weights are converted between the formats of Meta, Hugging Face and GGUF. "
    "All shapes are right, so there is no error. Short prompts often look right, because slow "
    "pairs hardly rotate within a few tokens; longer ones do not.",
    other_rope_layout,
)
SCALE = Mistake(
    "scale",
    "Scores are not scaled",
    "Scores are divided by √D, or by a number of the model's own. Without that the inputs of the "
    "softmax are as many times too large, so that one token gets nearly all the weight. A constant "
    "copied from a model with another head width has the same, smaller effect.",
    without_scale,
)
MISTAKES = {mistake.name: mistake for mistake in (NO_MASK, ROPE_LAYOUT, SCALE)}


@contextmanager
def with_mistake(model: nn.Module, mistake: Mistake) -> Iterator[None]:
    """Inside the `with` all layers make this mistake."""
    attentions: list[Any] = [m for name, m in model.named_modules() if name.endswith(".attention")]
    unchanged = [dict(attention.__dict__) for attention in attentions]
    try:
        for attention in attentions:
            mistake.apply(attention)
        yield
    finally:
        for attention, attributes in zip(attentions, unchanged, strict=True):
            attention.__dict__.pop("attend", None)
            attention.__dict__.update(attributes)


@dataclass(frozen=True)
class Run:
    """The prompt through the model with or without the mistake."""

    predictions: Predictions  # (T, 10)
    weights: Tensor  # attention weights of the chosen head, (T, T)
    logits: Tensor  # (T, V)
    continuation: list[int]  # greedy


@dataclass(frozen=True)
class Comparison:
    """The correct model and the one with the mistake, on the same prompt."""

    walkthrough: Walkthrough
    mistake: Mistake
    source: Source
    runs: dict[str, Run]  # "correct", "wrong"
    divergence: list[float]  # bits, after each position
    check: Check  # that the model is the same as before

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Predictions after each position, the most probable next tokens, attention weights."""
        walk, columns = self.walkthrough, [f"{name} model predicts" for name in self.runs]
        rows = [
            (n, walk.pieces[n], *self._predicted(n, 0), f"{self.divergence[n]:.2f}")
            for n in walk.shown
        ]
        count = self.runs["correct"].predictions.ids.shape[-1]
        ranks = [(k + 1, *self._predicted(-1, k)) for k in range(count)]
        where = f"attention weights of layer {walk.layer}, head {walk.head}"
        return (
            Table(["position>", "token", *columns, "KL divergence, bits>"], rows),
            Table(["rank>", *self.runs], ranks, title="the most probable next tokens"),
            *(
                HeatMap(f"{name}: {where}", run.weights.float().numpy(), walk.pieces, top=1.0)
                for name, run in self.runs.items()
            ),
        )

    def _predicted(self, position: int, rank: int) -> list[str]:
        found = [(p.ids[position, rank], p.probs[position, rank])
                 for p in (run.predictions for run in self.runs.values())]  # fmt: skip
        return [f"{float(prob):4.0%} {self.walkthrough.piece(int(id))}" for id, prob in found]


def compare_with_mistake(walk: Walkthrough, mistake: Mistake) -> Comparison:
    """Run both. Raises StepMismatchError if the model is not the same afterwards.

    Raises GlassError if the model has nothing that the mistake could change.
    """
    require_applicable(walk, mistake)
    correct, wrong = run(walk, nullcontext()), run(walk, with_mistake(walk.model, mistake))
    after = walk.run_without_hooks()
    return Comparison(
        walkthrough=walk,
        mistake=mistake,
        source=source(mistake.apply),
        runs={"correct": correct, "wrong": wrong},
        divergence=[*map(kl_divergence, correct.logits, wrong.logits)],
        check=walk.compare_runs("logits of the correct model afterwards", after, walk.plain_logits),
    )


def require_applicable(walk: Walkthrough, mistake: Mistake) -> None:
    blocks = [] if walk.plan is None else walk.plan.blocks
    if mistake is ROPE_LAYOUT and not any(block.attention.rope for block in blocks):
        raise GlassError(f"{mistake.name}: this {type(walk.model).__name__} has no RoPE")
    if mistake is SCALE and walk.attention.scale >= 1:
        raise GlassError(f"{mistake.name}: this model does not make its scores smaller")


def run(walk: Walkthrough, state: AbstractContextManager[None]) -> Run:
    """Trace the prompt and generate a continuation while the model is in this state."""
    hook = f"{walk.prefix}.attention.weights"
    max_len = min(len(walk.ids) + CONTINUATION, walk.config.max_seq_len)
    cache = walk.model.new_cache(1, max_len)
    with state:
        recorded = trace(walk.model, walk.ids, hooks=[hook], cache=cache)
        ids = [int(recorded.logits[0, -1].argmax())]
        while cache.lengths[0] < max_len - 1:
            logits = trace(walk.model, ids[-1:], hooks=(), cache=cache).logits
            ids.append(int(logits[0, -1].argmax()))
    logits = recorded.logits[0].cpu()
    return Run(predictions_by_row(logits, TOP), recorded[hook][0, walk.head], logits, ids)
