"""From a name to files on this machine: fetch a model once, find it again ever after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glassllama.base.interfaces import Progress
from glassllama.hub import hf_cache
from glassllama.hub.cache import is_whole, place_of
from glassllama.hub.datasets import TEXTS, fetch_text, has_text, keep_text, place_of_text
from glassllama.hub.huggingface import fetch_hub_model
from glassllama.hub.names import (
    HUB_MODELS,
    LLAMA3_TOKENIZER,
    PACKAGE_MODELS,
    SHORT_NAMES,
    HubId,
    HubModel,
    PackageFile,
    is_mistyped_path,
    looks_like_path,
    parse_hub_id,
    short_name,
    unknown_name,
)
from glassllama.hub.package import fetch_package_file

__all__ = [
    "HUB_MODELS",
    "PACKAGE_MODELS",
    "SHORT_NAMES",
    "TEXTS",
    "CachedModel",
    "HubModel",
    "PackageFile",
    "cached",
    "fetch_llama3_tokenizer",
    "fetch_text",
    "has_text",
    "keep_text",
    "place_of_text",
    "resolve",
]


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model that is whole on this machine, by the name that `resolve` understands."""

    name: str
    path: Path
    bytes: int


def resolve(
    name: str,
    *,
    offline: bool = False,
    prefer_pth: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The file or folder that holds the model called `name`, downloaded first if need be.

    `name` is a path that exists, a short name (SHORT_NAMES, however written), or a Hub id
    `org/name[@revision][:FILE.gguf or quantisation]`. Where a repository holds both, safetensors
    are taken, with `prefer_pth` Meta's consolidated.*.pth. `offline` never touches the network.
    Progress is told in bytes. Raises DownloadError.
    """
    path = _existing_path(name)
    if path is not None:
        return path
    name = short_name(name) or name
    if name in PACKAGE_MODELS:
        return fetch_package_file(PACKAGE_MODELS[name], offline=offline, progress=progress)
    id = HubId(repo=HUB_MODELS[name].repo) if name in HUB_MODELS else parse_hub_id(name)
    if id is None or (id.gguf is None and looks_like_path(name)):
        raise unknown_name(name)
    if name not in HUB_MODELS and is_mistyped_path(name) and hf_cache.find(id, prefer_pth) is None:
        raise unknown_name(name)
    return fetch_hub_model(id, offline=offline, prefer_pth=prefer_pth, progress=progress)


def _existing_path(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, or the home of an unknown user
        return None


def cached() -> list[CachedModel]:
    """Every model that can be used without a download: ours, and the Hub's cache."""
    models = [
        CachedModel(name=name, path=place_of(file), bytes=file.bytes)
        for name, file in PACKAGE_MODELS.items()
        if is_whole(file)
    ]
    short = {model.repo: name for name, model in HUB_MODELS.items()}
    for id, place in hf_cache.held():
        size = sum(path.stat().st_size for path in place.files)
        models.append(CachedModel(name=short.get(str(id), str(id)), path=place.path, bytes=size))
    return models


def fetch_llama3_tokenizer(*, offline: bool = False, progress: Progress | None = None) -> Path:
    """Meta's Llama 3 `tokenizer.model` (128,000 ranks), from the wheel llama-models.

    It is under the Llama 3 Community License, which is why it is fetched and not shipped.
    """
    return fetch_package_file(LLAMA3_TOKENIZER, offline=offline, progress=progress)
