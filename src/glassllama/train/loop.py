"""The training loop: batch, loss, gradients, step; at times validation, samples, checkpoints."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from glassllama.base.errors import TrainingError
from glassllama.train.batches import IGNORED, Batch
from glassllama.train.checkpoint import eval_weights, save
from glassllama.train.distributed import DistContext, full_tensor
from glassllama.train.evaluate import Score, evaluate, sample, summed_loss
from glassllama.train.metrics import Listener, LoggedMetrics, MetricsLog, StepMetrics
from glassllama.train.optimizers import lr_factor
from glassllama.train.precision import autocast
from glassllama.train.reference_runs import LossMonitor
from glassllama.train.run import Run

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ADVICE = (
    "resume from the last checkpoint with a lower optimizer.lr, a longer schedule.warmup or a "
    "smaller optimizer.grad_clip"
)


class StopRequest:
    """The signal that asked this process, or another rank, to stop; None: none."""

    received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def on_any_rank(self, dist: DistContext) -> bool:
        """Whether any rank was asked to stop: the same answer on all, in the same step."""
        if number := dist.maximum(self.received or 0):
            self.received = signal.Signals(number)
        return number > 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, the first Ctrl-C or SIGTERM only sets the StopRequest; the second ends the program.

    In threads other than the main thread signals are handled as before.
    """
    stop, here = StopRequest(), False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal here
        if here:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        here, stop.received = True, signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_steps(
    run: Run,
    log: MetricsLog | None,
    listener: Listener,
    stop: StopRequest,
    monitor: LossMonitor | None = None,
) -> None:
    """Make the remaining steps; after the step in which `stop` is set, save and return.

    Metrics are written to `log` (None on ranks other than 0), reported to `listener`, and compared
    with reference runs by `monitor`.

    Raises TrainingError at the first number that is not finite, before it reaches the weights.
    """
    every, progress, stopping = run.settings.run, run.progress, stop.on_any_rank(run.dist)
    while not (run.complete or stopping):
        metrics = train_step(run)
        score = evaluate_run(run) if due(run, every.eval_every) or run.complete else None
        if score is not None and not math.isfinite(score.val_loss):
            raise TrainingError(
                f"step {metrics.step}: validation loss is {score.val_loss:g}; {ADVICE}"
            )
        logged = LoggedMetrics(**vars(metrics), **({} if score is None else vars(score)))
        if log is not None:
            log.write(logged)
        listener.on_step(logged)
        if monitor is not None and (warning := monitor.check_loss(logged.step, logged.loss)):
            listener.on_note(warning)
        if due(run, every.sample_every):
            listener.on_sample(progress.step, sample_text(run))
        stopping = stop.on_any_rank(run.dist)
        best = score is not None and progress.record_score(score.val_loss)
        if best or stopping or run.complete or due(run, every.save_every):
            save(run)


def due(run: Run, every: int) -> bool:
    return every > 0 and run.progress.step % every == 0


def train_step(run: Run) -> StepMetrics:
    """One optimizer step: batch, loss, gradients, weights."""
    s, progress, started = run.settings, run.progress, time.perf_counter()
    # Dropout is a function of seed, step, and rank, because ranks have different rows.
    seed_dropout(s.run.seed << 32 | run.dist.rank << 24 | progress.step, s.run.device)
    factor = lr_factor(progress.step, s.schedule)
    batch = run.batches.at(progress.step, run.dist.rank, run.dist.world)
    loss = loss_and_gradients(run, batch)
    norm = clip_gradients(run, s.optimizer.grad_clip)
    lr = s.optimizer.lr * factor
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {progress.step + 1}: loss is {loss:g}, gradient norm {norm:g} at learning rate "
            f"{lr:g}; stopped before this step changed the weights: {ADVICE}"
        )
    run.optimizers.step(factor)
    progress.step += 1
    if run.ema is not None:
        run.ema.update(progress.step)
    took = time.perf_counter() - started
    progress.seconds += took
    return StepMetrics(
        step=progress.step,
        loss=loss,
        lr=lr,
        grad_norm=norm,
        tokens=progress.step * run.tokens_per_step,
        tok_s=run.tokens_per_step / took,
        seconds=progress.seconds,
    )


def seed_dropout(seed: int, device: str) -> None:
    """Seed PyTorch's default generator. `torch.manual_seed` looks for other devices every time,
    in milliseconds."""
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def loss_and_gradients(run: Run, batch: Batch) -> float:
    """The mean loss per target of a batch, over all ranks; gradients are left in `grad`."""
    s, targets = run.settings.run, torch.tensor((batch.targets != IGNORED).sum())
    count = max(1, int(run.dist.sum(targets)))
    total = torch.zeros((), device=s.device)
    for ids, targets, segments in microbatches(batch, s.accumulate, s.device):
        with autocast(run.model, s):
            h = run.model.hidden(ids, segments=segments)  # (B, T, C)
            loss = summed_loss(run.model, h, targets, s.loss_chunk) / count
        loss.backward()
        total += loss.detach()
    return float(run.dist.sum(total))


def microbatches(
    batch: Batch, count: int, device: str
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(ids, targets, segments) of a batch on `device`, its rows cut into `count` equal parts."""
    ids, targets = (torch.from_numpy(a).to(device).chunk(count) for a in batch[:2])
    segments = None if batch.segments is None else torch.from_numpy(batch.segments).to(device)
    cut = [None] * count if segments is None else list(segments.chunk(count))
    return zip(ids, targets, cut, strict=True)


def clip_gradients(run: Run, limit: float) -> float:
    """Scale all gradients together down to the norm `limit` (0: no limit) -> their norm before."""
    weights = list(run.optimizers.named.values())
    norm = full_tensor(get_total_norm([w.grad for w in weights if w.grad is not None]))
    clip_grads_with_norm_(weights, limit if limit > 0 else math.inf, norm)
    return float(norm)


def evaluate_run(run: Run) -> Score:
    """The score of the model, or of its averaged weights, on the validation split."""
    with eval_weights(run), autocast(run.model, run.settings.run):
        context = run.settings.data.context
        return evaluate(run.model, run.data.val, context, run.data.tokenizer, run.dist)


def sample_text(run: Run) -> str:
    """`run.prompt`, continued by the model, or by its averaged weights."""
    s, tokenizer = run.settings.run, run.data.tokenizer
    prompt = tokenizer.encode(s.prompt, bos=tokenizer.bos is not None)
    with eval_weights(run):
        ids = sample(run.model, prompt, s.sample_tokens, s.seed, tokenizer.vocab_size)
    return s.prompt + tokenizer.decode(ids)
