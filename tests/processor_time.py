"""Time limits of FAULTS.md: in processor time, and of the quickest of several attempts.

One attempt alone may meet a full garbage collection, a first import or a cold cache.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

ATTEMPTS = 4


def seconds(work: Callable[[], object], enough: float = 0.0) -> float:
    """Processor time of the quickest of some attempts; the first one under `enough` ends them."""
    least = float("inf")
    collects = gc.isenabled()
    gc.disable()  # a collection looks at everything else in this process, too
    try:
        for _ in range(ATTEMPTS):
            begin = time.process_time()
            work()
            least = min(least, time.process_time() - begin)
            if least < enough:
                break
    finally:
        if collects:
            gc.enable()
    return least
