"""Checks before a run: a few seconds that save hours of training the wrong thing.

Each failing check raises a PreflightError that names the bug; each is tested by planting that bug.
They run on rows of the first batch and on a copy of the model, so the run itself begins untouched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from glassllama.base.errors import QUOTED_CHARACTERS
from glassllama.models.language_model import LanguageModel
from glassllama.train.adamw import AdamW
from glassllama.train.batches import IGNORED, Batch
from glassllama.train.data import Data
from glassllama.train.estimate import estimate
from glassllama.train.faults import PreflightError
from glassllama.train.loss import summed_loss
from glassllama.train.model_factory import as_module
from glassllama.train.run import Run

ROWS, TOKENS = 4, 32  # enough of a batch to look at
SHIFTS = 8  # how far wrong targets are looked for
SAME = 1e-4  # logits this close are the same, computed twice
SLACK, SLACK_SHARE = 0.5, 0.12  # nats, and share of ln V, that a fresh model may be from ln V
REPEATS = 60  # steps on one small batch, within which its loss must halve
RATES = (3e-3, 3e-1)  # AdamW's: of a network with layers, and of a mere table
HALF = 0.5  # of the first loss must be reached
GENTLE, ENOUGH = (3e-4, 3e-3, 3e-1), 0.9  # the same for a model that has learnt already
PROBES, PROBE_TOKENS = 16, 48  # pieces of held-out text that are looked for in the training text


def preflight(run: Run) -> Iterator[str]:
    """What each check found, one line at a time. Raises PreflightError, MemoryShortError."""
    batch = some_rows(run)
    yield f"data: {check_data(run.data, run.settings.data.corpus)}"
    check_targets(batch)
    yield "targets: the inputs, shifted by one"
    ids = torch.from_numpy(batch.ids[:, :TOKENS]).to(run.settings.run.device)
    targets = torch.from_numpy(batch.targets[:, :TOKENS]).to(ids.device)
    twin = copy.deepcopy(run.model)
    as_module(twin).eval()
    check_future(twin, ids)
    if batch.segments is not None:
        check_documents(twin, ids)
    yield "future: no token's logits depend on later ones"
    begun = bool(run.settings.model.init_from)
    yield f"beginning: {check_beginning(twin, ids, targets, begun=begun)}"
    yield f"learning: {check_learning(twin, ids, targets, begun=begun)}"
    yield f"this machine: {estimate(run)}"


def some_rows(run: Run) -> Batch:
    """The first rows of the first batch."""
    return replace(run.batches, batch=min(ROWS, run.batches.batch)).at(0)


def check_data(data: Data, corpus: str) -> str:
    """Several different tokens, few unknown ones, and held-out text that is not learnt from."""
    learnt, held_out, name = data.learnt, data.held_out, corpus[-QUOTED_CHARACTERS:]
    counts = np.bincount(learnt.ids, minlength=data.tokenizer.vocab_size)
    if np.count_nonzero(counts) < 2:
        raise PreflightError(f"data: {name}: the text is one token over and over; check the file")
    unknown = getattr(data.tokenizer, "unknown", None)
    if unknown is not None and counts[unknown] > len(learnt) / 100:
        raise PreflightError(
            f"data: {name}: {counts[unknown] / len(learnt):.0%} of the text is not in the "
            "vocabulary; make a vocabulary from this text (data.tokenizer)"
        )
    seen = share_seen(learnt.ids, held_out.ids)
    if seen > 0.5:
        raise PreflightError(
            f"data: {name}: {seen:.0%} of the validation text stands in the training text too: "
            "its loss would say nothing; remove repetitions from the corpus"
        )
    return f"{len(learnt):,} tokens to learn from, {len(held_out):,} held out, " + (
        f"vocabulary {data.tokenizer.vocab_size:,}"
    )


def share_seen(
    learnt: np.ndarray[tuple[int], np.dtype[np.integer]],
    held_out: np.ndarray[tuple[int], np.dtype[np.integer]],
) -> float:
    """The share of some pieces of the held-out ids that occur in the others word for word."""
    length = min(PROBE_TOKENS, len(held_out))
    text = np.asarray(learnt).tobytes()
    starts = np.linspace(0, len(held_out) - length, PROBES).astype(int)
    return float(np.mean([held_out[s : s + length].tobytes() in text for s in starts]))


def check_targets(batch: Batch) -> None:
    """Each target must be the next input of its row."""
    fits = [shift for shift in range(min(SHIFTS, batch.ids.shape[1])) if is_shifted(batch, shift)]
    if 1 in fits or batch.ids.shape[1] == 1:  # of rows of one token nothing can be seen
        return
    if not fits:
        raise PreflightError("targets: they are not the inputs of any later position")
    consequence = {0: "copy its input"}.get(fits[0], f"skip {fits[0] - 1} of {fits[0]} tokens")
    raise PreflightError(
        f"targets: they are the inputs shifted by {fits[0]}, not by 1: the model would learn to "
        f"{consequence}"
    )


def is_shifted(batch: Batch, shift: int) -> bool:
    inputs, targets = batch.ids[:, shift:], batch.targets[:, : batch.ids.shape[1] - shift]
    return bool(((inputs == targets) | (targets == IGNORED)).all())


@torch.inference_mode()
def check_future(model: LanguageModel, ids: Tensor) -> None:
    """Another token at position t must leave the logits before t as they are."""
    before = model(ids)  # (B, T, V)
    for t in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
        moved = (model(changed) - before)[:, :t].abs().amax(dim=(0, 2))  # (t,)
        if float(moved.max()) > SAME:
            first = int((moved > SAME).nonzero()[0])
            raise PreflightError(
                f"future: the logits at position {first} change with the token at position {t}: "
                "the model sees what it is to predict; its causal mask is missing or shifted"
            )


@torch.inference_mode()
def check_documents(model: LanguageModel, ids: Tensor) -> None:
    """A token must leave the logits of the next document in its row as they are."""
    half = ids.shape[1] // 2
    segments = (torch.arange(ids.shape[1], device=ids.device) >= half).long().expand_as(ids)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % model.config.vocab_size
    moved = model(changed, segments=segments) - model(ids, segments=segments)
    if float(moved[:, half:].abs().max()) > SAME:
        raise PreflightError(
            "documents: a document's logits change with the document before it in the row: the "
            "mask of packed documents is missing"
        )


@torch.inference_mode()
def check_beginning(
    model: LanguageModel, ids: Tensor, targets: Tensor, *, begun: bool = False
) -> str:
    """A fresh model knows nothing: its loss is that of guessing, ln V.

    Of one that has `begun` with another's weights there is nothing to expect but a finite loss.
    """
    loss, guessing = mean_loss(model, ids, targets).item(), math.log(model.config.vocab_size)
    slack = max(SLACK, SLACK_SHARE * guessing)
    found = f"loss {loss:.2f}, guessing among {model.config.vocab_size:,} is {guessing:.2f}"
    if begun and math.isfinite(loss):
        return f"{found}: it begins with the weights of another model"
    if not loss < guessing + slack:
        raise PreflightError(f"beginning: {found}: the initial weights are too large")
    # With tied embeddings a fresh model predicts the input token again, which may be right.
    others = targets.masked_fill(targets == ids, IGNORED)
    known = bool((others != IGNORED).any()) and mean_loss(model, ids, others) < guessing - slack
    if loss < guessing - slack and known:
        raise PreflightError(
            f"beginning: {found}: the model knows the answers already: targets leak into its "
            "input, or its weights are not fresh"
        )
    return found


def mean_loss(model: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    count = int((targets != IGNORED).sum())
    return summed_loss(model, model.hidden(ids), targets, chunk=ids.numel()) / max(1, count)


def check_learning(
    model: LanguageModel, ids: Tensor, targets: Tensor, *, begun: bool = False
) -> str:
    """A few rows, seen again and again, must be learnt by heart, by all parameters together."""
    begin = {name: p.detach().clone() for name, p in as_module(model).named_parameters()}
    share = ENOUGH if begun else HALF
    for rate in GENTLE if begun else RATES:
        losses = repeat(model, ids, targets, rate, share)
        still = [n for n, p in as_module(model).named_parameters() if torch.equal(p, begin[n])]
        if still:
            raise PreflightError(
                f"learning: {', '.join(still[:3])}{' …' * (len(still) > 3)} did not move: frozen "
                "(requires_grad is off), or nothing that the logits depend on"
            )
        if losses[-1] < share * losses[0]:
            return (
                f"loss of one small batch {losses[0]:.2f} → {losses[-1]:.2f} in {len(losses)} steps"
            )
        with torch.no_grad():
            for name, parameter in as_module(model).named_parameters():
                parameter.copy_(begin[name])
    raise PreflightError(
        f"learning: {REPEATS} steps on one small batch took its loss from {losses[0]:.2f} to no "
        f"less than {losses[-1]:.2f}: gradients do not reach the weights as they should"
    )


def repeat(
    model: LanguageModel, ids: Tensor, targets: Tensor, rate: float, share: float
) -> list[float]:
    """The losses of steps on the same batch, until one is below that share of the first.

    Two steps are made at least.
    """
    learning = [p for p in as_module(model).parameters() if p.requires_grad]
    optimiser = AdamW([{"params": learning, "weight_decay": 0.0}], lr=rate)
    losses: list[float] = []
    while len(losses) < REPEATS and not (len(losses) > 2 and losses[-1] < share * losses[0]):
        loss = mean_loss(model, ids, targets)
        for parameter in learning:
            parameter.grad = None
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses
