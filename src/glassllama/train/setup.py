"""From settings to a run that can start or resume; and its folder until the first step.

What a start writes, the text as ids and a vocabulary, goes into a staging folder inside the run's
folder. After the first step it is moved to its places; a start that fails leaves no trace.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from glassllama.base.errors import TrainingError
from glassllama.models.language_model import LanguageModel
from glassllama.nn.init import shapes_only
from glassllama.train.batches import Batches, require_window
from glassllama.train.checkpoint import complete_steps, read_state
from glassllama.train.data import Data
from glassllama.train.distributed import SINGLE_PROCESS, DistContext
from glassllama.train.metrics import read_log
from glassllama.train.model_factory import as_module, init_from, make_model, new_model
from glassllama.train.optimizers import EMA, Optimizers
from glassllama.train.precision import save_compiled_code, set_precision
from glassllama.train.preflight import require_memory_for
from glassllama.train.run import TEXTS, Run, fingerprint, require_same_run
from glassllama.train.settings import Settings, to_toml

LOCK = ".lock"  # keeps other processes out of a run's folder
STAGE = ".start"  # what is written before the first step


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
    module, s = as_module(model).train(), settings.data
    return Run(
        settings=settings,
        folder=folder,
        data=data,
        model=model,
        optimizers=Optimizers(module, settings.optimizer),
        batches=Batches(data.train, s.context, s.batch, settings.run.seed),
        ema=EMA(module, settings.optimizer.ema) if settings.optimizer.ema else None,
        dist=dist,
    )


def first_weights(settings: Settings, vocab_size: int, dist: DistContext) -> LanguageModel:
    """A new model; of several ranks each has only its part and one tensor in memory."""
    if dist.is_single:
        model = make_model(settings, vocab_size)
        set_precision(model, settings.run, settings.model.dropout)
        return model
    from glassllama.train.sharding import shard

    with shapes_only():
        model = new_model(settings, vocab_size)
    set_precision(model, settings.run, settings.model.dropout)
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
    had_lock, stage = (folder / LOCK).exists(), folder / STAGE
    try:
        lock = acquire_lock(folder)
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


def acquire_lock(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(f"{folder}: another process is training there") from None
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return lock


def require_free(folder: Path, settings: Settings, *, resuming: bool) -> None:
    """Raise TrainingError if the folder has a run that is not to be resumed, or another run."""
    steps = complete_steps(folder / "checkpoints")
    if resuming and steps:
        last = steps[max(steps)]
        identity = read_state(last).identity
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
