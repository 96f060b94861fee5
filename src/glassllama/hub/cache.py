"""Where downloaded models live, who may write there, and what is already there."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from glassllama.base.errors import DownloadError
from glassllama.base.machine import cache_home
from glassllama.hub.names import PackageFile


def place_of(file: PackageFile) -> Path:
    """Where a file out of a package belongs: <home>/models/<short name>/<file>."""
    return cache_home() / "models" / file.short / file.filename


def is_whole(file: PackageFile) -> bool:
    """Whether the cache holds it. Files arrive there only checked, so the size tells."""
    place = place_of(file)
    return place.is_file() and place.stat().st_size == file.bytes


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` alone, making it if need be; a second process waits here for the first."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn the system's refusals to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(folder) from error
        raise DownloadError(
            f"{folder}: cannot write the model cache ({error.strerror or error}); "
            "set GLASSLLAMA_HOME to a folder you can write to"
        ) from error


def disk_full(folder: Path) -> DownloadError:
    return DownloadError(
        f"{folder}: the disk is full; free some space or set GLASSLLAMA_HOME to another disk"
    )
