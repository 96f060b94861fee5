"""From the name of a model or dataset to files on this machine, downloaded once.

Models come from the Hugging Face Hub (huggingface.py) or from a Python package (pip_index.py,
which works wherever pip does, without an account), datasets from the web or a package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glassllama.base.interfaces import Progress
from glassllama.hub import huggingface, names
from glassllama.hub.cached_file import fetch_file, is_cached
from glassllama.hub.datasets import DATASETS, fetch_dataset, has_dataset
from glassllama.hub.names import HUB_MODELS, PACKAGE_MODELS, SHORT_NAMES, HubId

__all__ = [
    "DATASETS", "HUB_MODELS", "PACKAGE_MODELS", "SHORT_NAMES", "CachedModel", "cached_models",
    "fetch_dataset", "fetch_llama3_tokenizer", "has_dataset", "resolve",
    "terms_before_download",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A complete model on this machine; `resolve` accepts its name."""

    name: str
    path: Path
    bytes: int


def resolve(
    name: str, *, offline: bool = False, prefer_pth: bool = False, progress: Progress | None = None
) -> Path:
    """The file or folder of the model called `name`, downloaded first if needed.

    `name` is a path that exists, a short name (SHORT_NAMES, in any case), or a Hub id
    `org/name[@revision][:FILE.gguf or quantization]`. From a repository with several formats
    safetensors are taken, with `prefer_pth` Meta's consolidated.*.pth. `offline` never uses the
    network. `progress` counts bytes. Raises DownloadError.
    """
    try:
        path = Path(name).expanduser()
        if name and path.exists():
            return path
    except (OSError, RuntimeError):  # too long for a path, or the home of an unknown user
        pass
    name = names.short_name(name) or name
    if name in PACKAGE_MODELS:
        return fetch_file(PACKAGE_MODELS[name], offline=offline, progress=progress)
    if name in HUB_MODELS:
        id = HubId(repo=HUB_MODELS[name].repo)
    else:
        parsed = names.parse_hub_id(name)
        if parsed is None or (parsed.gguf is None and names.looks_like_path(name)):
            raise names.unknown_name(name)
        id = parsed
        if names.is_mistyped_path(name) and huggingface.find_cached(id, prefer_pth) is None:
            raise names.unknown_name(name)
    return huggingface.fetch_hub_model(
        id, offline=offline, prefer_pth=prefer_pth, progress=progress
    )


def terms_before_download(name: str) -> str | None:
    """The terms of use of a model that is not in the cache; None if it is, or has none."""
    file = PACKAGE_MODELS.get(names.short_name(name) or "")
    return None if file is None or is_cached(file) else file.terms or None


def cached_models() -> list[CachedModel]:
    """Every model that can be used without a download, from packages and in the Hub's cache."""
    models = [
        CachedModel(name=name, path=file.location, bytes=file.bytes)
        for name, file in PACKAGE_MODELS.items()
        if is_cached(file)
    ]
    short = {model.repo: name for name, model in HUB_MODELS.items()}
    for id, entry in huggingface.cached_models():
        size = sum(path.stat().st_size for path in entry.files)
        models.append(CachedModel(name=short.get(str(id), str(id)), path=entry.path, bytes=size))
    return models


def fetch_llama3_tokenizer(*, offline: bool = False, progress: Progress | None = None) -> Path:
    """Meta's Llama 3 `tokenizer.model` (128,000 ranks), from the wheel llama-models.

    It is under the Llama 3 Community License, therefore downloaded and not part of this package.
    """
    return fetch_file(names.LLAMA3_TOKENIZER, offline=offline, progress=progress)
