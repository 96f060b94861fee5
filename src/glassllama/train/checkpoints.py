"""Checkpoint folders on disk: there whole or not at all, whatever stops the writer.

    RUN/checkpoints/step-000500/    model.safetensors config.json … as `load` reads them,
                                    training.safetensors, state.json
    RUN/model.safetensors …         links to the files of the best checkpoint

A folder is written under a name that begins with a dot, forced to disk, and renamed; it is removed
the other way round. So a name without a dot is a complete checkpoint, and every name with one is an
orphan of a run that was stopped, swept before the next.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from glassllama.train.faults import TrainingError

COMPLETE = re.compile(r"step-(\d{6,})")
ORPHAN = ".unfinished-"
OWN_FILES = ("training.safetensors", "training", "state.json")  # the rest is the model's


def write_checkpoint(home: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a new folder, then give it the name of this step, atomically.

    Raises TrainingError where the disk is full or the folder cannot be written; what was complete
    stays.
    """
    final, new = home / f"step-{step:06d}", unfinished(home, step)
    try:
        home.mkdir(parents=True, exist_ok=True)
        remove(new)
        new.mkdir()
        write(new)
        for file in new.rglob("*"):
            force_to_disk(file)
        force_to_disk(new)
        remove(final)
        new.rename(final)
        force_to_disk(home)
    except OSError as error:
        raise TrainingError(
            f"{final}: cannot be saved ({error.strerror or error}); earlier checkpoints are intact"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return final


def unfinished(home: Path, step: int) -> Path:
    """Where the checkpoint of that step is while it is being written."""
    return home / f"{ORPHAN}step-{step:06d}"


def remove(folder: Path) -> None:
    """Make a folder an orphan first, so that half of it is never taken for all of it."""
    if not folder.exists():
        return
    orphan = folder.with_name(f"{ORPHAN}old-{folder.name.removeprefix(ORPHAN)}")
    shutil.rmtree(orphan, ignore_errors=True)
    folder.rename(orphan)
    shutil.rmtree(orphan)


def force_to_disk(path: Path) -> None:
    """Wait until the file, or the folder's list of names, would survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete_steps(home: Path) -> dict[int, Path]:
    """The complete checkpoints by step, in order."""
    if not home.is_dir():
        return {}
    found = ((COMPLETE.fullmatch(folder.name), folder) for folder in home.iterdir())
    return dict(sorted((int(match[1]), folder) for match, folder in found if match))


def sweep(home: Path) -> list[str]:
    """Remove what stopped runs left half done; their names."""
    orphans = sorted(home.glob(f"{ORPHAN}*")) if home.is_dir() else []
    for orphan in orphans:
        shutil.rmtree(orphan)
    return [orphan.name for orphan in orphans]


def prune(home: Path, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` checkpoints and the best one."""
    steps = complete_steps(home)
    for step in list(steps)[:-keep]:
        if step != best:
            remove(steps[step])


def publish(checkpoint: Path, folder: Path) -> None:
    """Let the run's own folder hold this checkpoint's model, file by file, each at once."""
    files = [file for file in checkpoint.iterdir() if file.name not in OWN_FILES]
    for file in sorted(files, key=lambda file: file.name == "config.json"):  # makes it a model
        partial = folder / f".{file.name}"
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:  # a file system without links
            shutil.copyfile(file, partial)
        os.replace(partial, folder / file.name)
