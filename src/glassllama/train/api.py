"""`train`: the whole of training as a Python call; and the folder of a run until its first step.

What a start writes, the text as ids and a vocabulary, goes into a staging folder inside the run's
folder. After the first step it is moved to its places; a start that fails leaves no trace.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGINT, Signals

from filelock import FileLock, Timeout

from glassllama.base.errors import MissingExtraError, TrainingError
from glassllama.hub.names import RUNS
from glassllama.models.language_model import LanguageModel
from glassllama.nn.init import shapes_only
from glassllama.train.checkpoint import TEXTS, Run, complete_steps, maybe_resume, read_state
from glassllama.train.corpus import Data, open_data
from glassllama.train.distributed import SINGLE_PROCESS, DistContext, connect_ranks
from glassllama.train.loop import sample_text, stop_on_signals, train_steps
from glassllama.train.metrics import (
    Listener,
    LossMonitor,
    MetricsLog,
    NullListener,
    RunInfo,
    plot_loss,
    read_log,
    reference_for_text,
)
from glassllama.train.model import (
    dtype_of,
    flops_per_token,
    init_from,
    make_model,
    new_model,
    peak_flops,
    save_compiled_code,
    set_precision,
)
from glassllama.train.optimizers import EMA, Optimizers, lr_factor
from glassllama.train.preflight import preflight, require_memory_for, require_step_fits
from glassllama.train.settings import Settings, fingerprint, require_same_run, to_toml
from glassllama.train.tokens import Batches, require_window

LOCK = ".lock"  # keeps other processes out of a run's folder
STAGE = ".start"  # what is written before the first step


def train(
    settings: Settings,
    *,
    folder: Path | str | None = None,
    resume: bool = False,
    checks: bool = True,
    offline: bool = False,
    listener: Listener | None = None,
) -> Path:
    """Train a model -> the folder of the run, which `load` reads.

    `folder` is runs/NAME unless given. `resume`: continue from its last checkpoint, if there is
    one. `checks`: run preflight checks. `listener` receives what happens (train/metrics.py).

    The first Ctrl-C or SIGTERM finishes the step, saves a checkpoint and raises KeyboardInterrupt
    or SystemExit(143); the second ends at once. Under torchrun all ranks call this function with
    the same arguments. Raises GlassError.
    """
    folder = Path(RUNS) / settings.name if folder is None else Path(folder)
    with connect_ranks(settings.run.device) as dist, ExitStack() as stack:
        events = listener if listener is not None and dist.is_rank0 else NullListener()

        def start() -> Data:
            if dist.is_rank0:
                stack.enter_context(lock_run_dir(folder))
                require_free(folder, settings, resuming=resume)
            dist.require_even(settings.data.batch, settings.run.accumulate)
            progress = partial(events.on_download, settings.data.corpus)
            return open_data(
                settings.data, folder / STAGE, offline=offline, written=not dist.is_rank0,
                earlier=folder, note=events.on_note, progress=progress if dist.is_rank0 else None,
            )  # fmt: skip

        def check() -> None:
            """Of several ranks rank 0 makes the checks, as if it were alone."""
            if dist.is_rank0:
                for line in preflight(run if dist.is_single else single_rank_run(run)):
                    events.on_note(f"checked {line}")

        run = prepare(settings, dist.rank0_first(start), folder, dist, offline=offline)
        if dist.is_single:  # of several ranks rank 0 checks it, and `prepare` most of it
            require_step_fits(run)
        resumed = maybe_resume(run)
        if checks and not resumed:
            dist.rank0_first(check)
        received = make_steps(run, events, resumed=resumed)
        finish(run, events)
        dist.barrier()  # torchrun ends rank 0 when another rank exits with a signal's code
    if received is not None:
        raise KeyboardInterrupt if received == SIGINT else SystemExit(128 + received)
    return folder


def make_steps(run: Run, events: Listener, *, resumed: bool) -> Signals | None:
    """Make the remaining steps, with log and listener -> the signal that stopped them."""
    first, log, monitor = run.progress.step, None, None
    with stop_on_signals() as stop, ExitStack() as stack:
        if run.dist.is_rank0:
            s = run.settings
            info = RunInfo(
                folder=run.folder, first_step=first, total_steps=s.schedule.steps,
                flops_per_token=flops_per_token(run.model, s.data.context),
                peak_flops=peak_flops(s.run.device, dtype_of(s.run)) * run.dist.world,
            )  # fmt: skip
            log = MetricsLog(
                run.folder, first, tensorboard=s.run.tensorboard, on_open=partial(commit, run)
            )
            stack.enter_context(closing(log))
            events.on_start(info)
            if resumed:
                share = f"{lr_factor(first, s.schedule):.0%}"
                rate = f": {run.extended}; the learning rate goes on at {share} of its peak"
                events.on_note(f"going on after step {first:,}{rate if run.extended else ''}")
            if (reference := reference_for_text(s)) is not None:
                monitor = LossMonitor(reference, first)
            seeds = "none for these settings" if reference is None else f"{reference.seeds} seeds"
            events.on_note(f"reference runs: {seeds}")
        train_steps(run, log, events, stop, monitor)
    if run.complete:  # a signal during the last save stops nothing
        return None
    step = run.progress.step
    saved = f"stopped and saved after step {step:,}; go on with --resume auto"
    nothing = f"stopped before step {step + 1:,}; nothing has changed"
    events.on_note(saved if step > first else nothing)
    return stop.received


def finish(run: Run, events: Listener) -> None:
    """Plot the loss; a sample if the run is complete."""
    text = sample_text(run) if run.complete else None  # by all ranks together
    if run.dist.is_rank0 and (records := read_log(run.folder)):
        try:
            reference = reference_for_text(run.settings)
            plot_loss(records, run.folder, run.settings.name, reference)
        except MissingExtraError as error:
            events.on_note(f"note: {error}")
    events.on_end(text)


# --- from settings to a run -----------------------------------------------------------------


def prepare(
    settings: Settings,
    data: Data,
    folder: Path,
    dist: DistContext = SINGLE_PROCESS,
    *,
    offline: bool = False,
) -> Run:
    """A new run at step 0, or this rank's part of it.

    Its weights are random, or those of `model.init_from`; if the folder has a checkpoint of the
    run, `maybe_resume` will replace them. Raises GlassError: impossible sizes or texts, another
    model; MemoryShortError before memory is taken.
    """
    dist.require_even(settings.data.batch, settings.run.accumulate)
    require_window(data.val, settings.data.context)
    require_memory_for(settings, data, dist)
    model = first_weights(settings, data.tokenizer.vocab_size, dist)
    if settings.model.init_from and not complete_steps(folder / "checkpoints"):
        init_from(model, settings.model.init_from, data.tokenizer, offline=offline)
    model.train()
    s = settings
    return Run(
        settings=s, folder=folder, data=data, model=model, dist=dist,
        optimizers=Optimizers(model, s.optimizer),
        batches=Batches(data.train, s.data.context, s.data.batch, s.run.seed),
        ema=EMA(model, s.optimizer.ema) if s.optimizer.ema else None,
    )  # fmt: skip


def first_weights(settings: Settings, vocab_size: int, dist: DistContext) -> LanguageModel:
    """A new model; of several ranks each has only its part and one tensor in memory."""
    if dist.is_single:
        model = make_model(settings, vocab_size)
    else:
        with shapes_only():
            model = new_model(settings, vocab_size)
    set_precision(model, settings.run, settings.model.dropout)
    if not dist.is_single:
        from glassllama.train.sharding import shard

        shard(model, settings, dist)
    return model


def single_rank_run(run: Run) -> Run:
    """A run of this rank alone, on its part of a batch: preflight.py checks it."""
    share = run.settings.data.batch // run.dist.world
    data = replace(run.settings.data, batch=share)
    return prepare(replace(run.settings, data=data), run.data, run.folder)


# --- the run's folder -----------------------------------------------------------------------


@contextmanager
def lock_run_dir(folder: Path) -> Iterator[Path]:
    """Lock a run's folder, created if needed -> its staging folder, empty.

    At the end the folder is as before, missing or not, unless `commit` was called. Raises
    TrainingError if another process trains there, or nothing can be written.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    had_lock, stage, lock = (folder / LOCK).exists(), folder / STAGE, FileLock(folder / LOCK)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(f"{folder}: another process is training there") from None
        except OSError as error:
            reason = error.strerror or error
            raise TrainingError(f"{folder}: cannot be written ({reason})") from None
        try:
            shutil.rmtree(stage, ignore_errors=True)  # of a start that was killed
            stage.mkdir()
            yield stage
        finally:
            if stage.exists():
                shutil.rmtree(stage, ignore_errors=True)
                if not had_lock:
                    with suppress(OSError):
                        (folder / LOCK).unlink()
            lock.release()
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()  # fails if anything is in it


