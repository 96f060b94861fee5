"""Step 14: one token is chosen from the logits."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassllama.generation.sampler import (
    History,
    Temperature,
    TopP,
    below_largest,
    make_sampler,
    unscaled_probs,
)
from glassllama.walkthrough.pictures import Bars
from glassllama.walkthrough.step import Step, WhatIf, compare, source
from glassllama.walkthrough.walk import Walk

TEMPERATURE, TOP_P = 0.6, 0.9  # of the example programs that Meta published with Llama 3
SHOWN = 10
DRAWS = 8
BORDER = 1e-5  # how near to each other, relatively, ids are nearly equal

DEPTH = 2  # sums in a row: softmax, and once more over what top-p has left
Probs = NDArray[np.float64]


def softmax_by_hand(logits: Tensor, temperature: float) -> Probs:
    """(V,) -> (V,) in float64."""
    scaled = logits.double().numpy() / temperature
    powers = np.exp(scaled - scaled.max())
    probs: Probs = powers / powers.sum()
    return probs


def nucleus_by_hand(probs: Probs, p: float) -> NDArray[np.intp]:
    """The likeliest ids that together reach probability p, likeliest first; ties stay together."""
    order = np.argsort(-probs, kind="stable")
    sums = np.cumsum(probs[order])
    last = min(int(np.searchsorted(sums, p)), len(order) - 1)
    nucleus: NDArray[np.intp] = order[probs[order] >= probs[order[last]]]
    return nucleus


def sampled(logits: Tensor) -> Probs:
    """The same by generation's own sampler: temperature, then top-p -> probabilities (V,)."""
    history = History([], len(logits))
    kept = TopP(TOP_P)(Temperature(TEMPERATURE)(logits.numpy(), history), history)
    weights = unscaled_probs(kept).astype(np.float64)
    probs: Probs = weights / weights.sum()
    return probs


def cut(probs: Probs, nucleus: NDArray[np.intp], theirs: Probs) -> Probs:
    """Probabilities (V,) of the nucleus alone.

    Where the sum meets p, rounding decides which of nearly equal ids are the last: float32 in the
    sampler, float64 here. There, and only there, ours are the ids that it has kept.
    """
    border = probs[nucleus[-1]]
    kept = np.where(np.abs(probs - border) <= BORDER * border, theirs > 0, probs >= border)
    left: Probs = np.where(kept, probs, 0.0)
    left /= left.sum()
    return left


def draws_of(walk: Walk, logits: Tensor) -> list[int]:
    """What a few seeds would choose."""
    sampler = partial(make_sampler, temperature=TEMPERATURE, top_p=TOP_P)
    starts = [sampler(seed=seed).start(walk.ids, len(logits)) for seed in range(DRAWS)]
    return [start.choose(logits.numpy()) for start in starts]


def sampling(walk: Walk) -> Step:
    logits = walk.logits[0, -1]
    plain, cooled = softmax_by_hand(logits, 1.0), softmax_by_hand(logits, TEMPERATURE)
    nucleus, theirs = nucleus_by_hand(cooled, TOP_P), sampled(logits)
    both = (torch.from_numpy(probs).float() for probs in (cut(cooled, nucleus, theirs), theirs))
    draws = draws_of(walk, logits)
    drawn = ", ".join(walk.piece(id) for id in draws)
    return Step(
        number=14,
        name="sampling",
        title="Sampling: temperature and top-p",
        question="How is one token chosen?",
        shapes=f"logits ({len(logits)},) → probabilities → {many(len(nucleus))} → one id",
        sources=(
            source(Temperature.__call__, "out:"),
            source(below_largest, "out:"),
            source(TopP.__call__, "ordered", "border", "return keep"),
        ),
        text=(
            f"Temperature {TEMPERATURE} makes likely tokens likelier; top-p keeps the likeliest "
            f"ones that together reach {TOP_P:.0%}: here {len(nucleus)} of {len(logits):,}. One "
            f"number from 0 to 1 decides among them. With the seeds 0 to {DRAWS - 1}: {drawn}.",
        ),
        pictures=(candidate_bars(walk, plain, cooled, nucleus),),
        checks=(
            compare("probabilities by generation's sampler", *both, terms=len(logits), depth=DEPTH),
        ),
        what_if=WhatIf(
            command="glassllama generate PROMPT -n 20 --temperature 1.5 --top-p 1",
            shows="hotter and uncut: the tail speaks, and the text falls apart",
        ),
        data={
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "nucleus": nucleus.tolist(),
            "draws": draws,
        },
    )


def many(candidates: int) -> str:
    return f"{candidates:,} candidate{'' if candidates == 1 else 's'}"


def candidate_bars(walk: Walk, plain: Probs, cooled: Probs, nucleus: NDArray[np.intp]) -> Bars:
    order = np.argsort(-plain, kind="stable")[:SHOWN]
    kept = set(nucleus.tolist())
    return Bars(
        f"probability → at temperature {TEMPERATURE}; cut: by top-p {TOP_P}",
        [walk.piece(int(i)) for i in order],
        [float(cooled[i]) for i in order],
        [
            f"{plain[i]:6.1%} → {cooled[i]:6.1%} {'cut' if int(i) not in kept else '   '}"
            for i in order
        ],
        top=1.0,
    )
