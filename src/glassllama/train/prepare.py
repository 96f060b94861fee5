"""From settings to a run that can begin, or go on."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from glassllama.train.arithmetic import choose_arithmetic
from glassllama.train.average import Average
from glassllama.train.batches import Batches, require_window
from glassllama.train.build import as_module, make_model
from glassllama.train.checkpoints import complete_steps, sweep
from glassllama.train.data import Data
from glassllama.train.faults import TrainingError
from glassllama.train.optimisers import Optimisers
from glassllama.train.resolve import to_toml
from glassllama.train.run import CHECKPOINTS, Run, resume
from glassllama.train.settings import Settings


def prepare(settings: Settings, data: Data, folder: Path) -> Run:
    """A new run, nothing made yet. Raises GlassError: sizes or texts that cannot be."""
    require_window(data.held_out, settings.data.context)
    model = make_model(settings, data.tokenizer.vocab_size)
    choose_arithmetic(model, settings.run, settings.model.dropout)
    module = as_module(model).train()
    return Run(
        settings=settings,
        folder=folder,
        data=data,
        model=model,
        optimisers=Optimisers(module, settings.optimiser),
        batches=Batches(data.learnt, settings.data.context, settings.data.batch, settings.run.seed),
        average=Average(module, settings.optimiser.ema) if settings.optimiser.ema else None,
    )


def occupy(folder: Path) -> FileLock:
    """Make a run's folder and keep other processes out of it, until `release`d or this one ends.

    Raises TrainingError where another process trains there, or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(f"{folder}: another process is training there") from None
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return lock


def require_free(folder: Path, resuming: bool) -> None:
    """Raise TrainingError where the folder holds a run that nobody asked to go on with."""
    begun = complete_steps(folder / CHECKPOINTS) or (folder / "log.jsonl").exists()
    if begun and not resuming:
        raise TrainingError(
            f"{folder}: holds a run already; go on with it by --resume auto, or begin another "
            "with --out FOLDER"
        )


def take_up(run: Run) -> bool:
    """Go on from the folder's last checkpoint -> whether there was one; sweep what is half done."""
    sweep(run.checkpoints)
    steps = complete_steps(run.checkpoints)
    if steps:
        resume(run, steps[max(steps)])
    (run.folder / "settings.toml").write_text(to_toml(run.settings), encoding="utf-8")
    return bool(steps)
