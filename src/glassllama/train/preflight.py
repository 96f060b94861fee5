"""Checks before the first step: a few seconds that save hours of training the wrong thing.

Each failing check raises a PreflightError that names the bug; each is tested by planting that bug.
They use rows of the first batch and a copy of the model, so the run itself is not changed. Memory
is estimated before it is taken.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from glassllama.base.errors import QUOTED_CHARACTERS, PreflightError
from glassllama.base.machine import available_memory, gigabytes, require_memory
from glassllama.models.language_model import LanguageModel
from glassllama.train.checkpoint import Progress, Run
from glassllama.train.corpus import Data
from glassllama.train.distributed import SINGLE_PROCESS, DistContext
from glassllama.train.loop import microbatches, summed_loss, train_step
from glassllama.train.model import count_parameters, planned_parameters
from glassllama.train.optimizers import AdamW, Optimizers
from glassllama.train.settings import Settings
from glassllama.train.tokens import IGNORED, Batch, bytes_of_batch

ROWS, TOKENS = 4, 32  # of the first batch
SHIFTS = 8  # wrong targets are looked for up to here
SAME = 1e-4  # largest difference of equal logits that were computed twice
SLACK, SLACK_SHARE = 0.5, 0.12  # nats, and share of ln V, that a new model may be from ln V
REPEATS = 150  # steps on one small batch, at most; texts with many characters take 90
# Learning rates of AdamW that are tried, and the share of the first loss that must be reached: for
# random weights (a network with layers, a mere table), and for weights of another model.
RATES, ENOUGH = (3e-3, 3e-1), 0.5
GENTLE_RATES, GENTLE_ENOUGH = (3e-4, 3e-3, 3e-1), 0.9
PROBES, PROBE_TOKENS = 16, 48  # pieces of validation text that are looked for in training text
FLOAT = 4  # bytes
LOGIT_COPIES = 3  # logits of a chunk, their softmax, their gradient
HEAP = 1.15  # the C library keeps some freed tensors of less than 32 MiB: a seventh, measured
GRADIENTS = 2  # of the last layer's output: in pieces, and joined
TRIAL_SECONDS = 2.0  # of trial steps, after which no other is started
FORWARD_SHARE = 1 / 3  # of a training step: the backward pass has two products for each


def preflight(run: Run) -> Iterator[str]:
    """The result of each check, one line at a time. Raises PreflightError, MemoryShortError."""
    batch = replace(run.batches, batch=min(ROWS, run.batches.batch)).at(0)
    yield f"data: {check_data(run.data, run.settings.data.corpus)}"
    check_targets(batch)
    yield "targets: the inputs, shifted by one"
    ids = torch.from_numpy(batch.ids[:, :TOKENS]).to(run.settings.run.device)
    targets = torch.from_numpy(batch.targets[:, :TOKENS]).to(ids.device)
    twin = copy.deepcopy(run.model)
    twin.eval()
    check_future(twin, ids)
    if batch.segments is not None:
        check_documents(twin, ids)
    yield "future: no token's logits depend on later ones"
    trained = bool(run.settings.model.init_from)
    yield f"beginning: {check_initial_loss(twin, ids, targets, trained=trained)}"
    yield f"learning: {check_learning(twin, ids, targets, trained=trained)}"
    yield f"this machine: {estimate(run)}"


def check_data(data: Data, corpus: str) -> str:
    """Several different tokens, few unknown ones, and validation text that is not trained on."""
    train, val, name = data.train, data.val, corpus[-QUOTED_CHARACTERS:]
    size = data.tokenizer.vocab_size
    counts = np.bincount(train.ids, minlength=size)
    if np.count_nonzero(counts) < 2:
        raise PreflightError(f"data: {name}: the text is one token over and over; check the file")
    unknown = getattr(data.tokenizer, "unknown", None)
    if unknown is not None and counts[unknown] > len(train) / 100:
        raise PreflightError(
            f"data: {name}: {counts[unknown] / len(train):.0%} of the text is not in the "
            "vocabulary; make a vocabulary from this text (data.tokenizer)"
        )
    length, text = min(PROBE_TOKENS, len(val)), np.asarray(train.ids).tobytes()
    starts = np.linspace(0, len(val) - length, PROBES).astype(int)
    seen = float(np.mean([val.ids[s : s + length].tobytes() in text for s in starts]))
    if seen > 0.5:
        raise PreflightError(
            f"data: {name}: {seen:.0%} of the validation text is in the training text too, so its "
            "loss would mean nothing; remove repetitions from the corpus"
        )
    return f"{len(train):,} tokens for training, {len(val):,} for validation, vocabulary {size:,}"


def check_targets(batch: Batch) -> None:
    """Each target must be the next input of its row."""
    shifts = range(min(SHIFTS, batch.ids.shape[1]))
    fits = [shift for shift in shifts if is_shifted(batch, shift)]
    if 1 in fits or batch.ids.shape[1] == 1:  # rows of one token show nothing
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
def check_initial_loss(
    model: LanguageModel, ids: Tensor, targets: Tensor, *, trained: bool = False
) -> str:
    """The loss of random weights is that of guessing, ln V; of `trained` ones it is finite."""
    loss, guessing = mean_loss(model, ids, targets).item(), math.log(model.config.vocab_size)
    slack = max(SLACK, SLACK_SHARE * guessing)
    found = f"loss {loss:.2f}, guessing among {model.config.vocab_size:,} is {guessing:.2f}"
    if trained and math.isfinite(loss):
        return f"{found}: it begins with the weights of another model"
    if not loss < guessing + slack:
        raise PreflightError(f"beginning: {found}: the initial weights are too large")
    # With tied embeddings a new model predicts the input token again, which may be right.
    others = targets.masked_fill(targets == ids, IGNORED)
    leaks = bool((others != IGNORED).any()) and mean_loss(model, ids, others) < guessing - slack
    if loss < guessing - slack and leaks:
        raise PreflightError(
            f"beginning: {found}: the model knows the answers already: targets leak into its "
            "input, or its weights are not new"
        )
    return found


def mean_loss(model: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    count = int((targets != IGNORED).sum())
    return summed_loss(model, model.hidden(ids), targets, chunk=ids.numel()) / max(1, count)


def check_learning(
    model: LanguageModel, ids: Tensor, targets: Tensor, *, trained: bool = False
) -> str:
    """A few rows, repeated, must be learned by heart, and all parameters must change."""
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    rates, enough = (GENTLE_RATES, GENTLE_ENOUGH) if trained else (RATES, ENOUGH)
    for rate in rates:
        losses = repeat(model, ids, targets, rate, enough)
        if still := [name for name, p in named.items() if torch.equal(p, before[name])]:
            raise PreflightError(
                f"learning: {', '.join(still[:3])}{' …' * (len(still) > 3)} did not move: frozen "
                "(requires_grad is off), or nothing that the logits depend on"
            )
        if losses[-1] < enough * losses[0]:
            steps = f"in {len(losses)} steps"
            return f"loss of one small batch {losses[0]:.2f} → {losses[-1]:.2f} {steps}"
        model.load_state_dict(before, strict=False)
    raise PreflightError(
        f"learning: {REPEATS} steps on one small batch took its loss from {losses[0]:.2f} to no "
        f"less than {losses[-1]:.2f}: gradients do not reach the weights as they should"
    )


def repeat(
    model: LanguageModel, ids: Tensor, targets: Tensor, rate: float, enough: float
) -> list[float]:
    """The losses of steps on the same batch, at least three, until one is `enough` of the first."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW([{"params": trainable, "weight_decay": 0.0}], lr=rate)
    losses: list[float] = []
    while len(losses) < REPEATS and not (len(losses) > 2 and losses[-1] < enough * losses[0]):
        loss = mean_loss(model, ids, targets)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- memory and time ------------------------------------------------------------------------


