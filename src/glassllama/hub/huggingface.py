"""Models of the Hugging Face Hub, through huggingface_hub and into its own cache.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere; a model another
program has fetched is not fetched again.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from glassllama.base.errors import DownloadError, quoted
from glassllama.base.fields import inside
from glassllama.base.interfaces import Progress
from glassllama.hub import hf_cache
from glassllama.hub.names import HUB_MODELS, HubId
from glassllama.hub.progress import file_sizes, watching
from glassllama.hub.select import INDEX, LARGEST_INDEX, choose, listed, missing_from

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

HUB = "https://huggingface.co"
UNAUTHORIZED = 401  # what the Hub answers for a repository that this user cannot see


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file as the Hub lists it; the checksum is known for large files only."""

    name: str
    bytes: int
    sha256: str | None


def fetch_hub_model(
    id: HubId, *, offline: bool = False, prefer_pth: bool = False, progress: Progress | None = None
) -> Path:
    """The model's folder in the Hub's cache (or its GGUF file), downloaded first if need be.

    What the cache holds whole is used without asking the Hub again. Progress is told in bytes.
    Raises DownloadError.
    """
    from huggingface_hub import constants

    place = hf_cache.find(id, prefer_pth)
    offline = offline or constants.HF_HUB_OFFLINE
    if place is not None and (offline or place.certain):
        return place.path
    if offline:
        raise DownloadError(
            f"{id}: not whole in the Hub's cache ({constants.HF_HUB_CACHE}) and offline; "
            "download it once while online"
        )
    with _explained(id):
        files = _listing(id)
    index = [file for file in files if file.name == INDEX and file.bytes <= LARGEST_INDEX]
    if index and id.gguf is None and not prefer_pth:  # it names the weights
        _download(id, index, None)
    names = [file.name for file in files]
    chosen = choose(names, id.repo, id.gguf, prefer_pth, hf_cache.index_of(hf_cache.files(id)))
    if (lacking := missing_from(chosen)) is not None:
        raise DownloadError(f"{id}: no whole model: {lacking} is not there; found {listed(names)}")
    _download(id, [file for file in files if file.name in chosen], progress)
    place = hf_cache.find(id, prefer_pth)
    if place is None:
        raise DownloadError(f"{id}: changed on the Hub while it was downloaded; try again")
    return place.path


def _listing(id: HubId) -> list[RemoteFile]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(id.repo, revision=id.revision, files_metadata=True)
    files = [_remote_file(sibling) for sibling in info.siblings or []]
    return [file for file in files if inside(file.name) is not None]


def _remote_file(sibling: RepoSibling) -> RemoteFile:
    checksum = sibling.lfs.sha256 if sibling.lfs is not None else None
    return RemoteFile(name=sibling.rfilename, bytes=sibling.size or 0, sha256=checksum)


def _download(id: HubId, files: list[RemoteFile], progress: Progress | None) -> None:
    from huggingface_hub import hf_hub_download

    folder = hf_cache.repo_folder(id.repo)
    here = hf_cache.files(id)
    new = [file for file in files if file.name not in here]
    total = sum(file.bytes for file in new)
    _require_space(id, total, folder)
    before = sum(file_sizes(folder / "blobs"))
    with (
        watching(lambda: sum(file_sizes(folder / "blobs")) - before, total, progress),
        _explained(id),
        _quiet(),
    ):
        for file in files:  # one by one in this thread, so that Ctrl-C stops at once
            hf_hub_download(id.repo, file.name, revision=id.revision)
    here = hf_cache.files(id)
    for file in new:
        if file.name in here:
            _check(id, file, here[file.name])


def _check(id: HubId, file: RemoteFile, path: Path) -> None:
    """Compare the checksum of a file that has just arrived; what is wrong does not stay."""
    if file.sha256 is None:
        return
    with path.open("rb") as stream:
        came = hashlib.file_digest(stream, "sha256").hexdigest()
    if came != file.sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{id}: sha256 of {file.name} is {came}, the Hub says {file.sha256}: damaged on the "
            "way; it was deleted, try again"
        )


def _require_space(id: HubId, needed: int, folder: Path) -> None:
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DownloadError(
            f"{id}: needs {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free; free some "
            "or set HF_HOME to a folder on another disk"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without huggingface_hub's bars and retry messages: the caller shows progress and errors."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    ours = constants.HF_HUB_DISABLE_PROGRESS_BARS is None  # else the user has decided
    if ours:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if ours:
            enable_progress_bars()


@contextmanager
def _explained(id: HubId) -> Iterator[None]:
    """Whatever goes wrong inside huggingface_hub becomes one line that says what to do.

    Any Exception is caught: which ones arrive depends on its version and its HTTP library.
    """
    try:
        yield
    except Exception as error:
        raise DownloadError(f"{id}: {_reason(id, error)}") from error


def _reason(id: HubId, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        licences = [model.licence for model in HUB_MODELS.values() if model.repo == id.repo]
        licence = f" ({licences[0]})" if licences else ""
        return (
            f"gated: accept its licence{licence} at {HUB}/{id.repo}, then log in with "
            "'hf auth login' or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{id.repo} has no revision {quoted(id.revision)}; see {HUB}/{id.repo}/commits"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status == UNAUTHORIZED:
        return (
            f"neither a file or folder here nor a repository at {constants.ENDPOINT}; check the "
            "spelling, or set HF_TOKEN to a valid token if it is private"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub refused ({_first_line(error)}); try again later, or check HF_TOKEN"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or set HF_HOME to a folder on another disk"
    if isinstance(error, PermissionError):
        return (
            f"cannot write the Hub's cache {constants.HF_HUB_CACHE} ({error.strerror}); set "
            "HF_HOME to a folder you can write to"
        )
    return (
        f"no file or folder here, and could not be fetched from {constants.ENDPOINT} "
        f"({_first_line(error)}); check the network and try again: files that are whole are kept"
    )


def _first_line(error: Exception) -> str:
    """The class of an error and its first line, cut at 200 characters, printable."""
    words = str(error).strip().splitlines() or [""]
    shown = "".join(character if character.isprintable() else "?" for character in words[0])
    return f"{type(error).__name__}: {shorten(shown, 200, placeholder=' …')}".removesuffix(": ")
