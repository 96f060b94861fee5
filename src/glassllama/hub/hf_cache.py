"""What huggingface_hub's cache holds, read without the network and without asking for it.

The layout is documented (huggingface_hub, "Understand caching"): below `models--org--name`,
`refs/<revision>` names a commit and `snapshots/<commit>/` holds its files, links into `blobs/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glassllama.base.errors import DownloadError
from glassllama.hub.names import HubId
from glassllama.hub.select import (
    CONFIG,
    INDEX,
    LARGEST_INDEX,
    PTH,
    TOKENIZER,
    choose,
    is_gguf,
    missing_from,
)

MAIN = "main"
LONGEST_COMMIT = 100  # bytes; git's have 40 or 64
FOLDER_PREFIX = "models--"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A model found in the cache. `certain`: all that belongs to it is known to be there."""

    path: Path
    files: tuple[Path, ...]
    certain: bool


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_folder(repo: str) -> Path:
    return cache_folder() / (FOLDER_PREFIX + repo.replace("/", "--"))


def files(id: HubId) -> dict[str, Path]:
    """The files present of that revision: name in the repository -> path."""
    folder = repo_folder(id.repo)
    revision = id.revision or MAIN
    ref = folder / "refs" / revision
    commit = _commit(ref) if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    found = (path for path in sorted(snapshot.rglob("*")) if path.is_file())
    return {path.relative_to(snapshot).as_posix(): path for path in found}


def _commit(ref: Path) -> str:
    """The commit that a reference file names. A damaged file gives a name that no folder has."""
    with ref.open("rb") as file:
        return file.read(LONGEST_COMMIT).decode("ascii", "replace").strip()


def find(id: HubId, prefer_pth: bool = False) -> Place | None:
    """The model as the cache holds it, or None where parts are known to be missing."""
    here = files(id)
    try:
        chosen = choose(list(here), id.repo, id.gguf, prefer_pth, index_of(here))
    except (DownloadError, OSError):  # not all of its weights are here
        return None
    if missing_from(chosen) is not None:
        return None
    paths = tuple(here[name] for name in chosen)
    if id.gguf is not None:
        return Place(path=paths[0], files=paths, certain=True)
    if PTH.fullmatch(paths[0].name):  # nothing in the folder tells how many shards there are
        return Place(path=paths[0].parent, files=paths, certain=False)
    tokenizer = any(name in chosen for name in TOKENIZER)
    return Place(path=here[CONFIG].parent, files=paths, certain=tokenizer)


def index_of(here: dict[str, Path]) -> bytes | None:
    """The content of the index among these files, if there is one. Raises OSError."""
    if INDEX not in here:
        return None
    with here[INDEX].open("rb") as file:
        return file.read(LARGEST_INDEX)


def held() -> Iterator[tuple[HubId, Place]]:
    """Every model of the Hub's cache that is whole, GGUF files one by one."""
    for folder in sorted(cache_folder().glob(f"{FOLDER_PREFIX}*")):
        repo = folder.name.removeprefix(FOLDER_PREFIX).replace("--", "/", 1)
        refs = folder / "refs"
        for ref in sorted(path for path in refs.rglob("*") if path.is_file()):
            revision = ref.relative_to(refs).as_posix()
            id = HubId(repo=repo, revision=None if revision == MAIN else revision)
            yield from _held_of(id)


def _held_of(id: HubId) -> Iterator[tuple[HubId, Place]]:
    if (place := find(id)) is not None:
        yield id, place
    seen: set[Path] = set()
    for name in files(id):
        one = HubId(repo=id.repo, revision=id.revision, gguf=name)
        if not is_gguf(name) or (place := find(one)) is None or place.path in seen:
            continue
        seen.add(place.path)
        yield one, place
