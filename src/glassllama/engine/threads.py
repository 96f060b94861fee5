"""The threads that compute a step together, and where they wait for each other."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glassllama.engine.compiled import compiled
from glassllama.engine.intrinsics import atomic_add, atomic_load, call_system

CACHE_LINE = 8  # words: counters of different threads must not share one
SPINS = 20_000  # about 20 µs; longer than any thread waits unless it has lost its processor

ARRIVED, YIELD = 0, CACHE_LINE  # words of a crew's `meeting`: a shared counter; a C function
PHASES = 2 * CACHE_LINE  # then one line per thread: how many barriers it has passed


class Member(NamedTuple):
    """Who a thread is, among how many, and the words by which they meet."""

    thread: int
    threads: int
    meeting: Any  # int64, see above


@compiled
def barrier(me: Any) -> None:
    """Wait until all threads are here: spin for a while, then let others have the processor."""
    mine = PHASES + me.thread * CACHE_LINE
    me.meeting[mine] += 1
    goal = me.meeting[mine] * me.threads
    counter = me.meeting.ctypes.data
    if atomic_add(counter, 1) == goal - 1:
        return
    spins = 0
    while atomic_load(counter) < goal:
        spins += 1
        if spins > SPINS:
            call_system(me.meeting[YIELD])


def yield_address() -> int:
    """The system's own way to give up the processor, as an address that native code can call."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def processors() -> int:
    """How many processors this process may use: affinity and container limits honoured."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup_quota()
    return max(1, min(count or 1, math.ceil(quota) if quota else count or 1))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors granted by a container's limit (cgroup v2, then v1), None if unlimited."""
    try:
        allowed, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            allowed = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if allowed in ("max", "-1") else int(allowed) / int(period)


class Crew:
    """Some threads, the caller's included, that run one native function together."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.meeting = np.zeros(PHASES + threads * CACHE_LINE, np.int64)
        self.meeting[YIELD] = yield_address()
        self._others = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="engine")

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """`function(me, *arguments)` on every thread; returns when all have.

        The function must be compiled already: a thread that compiles while others wait for it in
        a barrier would wait for a lock that they hold.
        """
        self.meeting[ARRIVED] = 0
        self.meeting[PHASES:] = 0
        members = [Member(thread, self.threads, self.meeting) for thread in range(self.threads)]
        others = [self._others.submit(function, me, *arguments) for me in members[1:]]
        function(members[0], *arguments)
        for other in others:
            other.result()

    def run_alone(self, function: Callable[..., None], *arguments: Any) -> None:
        """The same on the calling thread only: for what must be compiled before all enter it."""
        function(Member(0, 1, self.meeting), *arguments)
