"""The on-disk cache of compiled code: one folder for each version of its sources, with checksums.

Damaged machine code would crash the process or, worse, compute something else, and Numba does not
check it. So a file that is not in the folder's list of checksums, or differs from it, is deleted
before it is read, and compiled again.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from glassllama.base.errors import GlassError, UntrustedError
from glassllama.base.machine import cache_home
from glassllama.base.trust import is_trusted, make_folder, writable_by_others

CHECKSUM_FILE = "checksums.json"
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
MAX_VERSIONS = 3  # the current version of the sources and the latest others
PRIVATE = 0o700
READ_ONLY = "the cache folder is read-only: compiling in memory, at every start"
UNTRUSTED = "compiling in memory, at every start: {}"
NO_SPACE = "the cache folder cannot take compiled code (disk full?): compiled in memory"
DAMAGED = "{} files of compiled code on disk were damaged: compiled again"

notes: list[str] = []  # what went wrong in this process, each once
folders: list[Path] = []  # used by this process
unrecorded: list[Any] = []  # functions written to them since the last checksums


def note(text: str) -> None:
    if text not in notes:
        notes.append(text)


def save_checksums() -> None:
    """Write checksums of what was compiled so far, so that other processes can use it.

    Usually nothing was compiled, and no file is read.
    """
    if unrecorded:
        unrecorded.clear()
        for folder in folders:
            write_checksums(folder)


atexit.register(save_checksums)


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
            delete_old_versions(version.parent)
        if damaged := discard_damaged(folder):
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
    save = function._cache.save_overload

    def save_if_possible(*overload: Any) -> None:
        try:
            save(*overload)
            unrecorded.append(function)
        except OSError:
            note(NO_SPACE)

    function._cache.save_overload = save_if_possible
    return function


def delete_old_versions(parent: Path) -> None:
    """Delete the folders of older versions, but for the latest ones."""
    folders = sorted(parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-MAX_VERSIONS]:
        shutil.rmtree(folder, ignore_errors=True)


# --- checksums ------------------------------------------------------------------------------------


def discard_damaged(folder: Path) -> int:
    """Delete files that differ from the list or that others can write -> how many were listed.

    Raises OSError: then nothing of the folder may be used.
    """
    known, damaged = read_checksums(folder), 0

    def is_listed(name: str, path: Path) -> bool:
        return name in known and known[name][0] == digest(path)

    for name, path in contents(folder):
        try:
            facts = path.lstat()
        except FileNotFoundError:  # went with its folder
            continue
        sound = is_trusted(facts)
        if stat.S_ISDIR(facts.st_mode):
            if not sound:
                shutil.rmtree(path)
        elif not (sound and stat.S_ISREG(facts.st_mode) and is_listed(name, path)):
            path.unlink(missing_ok=True)
            damaged += name in known
    return damaged


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files; no effect if the folder is read-only.

    A file that was not written since it was listed is not read again: if it was damaged meanwhile,
    the damage must not get into the list.
    """
    before, now = read_checksums(folder), {}
    with suppress(OSError):
        for _, path in contents(folder):
            remove_write_permission(path)
        for name, path in files(folder):
            written = path.stat().st_mtime_ns
            same = name in before and before[name][1] == written
            now[name] = before[name] if same else (digest(path), written)
        if now != before:
            part = folder / f"{CHECKSUM_FILE}.{os.getpid()}"
            part.write_text(json.dumps(now))
            remove_write_permission(part)
            os.replace(part, folder / CHECKSUM_FILE)


def remove_write_permission(path: Path) -> None:
    """Remove the permission to write that a permissive umask has given to others."""
    facts = path.lstat()
    if writable_by_others(facts):
        path.chmod(stat.S_IMODE(facts.st_mode) & ~WRITABLE_BY_OTHERS)


def contents(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything in the folder but the checksum files, as (name within the folder, path)."""
    for path in sorted(folder.rglob("*")):
        if not path.name.startswith(CHECKSUM_FILE):
            yield path.relative_to(folder).as_posix(), path


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    return ((name, path) for name, path in contents(folder) if path.is_file())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_checksums(folder: Path) -> dict[str, tuple[str, int]]:
    """File name -> digest and time of writing; empty if there is no readable list."""
    try:
        if not is_trusted((folder / CHECKSUM_FILE).lstat()):
            return {}
        entries = json.loads((folder / CHECKSUM_FILE).read_bytes())
        return {name: (str(digest), int(written)) for name, (digest, written) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
