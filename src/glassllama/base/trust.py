"""Whether a folder of the cache is this user's alone: what others can write to is not used.

Compiled code is executed, packed weights are mapped unseen: who can replace such files can make us
run theirs, or crash. So every folder and link on the way there must belong to this user or to root,
and nobody else may be able to put something in its place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from glassllama.base.errors import UntrustedError

ROOT = 0
MODE = 0o755  # of folders that we make, whatever the umask says
CHECKED = os.name == "posix"  # Windows: folders of a profile are the user's alone as they are made
NOT_OURS = "it is not used; make it yours (chown) or set GLASSLLAMA_HOME to a folder of your own"
HELP = "it is not used; take write permission from others (chmod go-w) or set GLASSLLAMA_HOME"


def require_trusted(folder: Path) -> None:
    """Raise UntrustedError where others can put files into `folder`, or another one in its place.

    The part of its path that does not exist is not looked at: we are going to make it. Raises
    OSError: a part that cannot be examined.
    """
    if not CHECKED:
        return
    try:
        itself = os.stat(folder)  # links that go round in circles are an OSError
    except FileNotFoundError:
        itself = None
    for place in on_the_way(folder):
        try:
            facts = os.lstat(place)
        except FileNotFoundError:
            return
        # With this bit others can make files in it, but not replace or rename what is ours.
        fixed = facts.st_mode & stat.S_ISVTX and not (itself and os.path.samestat(facts, itself))
        if facts.st_uid not in (os.geteuid(), ROOT):
            raise UntrustedError(f"{place} belongs to another user: {NOT_OURS}")
        if not fixed and written_by_others(facts):
            raise UntrustedError(f"others can write to {place}: {HELP}")


def on_the_way(path: Path) -> Iterator[Path]:
    """Every folder and link that is passed on the way to `path`, from the root on."""
    for place in (*reversed(path.parents), path):
        yield place
        if place.is_symlink():
            yield from on_the_way(place.parent / place.readlink())


def is_trusted(facts: os.stat_result) -> bool:
    """Whether a file or folder with these facts is this user's or root's, and nobody else's."""
    ours = not CHECKED or facts.st_uid in (os.geteuid(), ROOT)
    return ours and not written_by_others(facts)


def written_by_others(facts: os.stat_result) -> bool:
    """Whether its permissions let others write; a link has none of its own."""
    if not CHECKED or stat.S_ISLNK(facts.st_mode):
        return False
    by_group = facts.st_mode & stat.S_IWGRP and facts.st_gid != private_group()
    return bool(by_group or facts.st_mode & stat.S_IWOTH)


@lru_cache(maxsize=1)
def private_group() -> int | None:
    """The group of this user's own name that nobody else is in, if there is one.

    Many systems give everyone such a group, with a umask that lets it write.
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


def make_folder(folder: Path, mode: int = MODE) -> None:
    """Make a folder of the cache, and those above it, if they are missing; others cannot write.

    Raises UntrustedError, OSError.
    """
    require_trusted(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(mode=mode if place == folder else MODE, exist_ok=True)
    if missing:  # somebody may have been faster
        require_trusted(folder)
