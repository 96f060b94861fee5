"""Models of the Hugging Face Hub, downloaded by huggingface_hub into its own cache.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE have their usual meaning, and a model that another
program has downloaded is not downloaded again.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from glassllama.base.errors import DownloadError, GlassError, join_names, named, quoted
from glassllama.base.fields import relative_path
from glassllama.base.interfaces import Progress
from glassllama.hub.cached_file import require_space, write_error
from glassllama.hub.names import HUB_MODELS, MAIN, HubId
from glassllama.hub.pip_index import sha256_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # each is enough
SMALL = (
    *(CONFIG, "generation_config.json", *TOKENIZER, "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/default.jinja",
)
MAX_INDEX_BYTES = 100_000_000
PTH = re.compile(r"(.*/)?consolidated\.\d+\.pth", re.IGNORECASE)
GGUF_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
HUB = "https://huggingface.co"
FOLDER_PREFIX = "models--"  # of repositories in the cache
MAX_COMMIT_BYTES = 100  # git's commits have 40 or 64
UNAUTHORIZED = 401  # the Hub's answer for a repository that this user cannot see


# --- which files of a repository are the model ----------------------------------------------


def choose(names: list[str], id: HubId, prefer_pth: bool, index: bytes | None) -> list[str]:
    """The files of one model in a repository (or cache) that lists `names`, the weights first.

    `index` is the content of INDEX, if the repository has one. Raises DownloadError: no supported
    model, or one with missing files.
    """
    if id.gguf is not None:
        chosen = choose_gguf(names, id)
        parts = [match for name in chosen if (match := GGUF_PART.search(name))]
        total = max((int(part[2]) for part in parts), default=0)
        lacking = {*range(1, 1 + total)} - {int(part[1]) for part in parts}
        missing = f"part {min(lacking)} of {total}" if lacking else None
    else:
        safetensors = [] if prefer_pth else choose_safetensors(names, id, index)
        chosen = safetensors or choose_pth(names)
        missing = CONFIG if safetensors and CONFIG not in safetensors else None
    if not chosen:
        expected = "" if prefer_pth else f"{SINGLE}, {INDEX} or "
        ggufs = [name for name in names if is_gguf(name)]
        hint = f"; name one of its GGUF files, as in {id}:{named(ggufs[0])}" if ggufs else ""
        raise DownloadError(
            f"{id}: expected {expected}consolidated.*.pth with params.json, found "
            f"{join_names(names) or 'no files'}{hint}"
        )
    if missing is not None:
        raise DownloadError(
            f"{id}: incomplete model: {missing} is missing; found {join_names(names)}"
        )
    return chosen


def choose_safetensors(names: list[str], id: HubId, index: bytes | None) -> list[str]:
    """Weights as safetensors at the top of the repository, with config and tokenizer files.

    With an index, the weights are the files that it names; but model.safetensors is the model if
    the index does not name it, as in weights/model_files.py. Raises DownloadError: an index
    that cannot be read, or names a file that is not there.
    """
    weights = [SINGLE] if SINGLE in names else []
    shards = set() if index is None else read_shards(index, id)
    if shards and (not weights or SINGLE in shards):
        if missing := sorted(shards.difference(names)):
            raise DownloadError(
                f"{id}: {INDEX} names {quoted(missing[0])}, which is not there "
                f"({len(missing)} of {len(shards)} files missing)"
            )
        weights = [INDEX, *sorted(shards)]
    return weights + [name for name in SMALL if name in names] if weights else []


def read_shards(index: bytes, id: HubId) -> set[str]:
    """The files that an index names. Raises DownloadError: not an index, or they lead outside."""
    try:
        shards = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shards = set()
    if not shards:
        raise DownloadError(f"{id}: {INDEX}: expected a weight_map, tensor names to file names")
    paths = {name: relative_path(name) for name in shards}
    for name in (name for name, path in paths.items() if path is None):
        raise DownloadError(f"{id}: {INDEX} names {quoted(name)}: no file inside the repository")
    return {*filter(None, paths.values())}


def choose_pth(names: list[str]) -> list[str]:
    """Meta's format: `consolidated.NN.pth` with `params.json` in the same folder, any folder."""
    for folder in sorted({PurePosixPath(name).parent for name in names if PTH.fullmatch(name)}):
        files = sorted(name for name in names if PurePosixPath(name).parent == folder)
        extras = [n for n in files if PurePosixPath(n).name in ("params.json", "tokenizer.model")]
        if str(folder / "params.json") in extras:
            return [name for name in files if PTH.fullmatch(name)] + extras
    return []


