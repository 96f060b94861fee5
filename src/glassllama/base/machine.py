"""What this machine can spare: memory, cores, and a place on disk for what is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from glassllama.base.errors import DownloadError, MemoryShortError, quoted

# Linux: the ceiling a container sets, version 2 and version 1 of control groups.
CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_memory() -> int | None:
    """Bytes that can be taken now without swapping; None where the system does not say."""
    free = _system_memory()
    if (left := address_space_left()) is not None:
        free = left if free is None else min(free, left)
    for limit, used in CGROUP_LIMITS:
        try:
            room = int(limit.read_text()) - int(used.read_text())
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
        free = room if free is None else min(free, room)
    return free


def _system_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None  # Windows, and sandboxes without /proc


def address_space_left() -> int | None:
    """Bytes that may still be mapped under `ulimit -v`; None where there is no limit."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, ValueError):  # Windows, and systems without /proc
        return None
    return max(0, limit - pages * resource.getpagesize())


def usable_cores() -> int:
    """Cores this process may run on, affinity honoured."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gigabytes(count: float) -> str:
    """12_345_678_901 -> "12.35 GB": memory as people read it."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def require_memory(needed: int, *, what: str, instead: str) -> None:
    """Raise MemoryShortError, before anything is allocated, if `needed` bytes are not there."""
    free = available_memory()
    if free is not None and needed > free:
        raise MemoryShortError(
            f"{what} needs {gigabytes(needed)} of memory, {gigabytes(free)} are free; {instead}"
        )


def cache_home() -> Path:
    """GLASSLLAMA_HOME, else XDG_CACHE_HOME/glassllama, else the platform's place for caches.

    Raises DownloadError: the folder cannot be determined, such as the home of an unknown user.
    """
    if (home := _named_by("GLASSLLAMA_HOME")) is not None:
        return home
    if (xdg := _named_by("XDG_CACHE_HOME")) is not None:
        return xdg / "glassllama"
    if sys.platform == "darwin":
        return _user_home() / "Library" / "Caches" / "glassllama"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        base = Path(local) if local else _user_home() / "AppData" / "Local"
        return base / "glassllama"
    return _user_home() / ".cache" / "glassllama"


def _named_by(variable: str) -> Path | None:
    """The folder that an environment variable names; None where it is unset or empty."""
    name = os.environ.get(variable)
    try:
        return Path(name).expanduser().absolute() if name else None
    except RuntimeError:
        reason = "no user of that name has a home folder"
    except OSError:
        reason = "the folder that it is relative to is gone"
    raise DownloadError(
        f"cache: {variable} is {quoted(name)}: {reason}; set GLASSLLAMA_HOME to a folder for models"
    )


def _user_home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise DownloadError(
            "cache: this user has no home folder; set GLASSLLAMA_HOME to a folder for models"
        ) from None
