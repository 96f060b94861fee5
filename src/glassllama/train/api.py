"""`train`: the whole of training as a Python call. PyTorch is imported when it is called."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from signal import SIGINT, Signals
from typing import TYPE_CHECKING

from glassllama.base.errors import MissingExtraError
from glassllama.hub.names import RUNS
from glassllama.train.metrics import Listener, MetricsLog, NullListener, RunInfo, read_log
from glassllama.train.settings import Settings

if TYPE_CHECKING:
    from glassllama.train.data import Data
    from glassllama.train.distributed import DistContext
    from glassllama.train.loop import StopRequest
    from glassllama.train.run import Run


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
    # PyTorch's threads should sleep rather than spin: the fused loops between its products run in
    # other threads, and small steps end many parallel sections. Read when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from glassllama.train.checkpoint import maybe_resume
    from glassllama.train.distributed import connect_ranks
    from glassllama.train.preflight import require_step_fits
    from glassllama.train.setup import lock_run_dir, prepare, require_free

    folder = Path(RUNS) / settings.name if folder is None else Path(folder)
    with connect_ranks(settings.run.device) as dist, ExitStack() as stack:
        events = listener if listener is not None and dist.is_rank0 else NullListener()

        def start() -> Data:
            if dist.is_rank0:
                stack.enter_context(lock_run_dir(folder))
                require_free(folder, settings, resuming=resume)
            dist.require_even(settings.data.batch, settings.run.accumulate)
            return read_data(settings, folder, dist, events, offline)

        data = dist.rank0_first(start)
        run = prepare(settings, data, folder, dist, offline=offline)
        if dist.is_single:  # of several ranks rank 0 checks it, and `prepare` most of it
            require_step_fits(run)
        resumed = maybe_resume(run)
        if checks and not resumed:
            dist.rank0_first(lambda: check(run, events))
        received = make_steps(run, events, resumed=resumed)
        finish(run, events)
        dist.barrier()  # torchrun ends rank 0 when another rank exits with a signal's code
    if received is not None:
        raise KeyboardInterrupt if received == SIGINT else SystemExit(128 + received)
    return folder


def read_data(
    settings: Settings, folder: Path, dist: DistContext, events: Listener, offline: bool
) -> Data:
    """The text as ids: written by rank 0, read by all ranks."""
    from glassllama.train.data import open_data
    from glassllama.train.setup import STAGE

    def progress(done: int, total: int) -> None:
        events.on_download(settings.data.corpus, done, total)

    return open_data(
        settings.data,
        folder / STAGE,
        offline=offline,
        progress=progress if dist.is_rank0 else None,
        written=not dist.is_rank0,
        earlier=folder,
        note=events.on_note,
    )


def check(run: Run, events: Listener) -> None:
    """The checks before a run; of several ranks rank 0 makes them, as if it were alone."""
    from glassllama.train.preflight import preflight
    from glassllama.train.setup import single_rank_run

    if run.dist.is_rank0:
        for line in preflight(run if run.dist.is_single else single_rank_run(run)):
            events.on_note(f"checked {line}")


def make_steps(run: Run, events: Listener, *, resumed: bool) -> Signals | None:
    """Make the remaining steps, with log and listener -> the signal that stopped them."""
    from glassllama.train.loop import stop_on_signals, train_steps

    first = run.progress.step
    with stop_on_signals() as stop:
        if run.dist.is_rank0:
            make_logged_steps(run, events, stop, resumed=resumed)
        else:
            train_steps(run, None, NullListener(), stop)
    if run.complete:  # a signal during the last save stops nothing
        return None
    if run.dist.is_rank0:
        step = run.progress.step
        saved = f"stopped and saved after step {step:,}; go on with --resume auto"
        nothing = f"stopped before step {step + 1:,}; nothing has changed"
        events.on_note(saved if step > first else nothing)
    return stop.received


def make_logged_steps(run: Run, events: Listener, stop: StopRequest, *, resumed: bool) -> None:
    from glassllama.train.loop import train_steps
    from glassllama.train.optimizers import lr_factor
    from glassllama.train.precision import dtype_of, flops_per_token, peak_flops
    from glassllama.train.reference_runs import LossMonitor, reference_for_text
    from glassllama.train.setup import commit

    s, first = run.settings, run.progress.step
    info = RunInfo(
        folder=run.folder,
        first_step=first,
        total_steps=s.schedule.steps,
        flops_per_token=flops_per_token(run.model, s.data.context),
        peak_flops=peak_flops(s.run.device, dtype_of(s.run)) * run.dist.world,
    )
    log = MetricsLog(run.folder, first, tensorboard=s.run.tensorboard, on_open=lambda: commit(run))
    events.on_start(info)
    if resumed:
        line = f"going on after step {first:,}"
        if run.extended:
            share = f"{lr_factor(first, s.schedule):.0%}"
            line += f": {run.extended}; the learning rate goes on at {share} of its peak"
        events.on_note(line)
    reference = reference_for_text(s)
    seeds = "none for these settings" if reference is None else f"{reference.seeds} seeds"
    events.on_note(f"reference runs: {seeds}")
    monitor = None if reference is None else LossMonitor(reference, first)
    try:
        train_steps(run, log, events, stop, monitor)
    finally:
        log.close()


def finish(run: Run, events: Listener) -> None:
    """Plot the loss; a sample if the run is complete."""
    from glassllama.train.loop import sample_text
    from glassllama.train.reference_runs import plot_loss, reference_for_text

    text = sample_text(run) if run.complete else None  # by all ranks together
    if not run.dist.is_rank0:
        return
    if records := read_log(run.folder):
        try:
            reference = reference_for_text(run.settings)
            plot_loss(records, run.folder, run.settings.name, reference)
        except MissingExtraError as error:
            events.on_note(f"note: {error}")
    events.on_end(text)
