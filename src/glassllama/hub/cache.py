"""Where downloaded models live, who may write there, and what is already there."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from glassllama.base.errors import DownloadError, UntrustedError
from glassllama.base.machine import cache_home
from glassllama.base.trust import is_trusted, make_folder, require_trusted
from glassllama.hub.names import PackageFile


def place_of(file: PackageFile) -> Path:
    """Where a file out of a package belongs: <home>/models/<short name>/<file>."""
    return cache_home() / "models" / file.short / file.filename


def is_whole(file: PackageFile) -> bool:
    """Whether the cache holds it."""
    return is_known(place_of(file), file.bytes, file.sha256)


def is_known(place: Path, bytes: int, sha256: str) -> bool:
    """Whether that file is there. Files arrive in the cache only checked, so the size tells.

    Where others can write, its checksum is compared at every use: it is data, and may be read.
    """
    try:
        if not place.is_file() or place.stat().st_size != bytes:
            return False
        require_trusted(place.parent)
        if is_trusted(place.stat()):
            return True
    except UntrustedError:
        pass
    except OSError:
        return False
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` alone, making it if need be; a second process waits here for the first.

    Raises UntrustedError, DownloadError.
    """
    with explained(folder):
        make_folder(folder)
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