def require_free(folder: Path, settings: Settings, *, resuming: bool) -> None:
    """Raise TrainingError if the folder has a run that is not to be resumed, or another run."""
    steps = complete_steps(folder / "checkpoints")
    if resuming and steps:
        last = steps[max(steps)]
        _, identity = read_state(last)
        without_texts = {n: v for n, v in identity.items() if n not in TEXTS}
        require_same_run(str(last), without_texts, fingerprint(settings))
        read_log(folder)  # it will be continued, so it must be readable
    if not resuming and (steps or (folder / "log.jsonl").exists()):
        raise TrainingError(
            f"{folder}: there is a run already; resume it with --resume auto (longer, with a "
            "larger schedule.steps), or start another with --out FOLDER"
        )


def commit(run: Run) -> None:
    """After the first step: move the staged files to their places and write settings.toml."""
    stage, vocabulary = run.folder / STAGE, run.data.vocabulary
    (stage / "settings.toml").write_text(to_toml(run.settings), encoding="utf-8")
    for file in sorted(stage.rglob("*")):
        if file.is_file():
            target = run.folder / file.relative_to(stage)
            target.parent.mkdir(exist_ok=True)
            try:
                os.replace(file, target)
            except PermissionError:  # Windows moves no file that is in use
                shutil.copyfile(file, target)
    if vocabulary is not None and vocabulary.is_relative_to(stage):
        run.data = replace(run.data, vocabulary=run.folder / vocabulary.relative_to(stage))
    shutil.rmtree(stage, ignore_errors=True)
    save_compiled_code()  # all kernels have run now
