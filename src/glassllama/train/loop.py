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
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from glassllama.train.batches import IGNORED, Batch
from glassllama.train.distributed import whole
from glassllama.train.evaluate import Score, evaluate
from glassllama.train.faults import TrainingError
from glassllama.train.loss import summed_loss
from glassllama.train.metrics import Made, Record
from glassllama.train.precision import arithmetic
from glassllama.train.run import Run, save, used
from glassllama.train.sample import sample
from glassllama.train.schedule import rate_factor
from glassllama.train.signals import Wish

LOWER = (
    "resume from the last checkpoint with a lower optimiser.lr, a longer schedule.warmup or a "
    "smaller optimiser.clip"
)


class Listener(Protocol):
    """Who is told what happens."""

    def on_step(self, record: Record) -> None: ...
    def on_sample(self, step: int, text: str) -> None: ...


class Book(Protocol):
    """Where it is written down: train/metrics.py."""

    def write(self, record: Record) -> None: ...


class Nobody:
    """For ranks that do not lead: neither told nor written, because the leader does."""

    def write(self, record: Record) -> None:
        pass

    def on_step(self, record: Record) -> None:
        pass

    def on_sample(self, step: int, text: str) -> None:
        pass


def train(run: Run, journal: Book, listener: Listener, wish: Wish) -> None:
    """Make the steps that are left, or stop, saved, after the one in which `wish` came true.

    Raises TrainingError at the first number that is not finite, before it reaches the weights.
    """
    every, progress, stopping = run.settings.run, run.progress, wish.agreed(run.team)
    while not (run.complete or stopping):
        made = one_step(run)
        score = judged(run) if due(run, every.eval_every) or run.complete else None
        if score is not None and not math.isfinite(score.val_loss):
            raise TrainingError(f"step {made.step}: validation loss is {score.val_loss:g}; {LOWER}")
        record = Record(**vars(made), **({} if score is None else vars(score)))
        journal.write(record)
        listener.on_step(record)
        if due(run, every.sample_every):
            listener.on_sample(progress.step, sample_text(run))
        stopping = wish.agreed(run.team)
        best = score is not None and progress.note_score(score.val_loss)
        if best or stopping or run.complete or due(run, every.save_every):
            save(run)


def one_step(run: Run) -> Made:
    """Batch, loss, gradients, weights: what training consists of."""
    s, progress, started = run.settings, run.progress, time.perf_counter()
    # Dropout is a function of the step, and of the rank, whose rows are others.
    seed_dropout(s.run.seed << 32 | run.team.rank << 24 | progress.step, s.run.device)
    factor = rate_factor(progress.step, s.schedule)
    batch = run.batches.at(progress.step, run.team.rank, run.team.world)
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


def seed_dropout(seed: int, device: str) -> None:
    """Begin PyTorch's random numbers anew; on a CPU without looking for other devices, which
    `torch.manual_seed` does anew every time, in milliseconds."""
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def judged(run: Run) -> Score:
    """The model, or its running mean, on the validation split."""
    context = run.settings.data.context
    with used(run), arithmetic(run.model, run.settings.run):
        return evaluate(run.model, run.data.held_out, context, run.data.tokenizer, team=run.team)


def sample_text(run: Run) -> str:
    """What the model, or its running mean, makes of `run.prompt` now."""
    s, tokenizer = run.settings.run, run.data.tokenizer
    prompt = tokenizer.encode(s.prompt, bos=tokenizer.bos is not None)
    with used(run):
        ids = sample(run.model, prompt, s.sample_tokens, s.seed, tokenizer.vocab_size)
    return s.prompt + tokenizer.decode(ids)


def due(run: Run, every: int) -> bool:
    return every > 0 and run.progress.step % every == 0


def loss_and_gradients(run: Run, batch: Batch) -> float:
    """The mean loss per target of a batch; its gradients are left in the weights' `grad`.

    Every rank has other rows, and fewer targets than they have together: the mean is over all.
    """
    s, mine = run.settings.run, torch.tensor((batch.targets != IGNORED).sum())
    counted = max(1, int(run.team.total(mine)))
    total = torch.zeros((), device=s.device)
    for ids, targets, segments in parts(batch, s.accumulate, s.device):
        with arithmetic(run.model, s):
            h = run.model.hidden(ids, segments=segments)  # (B, T, C)
            loss = summed_loss(run.model, h, targets, s.loss_chunk) / counted
        loss.backward()
        total += loss.detach()
    return float(run.team.total(total))


def parts(batch: Batch, count: int, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The batch on `device`, its rows cut into `count` equal parts."""
    ids, targets = (torch.from_numpy(a).to(device).chunk(count) for a in batch[:2])
    segments = None if batch.segments is None else torch.from_numpy(batch.segments).to(device)
    cut = [None] * count if segments is None else list(segments.chunk(count))
    return zip(ids, targets, cut, strict=True)


def gradient_norm(run: Run, limit: float) -> float:
    """The norm of all gradients together; above `limit` (0: none) they are scaled down to it."""
    weights = list(run.optimisers.named.values())
    norm = whole(get_total_norm([w.grad for w in weights if w.grad is not None]))
    clip_grads_with_norm_(weights, limit if limit > 0 else math.inf, norm)
    return float(norm)


def require_finite(step: int, loss: float, norm: float, lr: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {step}: loss is {loss:g}, gradient norm {norm:g} at learning rate {lr:g}; "
            f"stopped before this step changed the weights: {LOWER}"
        )
