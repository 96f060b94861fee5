"""From settings to a run that can begin, or go on."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from glassllama.train.average import Average
from glassllama.train.batches import Batches
from glassllama.train.build import as_module, make_model
from glassllama.train.checkpoints import complete_steps, sweep
from glassllama.train.data import Data
from glassllama.train.faults import TrainingError
from glassllama.train.optimisers import Optimisers
from glassllama.train.resolve import to_toml
from glassllama.train.run import Run, resume
from glassllama.train.settings import Settings


def prepare(settings: Settings, data: Data, folder: Path) -> Run:
    """A new run, nothing made yet."""
    model = make_model(settings, data.tokenizer.vocab_size)
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


def take_up(run: Run, *, resuming: bool) -> bool:
    """Begin in the run's folder, or go on from its last checkpoint -> whether there was one.

    Raises TrainingError where the folder holds a run that nobody asked to go on with.
    """
    sweep(run.checkpoints)
    steps = complete_steps(run.checkpoints)
    if not resuming and (steps or (run.folder / "log.jsonl").exists()):
        raise TrainingError(
            f"{run.folder}: holds a run already; go on with it by --resume auto, or begin another "
            "with --out FOLDER"
        )
    if steps:
        resume(run, steps[max(steps)])
    (run.folder / "settings.toml").write_text(to_toml(run.settings), encoding="utf-8")
    return bool(steps)
