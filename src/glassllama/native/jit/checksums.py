"""Checksums of cached machine code, in a list beside the files; damaged files are deleted.

Damaged machine code would crash the process or, worse, compute something else, and Numba does not
check it. So a file that is not in the list, or differs from it, is deleted before it is read, and
compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from glassllama.base.trust import is_trusted, writable_by_others

WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
SEAL = "sealed.json"


def discard_damaged(folder: Path) -> int:
    """Delete files that differ from the list or that others can write -> how many were listed.

    Raises OSError: then nothing of the folder may be used.
    """
    known, damaged = read_seal(folder), 0
    for name, path in contents(folder):
        try:
            facts = path.lstat()
        except FileNotFoundError:  # went with its folder
            continue
        sound = is_trusted(facts)
        if stat.S_ISDIR(facts.st_mode):
            if not sound:
                shutil.rmtree(path)
        elif not (sound and stat.S_ISREG(facts.st_mode) and is_as_sealed(path, known.get(name))):
            path.unlink(missing_ok=True)
            damaged += name in known
    return damaged


def is_as_sealed(path: Path, entry: tuple[str, int] | None) -> bool:
    return entry is not None and entry[0] == digest(path)


def seal(folder: Path) -> None:
    """Write the checksums of all files; no effect if the folder is read-only.

    A file that was not written since it was listed is not read again: if it was damaged meanwhile,
    the damage must not get into the list.
    """
    before, now = read_seal(folder), {}
    with suppress(OSError):
        for _, path in contents(folder):
            close_to_others(path)
        for name, path in files(folder):
            written = path.stat().st_mtime_ns
            same = name in before and before[name][1] == written
            now[name] = before[name] if same else (digest(path), written)
        if now != before:
            part = folder / f"{SEAL}.{os.getpid()}"
            part.write_text(json.dumps(now))
            close_to_others(part)
            os.replace(part, folder / SEAL)


def close_to_others(path: Path) -> None:
    """Remove the permission to write that a permissive umask has given to others."""
    facts = path.lstat()
    if writable_by_others(facts):
        path.chmod(stat.S_IMODE(facts.st_mode) & ~WRITTEN_BY_OTHERS)


def contents(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything in the folder but the lists, as (name within the folder, path)."""
    for path in sorted(folder.rglob("*")):
        if not path.name.startswith(SEAL):
            yield path.relative_to(folder).as_posix(), path


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    return ((name, path) for name, path in contents(folder) if path.is_file())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_seal(folder: Path) -> dict[str, tuple[str, int]]:
    """File name -> digest and time of writing; empty if there is no readable list."""
    try:
        if not is_trusted((folder / SEAL).lstat()):
            return {}
        entries = json.loads((folder / SEAL).read_bytes())
        return {name: (str(digest), int(written)) for name, (digest, written) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