def estimate(run: Run) -> str:
    """Parameters, memory and time of the run, from steps of a copy of it.

    Raises MemoryShortError, before these steps, if they would not fit.
    """
    memory, free, s = require_step_fits(run), available_memory(), run.settings
    twin = copy.deepcopy(run.model)
    optimizers = Optimizers(twin, s.optimizer)
    trial = replace(run, model=twin, optimizers=optimizers, ema=None, progress=Progress())
    times: list[float] = []  # the first step is slower, but enough if steps are long
    while len(times) < 3 and sum(times) < TRIAL_SECONDS:
        started = time.perf_counter()
        train_step(trial)
        times.append(time.perf_counter() - started)
    evaluations = s.schedule.steps // s.run.eval_every if s.run.eval_every else 1
    evaluation = FORWARD_SHARE * len(run.data.val) / run.tokens_per_step * min(times)
    seconds = s.schedule.steps * min(times) + evaluations * evaluation
    of_free = "" if free is None else f" of {gigabytes(free)} free"
    return (
        f"{count_parameters(run.model):,} parameters, about {gigabytes(memory)}{of_free}, "
        f"about {duration(seconds)}"
    )


def require_memory_for(settings: Settings, data: Data, dist: DistContext = SINGLE_PROCESS) -> None:
    """Raise MemoryShortError, before a model is built, if what follows from its sizes does not fit.

    That is this rank's part of the batch, the weights, and everything of their size. What the
    layers store for the backward pass is counted by `require_step_fits`, which needs the model.
    """
    numbers = planned_parameters(settings, data.tokenizer.vocab_size)
    if settings.run.device == "cpu":
        needed = memory_without_layers(settings, data, numbers, dist.world)
    else:  # the batch is made on the CPU
        rows = settings.data.batch // dist.world
        needed = bytes_of_batch(data.train, rows, settings.data.context)
    require(settings, needed)


