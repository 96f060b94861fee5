"""Changes made to a running model: a head switched off, an activation from another run, mistakes.

The mistakes are those that people make when they write a Llama themselves (docs/walkthrough.md).
They are made by swapping functions on the modules for a while; nothing in `nn/` knows of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from glassllama.base.errors import GlassError
from glassllama.models.llama import Llama
from glassllama.nn.attention import Attention
from glassllama.nn.rope import ROTATE
from glassllama.walkthrough.trace import TOKEN_AXIS, Edit, Trace

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def ablate_head(layer: int, head: int) -> Edit:
    """Switch one head off: what it takes home becomes zero."""

    def without(heads: Tensor) -> Tensor:  # (B, H, T, D)
        if not 0 <= head < heads.shape[1]:
            raise GlassError(f"head {head} is out of range 0 … {heads.shape[1] - 1}")
        left = heads.clone()
        left[:, head] = 0
        return left

    return Edit(f"layers.{layer}.attention.heads", without)


def patch(place: str, source: Trace, positions: Sequence[int] | None = None) -> Edit:
    """Put in what another run had at this place, at all or only at these of the T tokens."""
    other = source[place]

    def with_other(out: Tensor) -> Tensor:
        moved = other.to(out)
        if positions is None:
            return moved
        chosen = torch.tensor(list(positions), device=out.device)
        return out.index_copy(TOKEN_AXIS, chosen, moved.index_select(TOKEN_AXIS, chosen))

    return Edit(place, with_other)


@dataclass(frozen=True)
class Mistake:
    """One way to get a Llama wrong."""

    name: str
    title: str
    explanation: str
    make: Callable[[Attention], None]


def see_the_future(attention: Attention) -> None:
    right = attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        everything = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return right(q, k, v, everything)

    swap(attention, attend)


def rotate_other_pairs(attention: Attention) -> None:
    other = {"interleaved": "half", "half": "interleaved"}[attention.config.rope_layout]
    attention.rotate = ROTATE[other]


def forget_the_scale(attention: Attention) -> None:
    right = attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return right(q * math.sqrt(q.shape[-1]), k, v, mask)

    swap(attention, attend)


def swap(attention: Attention, attend: Attend) -> None:
    """On this instance only: it hides the method of the class until it is taken away."""
    attention.__dict__["attend"] = attend


MISTAKES = {
    mistake.name: mistake
    for mistake in (
        Mistake(
            "no-mask",
            "Attention without the causal mask",
            "Every position sees the tokens after it. In training it would read its answer there; "
            "a model that was trained with the mask is lost.",
            see_the_future,
        ),
        Mistake(
            "rope-layout",
            "RoPE turns the wrong coordinates",
            "Pairs where the checkpoint has halves, or the reverse: the commonest mistake when "
            "weights move between Meta's, Hugging Face's and GGUF's files. No shape is wrong and "
            "nothing warns; slow pairs hardly turn within a few words, so short texts may look "
            "right, and longer ones come apart.",
            rotate_other_pairs,
        ),
        Mistake(
            "scale",
            "Scores are not divided by √D",
            "The softmax gets numbers √D times too large and gives nearly all weight to one token. "
            "A constant copied from a model with another head width does the same, more mildly.",
            forget_the_scale,
        ),
    )
}


@contextmanager
def mistaken(model: Llama, mistake: Mistake) -> Iterator[None]:
    """The model with this mistake in every layer, and without it afterwards."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    rotations = [attention.rotate for attention in attentions]
    try:
        for attention in attentions:
            mistake.make(attention)
        yield
    finally:
        for attention, rotate in zip(attentions, rotations, strict=True):
            attention.rotate = rotate
            attention.__dict__.pop("attend", None)
