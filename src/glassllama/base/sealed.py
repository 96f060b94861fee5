"""Telling whether files of a cache are as they were written: a list of their digests beside them.

Machine code that came off the disk damaged would crash the process or, worse, not crash it. A
reader of such files cannot know; so what is not on the list, or not as the list says, is deleted
before anybody reads it, and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SEAL = "sealed.json"


def discard_damaged(folder: Path) -> int:
    """Delete every file that is not as it was sealed -> how many were. Raises OSError."""
    known, damaged = read_seal(folder), 0
    for name, path in files(folder):
        if name not in known or known[name][0] != digest(path):
            path.unlink(missing_ok=True)
            damaged += name in known
    return damaged


def seal(folder: Path) -> None:
    """Note all files as they are now; without an effect where the folder is read-only.

    What was not written since it was sealed is not read again: were it damaged in the meantime,
    the damage would become the rule.
    """
    before, now = read_seal(folder), {}
    with suppress(OSError):
        for name, path in files(folder):
            written = path.stat().st_mtime_ns
            same = name in before and before[name][1] == written
            now[name] = before[name] if same else (digest(path), written)
        if now != before:
            part = folder / f"{SEAL}.{os.getpid()}"
            part.write_text(json.dumps(now))
            os.replace(part, folder / SEAL)


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files but the seals themselves, as name within the folder and path."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(SEAL):
            yield path.relative_to(folder).as_posix(), path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_seal(folder: Path) -> dict[str, tuple[str, int]]:
    """File name -> digest and time of writing; empty where there is no list that can be read."""
    try:
        entries = json.loads((folder / SEAL).read_bytes())
        return {name: (str(digest), int(written)) for name, (digest, written) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
