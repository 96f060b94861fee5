"""From settings to a run that can begin, or go on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from glassllama.models.language_model import LanguageModel
from glassllama.train.arithmetic import choose_arithmetic
from glassllama.train.average import Average
from glassllama.train.batches import Batches, require_window
from glassllama.train.build import as_module, make_model, new_model
from glassllama.train.checkpoints import complete_steps, sweep
from glassllama.train.data import Data
from glassllama.train.distributed import ALONE, Team
from glassllama.train.faults import TrainingError
from glassllama.train.optimisers import Optimisers
from glassllama.train.resolve import to_toml
from glassllama.train.run import CHECKPOINTS, Run, resume
from glassllama.train.settings import Settings

LOCK = ".lock"  # keeps other processes out of a run's folder


def prepare(settings: Settings, data: Data, folder: Path, team: Team = ALONE) -> Run:
    """A new run, or this rank's share of it, nothing made yet.

    Raises GlassError: sizes or texts that cannot be.
    """
    team.require_even(settings.data.batch, settings.run.accumulate)
    require_window(data.held_out, settings.data.context)
    model = first_weights(settings, data.tokenizer.vocab_size, team)
    module = as_module(model).train()
    return Run(
        settings=settings,
        folder=folder,
        data=data,
        model=model,
        optimisers=Optimisers(module, settings.optimiser),
        batches=Batches(data.learnt, settings.data.context, settings.data.batch, settings.run.seed),
        average=Average(module, settings.optimiser.ema) if settings.optimiser.ema else None,
        team=team,
    )


def first_weights(settings: Settings, vocab_size: int, team: Team) -> LanguageModel:
    """A new model; of several ranks each never holds more than its share and one tensor."""
    if team.alone:
        model = make_model(settings, vocab_size)
        choose_arithmetic(model, settings.run, settings.model.dropout)
        return model
    from glassllama.train.sharding import shard

    with torch.device("meta"):
        model = new_model(settings, vocab_size)
    choose_arithmetic(model, settings.run, settings.model.dropout)
    shard(model, settings, team)
    return model


def rehearsal(settings: Settings, data: Data, folder: Path, team: Team) -> Run:
    """A run by one rank alone, on its share of a batch: what preflight.py looks at."""
    share = settings.data.batch // team.world
    return prepare(replace(settings, data=replace(settings.data, batch=share)), data, folder)


def occupy(folder: Path) -> FileLock:
    """Make a run's folder and keep other processes out of it, until `release`d or this one ends.

    Raises TrainingError where another process trains there, or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(f"{folder}: another process is training there") from None
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return lock


def folders_to_make(folder: Path) -> list[Path]:
    """This folder and those around it that are not there yet, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_unused(made: list[Path]) -> None:
    """Take a run's new folders away again if the run never began: there is only the lock."""
    for path in made:
        with suppress(OSError):
            if [entry.name for entry in path.iterdir()] == [LOCK]:
                (path / LOCK).unlink()
            path.rmdir()  # refused where anything is in it


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
    if run.team.leads:
        sweep(run.checkpoints)
        (run.folder / "settings.toml").write_text(to_toml(run.settings), encoding="utf-8")
    steps = complete_steps(run.checkpoints)
    if steps:
        resume(run, steps[max(steps)])
    return bool(steps)
