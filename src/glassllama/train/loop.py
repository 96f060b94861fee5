"""The training loop: batch, loss, gradients, step; at times validation, samples, checkpoints.

Shapes: B batch, T tokens, C model width, V vocabulary.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from glassllama.base.errors import TrainingError
from glassllama.generation.sampler import make_sampler
from glassllama.models.language_model import LanguageModel
from glassllama.train.checkpoint import Run, eval_weights, save
from glassllama.train.corpus import Data
from glassllama.train.distributed import DistContext, full_tensor
from glassllama.train.metrics import Listener, LoggedMetrics, LossMonitor, MetricsLog, StepMetrics
from glassllama.train.model import autocast
from glassllama.train.optimizers import lr_factor
from glassllama.train.tokens import IGNORED, Batch, every_window

EVAL_POSITIONS = 8192  # positions of a batch of validation windows
TEMPERATURE = 0.8  # of samples
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
        logged = LoggedMetrics(**vars(metrics), **(vars(score) if score else {}))
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
    # torch.manual_seed looks for other devices every time, which takes milliseconds.
    seed = torch.default_generator.manual_seed if s.run.device == "cpu" else torch.manual_seed
    seed(s.run.seed << 32 | run.dist.rank << 24 | progress.step)
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
        step=progress.step, loss=loss, lr=lr, grad_norm=norm, seconds=progress.seconds,
        tokens=progress.step * run.tokens_per_step, tok_s=run.tokens_per_step / took,
    )  # fmt: skip


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


def summed_loss(model: LanguageModel, h: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """(B, T, C) hidden states, (B, T) targets -> the sum of -log p over all targets, float32.

    With a vocabulary of 128,000 the logits of a batch would be by far its largest tensor. Here
    logits of `chunk` positions exist at once: the backward pass recomputes those of each chunk
    from its hidden states.
    """
    h, targets = h.flatten(0, 1), targets.flatten()  # (B·T, C), (B·T,)
    if len(h) <= chunk:
        return chunk_loss(model, h, targets)
    losses = [
        checkpoint(chunk_loss, model, *piece, use_reentrant=False)
        for piece in zip(h.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def chunk_loss(model: LanguageModel, h: Tensor, targets: Tensor) -> Tensor:
    logits = model.logits(h).float()  # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


# --- validation -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Score:
    """`val_loss` in nats per token; `val_error`: its standard error over random windows."""

    val_loss: float
    val_error: float
    bits_per_byte: float


def evaluate_run(run: Run) -> Score:
    """The score of the model, or of its averaged weights, on the validation split.

    Windows of `context` tokens cover all of it, each target once. Every rank computes its share of
    the windows; all get the same score.
    """
    s, sums, counts = run.settings, [], []
    windows = every_window(run.data.val, s.data.context, max(1, EVAL_POSITIONS // s.data.context))
    # Not inference_mode: sharded weights gathered in it could not be trained afterwards.
    with evaluating(run) as model, torch.no_grad(), autocast(model, s.run):
        for batch in windows:
            ours = rows_of_rank(batch, run.dist)
            [(ids, targets, segments)] = microbatches(ours, 1, s.run.device)
            h = model.hidden(ids, segments=segments)  # (B, T, C)
            rows = zip(h.split(1), targets.split(1), strict=True)
            losses = torch.stack([summed_loss(model, *row, EVAL_POSITIONS) for row in rows])  # (B,)
            sums.append(of_all_ranks(losses, run.dist)[: len(batch.ids)])
            counts.append((batch.targets != IGNORED).sum(axis=1))
    return score_of(torch.cat(sums).double().cpu().numpy(), np.concatenate(counts), run.data)


@contextmanager
def evaluating(run: Run) -> Iterator[LanguageModel]:
    """Inside, the model has its averaged weights, if there are any, and no dropout."""
    training = run.model.training
    with eval_weights(run):
        run.model.eval()
        yield run.model
        run.model.train(training)


def rows_of_rank(batch: Batch, dist: DistContext) -> Batch:
    """Every world-th row; equally many for all ranks, so that some of the last rows repeat."""
    if dist.is_single:
        return batch
    rows = np.arange(dist.rank, dist.rank + len(batch.ids), dist.world)
    rows = np.minimum(rows, len(batch.ids) - 1)
    segments = None if batch.segments is None else batch.segments[rows]
    return Batch(batch.ids[rows], batch.targets[rows], segments)


def of_all_ranks(values: Tensor, dist: DistContext) -> Tensor:
    """(n,) of the rows of this rank -> (n · world,) of all ranks, in the rows' order."""
    table = values.new_zeros(len(values), dist.world)
    table[:, dist.rank] = values
    return dist.sum(table).flatten()


def score_of(sums: NDArray[np.float64], counts: NDArray[np.int64], data: Data) -> Score:
    """From the summed loss and the number of targets of each window, (windows,) both."""
    loss, tokenizer = sums.sum() / counts.sum(), data.tokenizer
    # Standard error of a ratio of sums: Cochran, Sampling Techniques (1977), section 2.11.
    rest = sums - loss * counts
    spread = math.sqrt(float((rest**2).sum()) / max(1, len(sums) - 1) / len(sums))
    lengths = [len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)]
    bytes_ = int(np.bincount(data.val.ids, minlength=tokenizer.vocab_size) @ np.array(lengths))
    return Score(
        val_loss=float(loss),
        val_error=spread / float(counts.mean()),
        bits_per_byte=float(loss) / math.log(2) * len(data.val) / bytes_,
    )


def sample_text(run: Run) -> str:
    """`run.prompt` and `run.sample_tokens` more, by the model, or by its averaged weights.

    When the context is full, the last half of it is read again into an empty cache.
    """
    s, tokenizer, context = run.settings.run, run.data.tokenizer, run.model.config.max_seq_len
    prompt = tokenizer.encode(s.prompt, bos=tokenizer.bos is not None)
    ids, unread = list(prompt), list(prompt)[-context // 2 or -1 :]
    sampler = make_sampler(temperature=TEMPERATURE, seed=s.seed).start(ids, tokenizer.vocab_size)
    with evaluating(run) as model, torch.no_grad():
        cache = model.new_cache(1, context)
        for _ in range(s.sample_tokens):
            if cache.lengths[0] + len(unread) > context:
                cache, unread = model.new_cache(1, context), ids[-(context // 2 or 1) :]
            h = model.hidden(torch.tensor([unread], device=s.device), cache)  # (1, T, C)
            logits = model.logits(h[0, -1])[: tokenizer.vocab_size].cpu().numpy()  # (V,)
            ids.append(sampler.choose(logits))
            unread = ids[-1:]
    return s.prompt + tokenizer.decode(ids[len(prompt) :])