def choose_gguf(names: list[str], id: HubId) -> list[str]:
    """The GGUF file that `id.gguf` means (a file name or a quantization), with all its parts."""
    gguf = id.gguf or ""
    ggufs = sorted(filter(is_gguf, names))
    found = [name for name in ggufs if gguf in (name, PurePosixPath(name).name)] or [
        name
        for name in ggufs
        if re.search(rf"(^|[-._/]){re.escape(gguf)}(?=[-.])", name, re.IGNORECASE)
    ]
    models = {GGUF_PART.sub("", name) for name in found}
    if len(models) != 1:
        came = f"{len(models)} files match" if models else "no file matches"
        there = f"expected one of {join_names(found or ggufs)}" if ggufs else "it has no GGUF files"
        raise DownloadError(f"{id}: {came}; {there}")
    return [name for name in ggufs if GGUF_PART.sub("", name) in models]


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


# --- the cache ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """A model in the cache. `complete`: it is certain that no file is missing."""

    path: Path
    files: tuple[Path, ...]
    complete: bool


def find_cached(id: HubId, prefer_pth: bool = False) -> CacheEntry | None:
    """The model in the cache, or None if files are missing."""
    files = snapshot_files(id)
    try:
        chosen = choose([*files], id, prefer_pth, read_index(files))
    except (DownloadError, OSError):
        return None
    paths = tuple(files[name] for name in chosen)
    if id.gguf is not None:
        return CacheEntry(path=paths[0], files=paths, complete=True)
    if PTH.fullmatch(chosen[0]):  # nothing in the folder says how many shards there are
        return CacheEntry(path=paths[0].parent, files=paths, complete=False)
    complete = any(name in chosen for name in TOKENIZER)
    return CacheEntry(path=files[CONFIG].parent, files=paths, complete=complete)


def snapshot_files(id: HubId) -> dict[str, Path]:
    """The cached files of a revision: name in the repository -> path.

    Read without huggingface_hub's functions: importing them takes half a second, which every start
    with a cached model would pay. The layout is documented ("Understand caching"): below
    `models--org--name`, `refs/<revision>` has a commit, `snapshots/<commit>/` links to its files.
    """
    folder = _repo_folder(id)
    commit = id.revision or MAIN
    if (ref := folder / "refs" / commit).is_file():
        commit = ref.read_bytes()[:MAX_COMMIT_BYTES].decode("ascii", "replace").strip()
    snapshot = folder / "snapshots" / commit
    files = (path for path in sorted(snapshot.rglob("*")) if path.is_file())
    return {path.relative_to(snapshot).as_posix(): path for path in files}


def _repo_folder(id: HubId) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, FOLDER_PREFIX + id.repo.replace("/", "--"))


def read_index(files: dict[str, Path]) -> bytes | None:
    """The content of the index among these files, if there is one. Raises OSError."""
    if INDEX not in files:
        return None
    with files[INDEX].open("rb") as file:
        return file.read(MAX_INDEX_BYTES)


def cached_models() -> Iterator[tuple[HubId, CacheEntry]]:
    """Every model in the cache that has all its files, GGUF files one by one.

    (huggingface_hub's scan_cache_dir leaves out a repository in which one link is broken.)
    """
    from huggingface_hub import constants

    for folder in sorted(Path(constants.HF_HUB_CACHE).glob(f"{FOLDER_PREFIX}*")):
        repo = folder.name.removeprefix(FOLDER_PREFIX).replace("--", "/", 1)
        for ref in sorted(path for path in (folder / "refs").rglob("*") if path.is_file()):
            name = ref.relative_to(folder / "refs").as_posix()
            revision = None if name == MAIN else name
            ggufs = filter(is_gguf, snapshot_files(HubId(repo=repo, revision=revision)))
            found: set[Path] = set()
            for gguf in (None, *ggufs):
                id = HubId(repo=repo, revision=revision, gguf=gguf)
                entry = find_cached(id)
                if entry is not None and entry.path not in found:  # parts of one GGUF file
                    found.add(entry.path)
                    yield id, entry


# --- downloads ------------------------------------------------------------------------------


