"""Free memory, usable cores and the cache folder of this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from glassllama.base.errors import DownloadError, MemoryShortError, quoted

# Linux: the memory limit of a container, versions 2 and 1 of control groups.
CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_memory() -> int | None:
    """Bytes that can be allocated now without swapping; None if unknown."""
    free = _system_memory()
    if (left := address_space_left()) is not None:
        free = left if free is None else min(free, left)
    for limit, used in CGROUP_LIMITS:
        try:
            free_here = int(limit.read_text()) - int(used.read_text())
        except (OSError, ValueError):  # no such file, or it contains "max" (no limit)
            continue
        free = free_here if free is None else min(free, free_here)
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
    """Bytes that may still be mapped under `ulimit -v`; None if there is no limit."""
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
    """Number of cores that this process may run on (CPU affinity)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gigabytes(count: float) -> str:
    """12_345_678_901 -> "12.35 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def require_memory(needed: int, *, what: str, instead: str) -> None:
    """Raise MemoryShortError if `needed` bytes are not free. Call it before allocating."""
    free = available_memory()
    if free is not None and needed > free:
        raise MemoryShortError(
            f"{what} needs {gigabytes(needed)} of memory, {gigabytes(free)} are free; {instead}"
        )


def cache_home() -> Path:
    """GLASSLLAMA_HOME, else XDG_CACHE_HOME/glassllama, else the platform's folder for caches.

    Raises DownloadError: the folder cannot be determined, such as the home of an unknown user.
    """
    if (home := _folder_from("GLASSLLAMA_HOME")) is not None:
        return home
    if (xdg := _folder_from("XDG_CACHE_HOME")) is not None:
        return xdg / "glassllama"
    if sys.platform == "darwin":
        return _user_home() / "Library" / "Caches" / "glassllama"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        base = Path(local) if local else _user_home() / "AppData" / "Local"
        return base / "glassllama"
    return _user_home() / ".cache" / "glassllama"


def _folder_from(variable: str) -> Path | None:
    """The folder in an environment variable; None if it is unset or empty."""
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


def peak_memory() -> int | None:
    """Bytes of this process's largest resident set so far; None where unknown (Windows).

    Linux: read from /proc, because the value of getrusage survives exec and may be a parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return peaks[0] * 1024 if peaks else None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
