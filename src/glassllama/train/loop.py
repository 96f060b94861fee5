"""Training, the whole of it: batch, loss, gradients, step; and now and then a look at the result.

Everything around these lines is preparation (train/prepare.py) or bookkeeping (train/run.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from glassllama.train.arithmetic import arithmetic
from glassllama.train.batches import IGNORED, Batch
from glassllama.train.evaluate import Score, evaluate
from glassllama.train.faults import TrainingError
from glassllama.train.journal import Journal, Made, Record
from glassllama.train.loss import summed_loss
from glassllama.train.run import Run, averaged, save
from glassllama.train.sample import sample
from glassllama.train.schedule import rate_factor
from glassllama.train.stopping import Wish


class Listener(Protocol):
    """Who is told what happens."""

    def on_step(self, record: Record) -> None: ...
    def on_sample(self, step: int, text: str) -> None: ...


def train(run: Run, journal: Journal, listener: Listener, wish: Wish) -> None:
    """Make the steps that are left, or stop, saved, after the one in which `wish` came true.

    Raises TrainingError at the first number that is not finite, before it reaches the weights.
    """
    every, progress = run.settings.run, run.progress
    while not (run.complete or wish):
        made = one_step(run)
        score = judged(run) if due(run, every.eval_every) or run.complete else None
        record = Record(**vars(made), **({} if score is None else vars(score)))
        journal.write(record)
        listener.on_step(record)
        if due(run, every.sample_every):
            listener.on_sample(progress.step, sample_text(run))
        best = score is not None and progress.note_score(score.val_loss)
        if best or wish or run.complete or due(run, every.save_every):
            save(run)


def one_step(run: Run) -> Made:
    """Batch, loss, gradients, weights: what training consists of."""
    s, progress, started = run.settings, run.progress, time.perf_counter()
    torch.manual_seed(s.run.seed << 32 | progress.step)  # dropout is a function of the step
    factor = rate_factor(progress.step, s.schedule)
    batch = run.batches.at(progress.step, run.rank, run.world)
    loss = loss_and_gradients(run, batch)
    norm = gradient_norm(run, s.optimiser.clip)
    require_finite(progress.step + 1, loss, norm, s.optimiser.lr * factor)
    run.optimisers.step(factor)
    progress.step += 1
    if run.average is not None:
        run.average.update(progress.step)
    took = time.perf_counter() - started
    progress.seconds += took
    return Made(
        step=progress.step,
        loss=loss,
        lr=s.optimiser.lr * factor,
        grad_norm=norm,
        tokens=progress.step * run.tokens_per_step,
        tok_s=run.tokens_per_step / took,
        seconds=progress.seconds,
    )


def judged(run: Run) -> Score:
    """The model, or its running mean, on the validation split."""
    context = run.settings.data.context
    with averaged(run), arithmetic(run.model, run.settings.run):
        return evaluate(run.model, run.data.held_out, context, run.data.tokenizer)


def sample_text(run: Run) -> str:
    """What the model, or its running mean, makes of `run.prompt` now."""
    s, tokenizer = run.settings.run, run.data.tokenizer
    prompt = tokenizer.encode(s.prompt, bos=tokenizer.bos is not None)
    with averaged(run):
        ids = sample(run.model, prompt, count=s.sample_tokens, seed=s.seed)
    return s.prompt + tokenizer.decode(ids)


def due(run: Run, every: int) -> bool:
    return every > 0 and run.progress.step % every == 0


def loss_and_gradients(run: Run, batch: Batch) -> float:
    """The mean loss per target of a batch; its gradients are left in the weights' `grad`."""
    s, counted = run.settings.run, max(1, int((batch.targets != IGNORED).sum()))
    total = torch.zeros((), device=s.device)
    for ids, targets, segments in parts(batch, s.accumulate, s.device):
        with arithmetic(run.model, s):
            h = run.model.hidden(ids, segments=segments)  # (B, T, C)
            loss = summed_loss(run.model, h, targets, s.loss_chunk) / counted
        loss.backward()
        total += loss.detach()
    return float(total)


def parts(batch: Batch, count: int, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The batch on `device`, its rows cut into `count` equal parts."""
    ids, targets = (torch.from_numpy(a).to(device).chunk(count) for a in batch[:2])
    segments = None if batch.segments is None else torch.from_numpy(batch.segments).to(device)
    cut = [None] * count if segments is None else list(segments.chunk(count))
    return zip(ids, targets, cut, strict=True)


def gradient_norm(run: Run, limit: float) -> float:
    """The norm of all gradients together; above `limit` (0: none) they are scaled down to it."""
    weights = list(run.optimisers.named.values())
    return float(torch.nn.utils.clip_grad_norm_(weights, limit if limit > 0 else math.inf))


def require_finite(step: int, loss: float, norm: float, lr: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {step}: loss is {loss:g}, gradient norm {norm:g} at learning rate {lr:g}; "
            "stopped before this step changed the weights: resume from the last checkpoint with a "
            "lower optimiser.lr, a longer schedule.warmup or a smaller optimiser.clip"
        )
