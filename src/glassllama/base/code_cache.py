"""Where compiled code is kept between two starts: a folder for each state of its sources."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from glassllama.base import checksums
from glassllama.base.errors import GlassError, UntrustedError
from glassllama.base.machine import cache_home
from glassllama.base.trust import make_folder

KEPT_VERSIONS = 3  # of a folder of sources: this one and the latest others
PRIVATE = 0o700
READ_ONLY = "the cache folder is read-only: compiling in memory, at every start"
UNTRUSTED = "compiling in memory, at every start: {}"
NO_ROOM = "the cache folder cannot take compiled code (disk full?): compiled in memory"
DAMAGED = "{} files of compiled code on disk were damaged: compiled anew"

notes: list[str] = []  # what went wrong in this process, each once
folders: list[Path] = []  # that this process keeps compiled code in
unsealed: list[Any] = []  # functions written to them since they were sealed


def note(text: str) -> None:
    if text not in notes:
        notes.append(text)


def seal() -> None:
    """What was compiled so far is whole: let other processes use it (base/checksums.py).

    Where nothing was compiled, which is the rule, no file is looked at.
    """
    if unsealed:
        unsealed.clear()
        for folder in folders:
            checksums.seal(folder)


atexit.register(seal)


def folder_for(name: str, sources: Path, compiler: str) -> Path | None:
    """The folder, under `name`, for what `compiler` (its version) makes of all .py files of
    `sources`; damaged files in it are deleted.

    None, and a note why, where nothing can be kept or others can write. Sources that call each
    other across files are one state: any other text, another folder.
    """
    digest = hashlib.sha256(compiler.encode())
    for source in sorted(sources.rglob("*.py")):
        digest.update(source.read_bytes())
    try:
        folder = cache_home() / name / digest.hexdigest()[:16]
        fresh = not folder.is_dir()
        make_folder(folder, PRIVATE)
        if fresh:
            sweep(folder.parent)
        if damaged := checksums.discard_damaged(folder):
            note(DAMAGED.format(damaged))
        if os.access(folder, os.W_OK):
            folders.append(folder)
            return folder
    except UntrustedError as reason:
        note(UNTRUSTED.format(reason))
        return None
    except (OSError, GlassError):  # GlassError: no home folder at all
        pass
    note(READ_ONLY)
    return None


def going_on(function: Any) -> Any:
    """A function of Numba's that is kept on disk, if it can be: where it cannot, because the disk
    is full, say, the function stays in memory, with a note."""
    keep = function._cache.save_overload

    def keep_if_possible(*overload: Any) -> None:
        try:
            keep(*overload)
            unsealed.append(function)
        except OSError:
            note(NO_ROOM)

    function._cache.save_overload = keep_if_possible
    return function


def sweep(parent: Path) -> None:
    """Delete what older sources became, but for the latest: nobody else would."""
    folders = sorted(parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-KEPT_VERSIONS]:
        shutil.rmtree(folder, ignore_errors=True)
