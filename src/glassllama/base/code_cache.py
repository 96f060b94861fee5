"""Where compiled code is kept between two starts: a folder for each state of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glassllama.base.errors import GlassError
from glassllama.base.machine import cache_home

KEPT_VERSIONS = 3  # of a folder of sources: this one and the latest others


def folder_for(name: str, sources: Path, compiler: str) -> Path | None:
    """The folder, under `name`, for what `compiler` (its version) makes of all .py files of
    `sources`; None where nothing can be written.

    Sources that call each other across files are one state: any other text, another folder.
    """
    digest = hashlib.sha256(compiler.encode())
    for source in sorted(sources.rglob("*.py")):
        digest.update(source.read_bytes())
    try:
        folder = cache_home() / name / digest.hexdigest()[:16]
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder.parent)
    except (OSError, GlassError):  # GlassError: no home folder at all
        return None
    return folder if os.access(folder, os.W_OK) else None


def going_on(function: Any, told: Callable[[], None]) -> Any:
    """A function of Numba's that is kept on disk, if it can be: where it cannot, because the disk
    is full, say, `told` is called, and the function stays in memory."""
    keep = function._cache.save_overload

    def keep_if_possible(*overload: Any) -> None:
        try:
            keep(*overload)
        except OSError:
            told()

    function._cache.save_overload = keep_if_possible
    return function


def sweep(parent: Path) -> None:
    """Delete what older sources became, but for the latest: nobody else would."""
    folders = sorted(parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-KEPT_VERSIONS]:
        shutil.rmtree(folder, ignore_errors=True)
