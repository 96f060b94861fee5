"""The on-disk cache of compiled code: one folder for each version of its sources."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glassllama.base.errors import GlassError, UntrustedError
from glassllama.base.machine import cache_home
from glassllama.base.trust import make_folder
from glassllama.native.jit import checksums

KEPT_VERSIONS = 3  # the current version of the sources and the latest others
PRIVATE = 0o700
READ_ONLY = "the cache folder is read-only: compiling in memory, at every start"
UNTRUSTED = "compiling in memory, at every start: {}"
NO_ROOM = "the cache folder cannot take compiled code (disk full?): compiled in memory"
DAMAGED = "{} files of compiled code on disk were damaged: compiled anew"

notes: list[str] = []  # what went wrong in this process, each once
folders: list[Path] = []  # used by this process
unsealed: list[Any] = []  # functions written to them since the last checksums


def note(text: str) -> None:
    if text not in notes:
        notes.append(text)


def seal() -> None:
    """Write checksums of what was compiled so far, so that other processes can use it.

    Usually nothing was compiled, and no file is read.
    """
    if unsealed:
        unsealed.clear()
        for folder in folders:
            checksums.seal(folder)


atexit.register(seal)


def folder_for(part: str, sources: Iterable[Path], compiler: str) -> Path | None:
    """The cache folder compiled/digest/`part`, for the files `sources` and a compiler's version.

    Damaged files in it are deleted. None, and a note, if the folder cannot be written or others can
    write to it. The digest is of all sources together, because they call each other across files.
    """
    digest = hashlib.sha256(compiler.encode())
    for source in sources:
        digest.update(source.read_bytes())
    try:
        version = cache_home() / "compiled" / digest.hexdigest()[:16]
        folder = version / part
        fresh = not version.is_dir()
        make_folder(version, PRIVATE)
        make_folder(folder, PRIVATE)
        if fresh:
            sweep(version.parent)
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


def best_effort_cache(function: Any) -> Any:
    """Cache a Numba function on disk if possible; if not (disk full), note it and go on."""
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
    """Delete the folders of older versions, but for the latest ones."""
    folders = sorted(parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-KEPT_VERSIONS]:
        shutil.rmtree(folder, ignore_errors=True)