def fetch_hub_model(
    id: HubId, *, offline: bool = False, prefer_pth: bool = False, progress: Progress | None = None
) -> Path:
    """The model's folder in the Hub's cache (or its GGUF file), downloaded first if needed.

    A complete model in the cache is used without asking the Hub. `progress` counts bytes. Raises
    DownloadError.
    """
    from huggingface_hub import constants

    entry = find_cached(id, prefer_pth)
    offline = offline or constants.HF_HUB_OFFLINE
    if entry is not None and (offline or entry.complete):
        return entry.path
    if offline:
        raise DownloadError(
            f"{id}: missing or incomplete in the Hugging Face cache ({constants.HF_HUB_CACHE}) and "
            "offline; download it once while online"
        )
    from huggingface_hub import HfApi

    with _explained(id):
        info = HfApi().model_info(id.repo, revision=id.revision, files_metadata=True)
    files = {f.rfilename: f for f in info.siblings or [] if relative_path(f.rfilename) is not None}
    index = files.get(INDEX)
    if index and id.gguf is None and not prefer_pth and (index.size or 0) <= MAX_INDEX_BYTES:
        _download(id, [index], None)  # it names the weights
    chosen = choose([*files], id, prefer_pth, read_index(snapshot_files(id)))
    _download(id, [files[name] for name in chosen], progress)
    if (entry := find_cached(id, prefer_pth)) is None:
        raise DownloadError(f"{id}: changed on the Hub while it was downloaded; try again")
    return entry.path


def _download(id: HubId, files: list[RepoSibling], progress: Progress | None) -> None:
    """Download files one by one, in this thread.

    (Ctrl-C would not stop the threads of snapshot_download before their files are complete.)
    """
    from huggingface_hub import hf_hub_download

    cached = snapshot_files(id)
    new = [file for file in files if file.rfilename not in cached]
    total = sum(file.size or 0 for file in new)
    require_space(str(id), total, _repo_folder(id), "HF_HOME")
    bar = _progress_bar(progress, total)
    with _explained(id):
        for file in files:
            name = file.rfilename
            path = hf_hub_download(id.repo, name, revision=id.revision, tqdm_class=bar)
            if file in new:
                _verify(id, file, Path(path))
    if progress is not None:
        progress(total, total)


def _verify(id: HubId, file: RepoSibling, path: Path) -> None:
    """Compare the checksum of a downloaded file; delete it if it is wrong.

    huggingface_hub compares sizes only. The Hub has checksums of large files (LFS).
    """
    expected = file.lfs.sha256 if file.lfs is not None else None
    if expected is not None and (found := sha256_of(path)) != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{id}: sha256 of {file.rfilename} is {found}, the Hub says {expected}: damaged on the "
            "way; it was deleted, try again"
        )


def _progress_bar(progress: Progress | None, total: int) -> Any:
    """A class for huggingface_hub's progress: shows nothing, passes the bytes on to `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    done = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            # Xet storage has a second bar for bytes on the network, beside those on the disk.
            self.counts = not str(kwargs.get("name")).endswith(".transfer")
            self.update(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if self.counts and progress is not None:
                done += int(n or 0)
                progress(min(done, total), total)

    return Bar


@contextmanager
def _explained(id: HubId) -> Iterator[None]:
    """Without huggingface_hub's log, and every exception as one line that says what to do.

    Any Exception is caught: which ones arrive depends on its version and its HTTP library.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except GlassError:
        raise
    except Exception as error:
        raise DownloadError(f"{id}: {_reason(id, error)}") from error
    finally:
        logger.setLevel(level)


def _reason(id: HubId, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        licenses = [model.license for model in HUB_MODELS.values() if model.repo == id.repo]
        license = f" ({licenses[0]})" if licenses else ""
        return (
            f"gated: accept its license{license} at {HUB}/{id.repo}, then log in with "
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
    if isinstance(error, PermissionError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    ):
        return write_error(error, Path(constants.HF_HUB_CACHE), "HF_HOME")
    return (
        f"no file or folder here, and could not be fetched from {constants.ENDPOINT} "
        f"({_first_line(error)}); check the network and try again: complete files are kept"
    )


def _first_line(error: Exception) -> str:
    """The class of an error and its first line, cut at 200 characters, printable."""
    words = str(error).strip().splitlines() or [""]
    shown = "".join(character if character.isprintable() else "?" for character in words[0])
    return f"{type(error).__name__}: {shorten(shown, 200, placeholder=' …')}".removesuffix(": ")