def require_step_fits(run: Run) -> int:
    """Bytes of a step at its peak. Raises MemoryShortError, before it is made, if it cannot be."""
    rows = run.settings.data.batch // run.settings.run.accumulate
    rest = memory_without_layers(run.settings, run.data, count_parameters(run.model), 1)
    one, two = activation_memory(run, 1), activation_memory(run, 2)
    per_row = two - one
    constant = max(0, one - per_row)  # joined weights, which serve all rows
    memory = rest + constant + round(HEAP * rows * per_row)
    if run.settings.run.device == "cpu":
        require(run.settings, memory)
    return memory


def require(settings: Settings, needed: int) -> None:
    require_memory(
        needed,
        what=f"{settings.name}: a step",
        instead="raise run.accumulate, or lower data.batch, data.context or the model's sizes",
    )


def memory_without_layers(s: Settings, data: Data, numbers: int, world: int) -> int:
    """Bytes of one rank: the batch, all that is as large as the weights, and a chunk's logits."""
    copies = 2 + 2 + (s.optimizer.ema > 0)  # weights, gradients, AdamW's two means (Muon: one)
    rows = s.data.batch // world
    positions = min(s.run.loss_chunk, rows // s.run.accumulate * s.data.context)
    vocab_size = int(s.model.sizes.get("vocab_size", data.tokenizer.vocab_size))
    logits = LOGIT_COPIES * positions * vocab_size
    batch = bytes_of_batch(data.train, rows, s.data.context)
    return batch + FLOAT * (copies * numbers // world + logits)


def activation_memory(run: Run, rows: int) -> int:
    """Peak bytes of what a step of `rows` stores for the backward pass, counted in a forward pass.

    The backward pass also needs the gradients of one layer, and those of the last hidden states:
    in pieces, then joined. Logits are left out.
    """
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in run.model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = replace(run.batches, batch=rows).at(0)
    ids, _, segments = next(iter(microbatches(batch, 1, run.settings.run.device)))
    compiled = run.settings.run.compile  # compiling would take longer than this one pass
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with eager, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = run.model.hidden(ids, segments=segments)  # alive, so saved tensors are, too
    count(hidden)
    forward, layers = sum(saved.values()), getattr(run.model.config, "n_layers", 0)
    return forward + (forward // layers if layers else 0) + GRADIENTS * hidden.nbytes


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s", 4000 -> "1 h 7 min"."""
    minutes, s = divmod(round(seconds), 60)
    hours, min = divmod(minutes, 60)
    return f"{hours} h {min} min" if hours else f"{min} min {s} s" if minutes else f"{s} s"
