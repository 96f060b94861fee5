"""Time limits in CPU time, for the fastest of several attempts.

A single attempt may include a garbage collection, a first import or a cold cache.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

ATTEMPTS = 4


def seconds(work: Callable[[], object], enough: float = 0.0) -> float:
    """CPU time of the fastest of some attempts; stops after an attempt below `enough`."""
    least = float("inf")
    collects = gc.isenabled()
    gc.disable()  # a collection examines all other objects of this process, too
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
