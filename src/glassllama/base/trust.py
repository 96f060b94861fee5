"""Ownership and permissions of the cache: folders that other users can write to are not used.

Compiled code is executed and packed weights are mapped without checks, so that a user who can
replace these files could run code as this user. Therefore every folder and link of the path must
belong to this user or to root, and other users must not be able to replace it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from glassllama.base.errors import UntrustedError

ROOT = 0
FOLDER_MODE = 0o755  # of new folders; the umask can only remove permissions
IS_POSIX = os.name == "posix"  # on Windows, folders of a profile are private by default
NOT_OURS = "it is not used; make it yours (chown) or set GLASSLLAMA_HOME to a folder of your own"
HELP = "it is not used; take write permission from others (chmod go-w) or set GLASSLLAMA_HOME"


def require_trusted(folder: Path) -> None:
    """Raise UntrustedError if other users can write files into `folder`, or replace it.

    Parts of the path that do not exist are not checked: the caller creates them. Raises OSError: a
    part whose status cannot be read.
    """
    if not IS_POSIX:
        return
    try:
        itself = os.stat(folder)  # a cycle of links raises OSError
    except FileNotFoundError:
        itself = None
    for part in path_components(folder):
        try:
            status = os.lstat(part)
        except FileNotFoundError:
            return
        # The sticky bit: others can create files in it, but not replace or rename our files.
        fixed = status.st_mode & stat.S_ISVTX and not (itself and os.path.samestat(status, itself))
        if status.st_uid not in (os.geteuid(), ROOT):
            raise UntrustedError(f"{part} belongs to another user: {NOT_OURS}")
        if not fixed and writable_by_others(status):
            raise UntrustedError(f"others can write to {part}: {HELP}")


def path_components(path: Path) -> Iterator[Path]:
    """Every folder and link that is traversed to reach `path`, from the root on."""
    for part in (*reversed(path.parents), path):
        yield part
        if part.is_symlink():
            yield from path_components(part.parent / part.readlink())


def is_trusted(status: os.stat_result) -> bool:
    """Whether only this user or root owns and can write a file or folder with this status."""
    ours = not IS_POSIX or status.st_uid in (os.geteuid(), ROOT)
    return ours and not writable_by_others(status)


def writable_by_others(status: os.stat_result) -> bool:
    """Whether other users have write permission; the permissions of a link have no effect."""
    if not IS_POSIX or stat.S_ISLNK(status.st_mode):
        return False
    by_group = status.st_mode & stat.S_IWGRP and status.st_gid != private_group()
    return bool(by_group or status.st_mode & stat.S_IWOTH)


@lru_cache(maxsize=1)
def private_group() -> int | None:
    """The group that has this user's name and no other member, if there is one.

    Many systems create such a group for every user, with a umask that lets the group write.
    """
    import grp
    import pwd

    if os.geteuid() == ROOT:
        return None
    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(user.pw_gid)
    except KeyError:  # a user without an entry
        return None
    alone = group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return user.pw_gid if alone else None


def make_folder(folder: Path, mode: int = FOLDER_MODE) -> None:
    """Create a folder of the cache and its parents if missing, writable by this user only.

    Raises UntrustedError, OSError.
    """
    require_trusted(folder)
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    for part in reversed(missing):
        part.mkdir(mode=mode if part == folder else FOLDER_MODE, exist_ok=True)
    if missing:  # another user may have created one meanwhile
        require_trusted(folder)
