"""The most memory this process has had."""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
KIB = 1024


def peak_memory() -> int | None:
    """Bytes of the largest resident set so far; None where the system does not say (Windows).

    Linux is asked by way of /proc: the figure of getrusage survives exec and may be a parent's.
    """
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return peaks[0] * KIB if peaks else None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB
