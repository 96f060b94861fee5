"""A run's folder until its first step: it stays as it was, so a start that fails leaves no trace.

What a start writes, the text as ids and a vocabulary, goes into a stage inside the folder. When the
first step has been made it is moved to its places; where there is no first step it is removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from glassllama.base.errors import MissingExtraError
from glassllama.native.jit import code_cache
from glassllama.train.checkpoints import complete_steps
from glassllama.train.faults import TrainingError
from glassllama.train.metrics import Journal, Record, read_records
from glassllama.train.resolve import to_toml
from glassllama.train.run import CHECKPOINTS, Run, require_same_settings
from glassllama.train.settings import Settings

LOCK = ".lock"  # keeps other processes out of a run's folder
STAGE = ".start"  # in it: what is written before the first step


@contextmanager
def occupy(folder: Path) -> Iterator[Path]:
    """Keep other processes out of a run's folder, made if need be -> its stage, empty.

    At the end the folder is what it was, missing or not, unless `settle` was called. Raises
    TrainingError where another process trains there, or nothing can be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    had_lock, stage = (folder / LOCK).exists(), folder / STAGE
    try:
        lock = locked(folder)
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
        for path in made:
            with suppress(OSError):
                path.rmdir()  # refused where anything is in it


def locked(folder: Path) -> FileLock:
    """The lock of a run's folder, taken; both are made if need be."""
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
    """Raise TrainingError where the folder holds a run that nobody asked to go on with.

    Or one that somebody did, but with other settings.
    """
    steps = complete_steps(folder / CHECKPOINTS)
    if resuming and steps:
        require_same_settings(steps[max(steps)], settings)
        read_records(folder)  # the log goes on, so it must be one
    if not resuming and (steps or (folder / "log.jsonl").exists()):
        raise TrainingError(
            f"{folder}: holds a run already; go on with it by --resume auto (longer, with a larger "
            "schedule.steps), or begin another with --out FOLDER"
        )


class FirstStep:
    """The journal of a run (train/loop.py's Book), opened, and all settled, at the first step.

    Raises MissingExtraError where TensorBoard's files are wanted and it is not installed.
    """

    def __init__(self, run: Run) -> None:
        if run.settings.run.tensorboard and find_spec("tensorboard") is None:
            raise MissingExtraError("run.tensorboard", "train")
        self._run, self._done = run, run.progress.step
        self._journal: Journal | None = None

    def write(self, record: Record) -> None:
        if self._journal is None:
            settle(self._run)
            code_cache.save_checksums()  # all kernels are compiled now
            board = self._run.settings.run.tensorboard
            self._journal = Journal(self._run.folder, self._done, tensorboard=board)
        self._journal.write(record)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def settle(run: Run) -> None:
    """Move what was staged to its places in the run's folder, and write settings.toml there."""
    stage, vocabulary = run.folder / STAGE, run.data.vocabulary
    (stage / "settings.toml").write_text(to_toml(run.settings), encoding="utf-8")
    for file in sorted(stage.rglob("*")):
        if file.is_file():
            move(file, run.folder / file.relative_to(stage))
    if vocabulary is not None and vocabulary.is_relative_to(stage):
        run.data = replace(run.data, vocabulary=run.folder / vocabulary.relative_to(stage))
    shutil.rmtree(stage, ignore_errors=True)


def move(file: Path, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    try:
        os.replace(file, place)
    except PermissionError:  # Windows moves no file that is in use
        shutil.copyfile(file, place)
