"""The threads that compute a step together, and the board on which they share out its work.

A step is a fixed list of phases; a phase is a number of items (groups of rows, tokens, heads) that
may be done in any order. Every thread has a share of them, and helps the others when it is through;
a phase is over when all its items are done, not when all threads have been there. So a thread that
has lost its processor to another program holds up nobody, unless with items in hand, and one that
comes late finds nothing to take and walks on to where the others are.

Every word of the board carries the number of the step (its epoch) in its upper half: what a late
thread tries to take from a step that is over is refused.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glassllama.base.machine import usable_cores
from glassllama.engine.compiled import compiled, entry, inlined
from glassllama.engine.intrinsics import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    call_system,
    compare_and_swap,
    relax,
)

LINE = 8  # 64-bit words of a cache line: what different threads write must not share one
EPOCH, STOP, YIELD, ORDERS = 0, LINE, 2 * LINE, 3 * LINE  # places on the board
ORDER_WORDS = 2 * LINE  # room for what a step is told, see model.py
PARKED = ORDERS + ORDER_WORDS
EPOCH_SHIFT = 32
COUNT_MASK = (1 << EPOCH_SHIFT) - 1

SPINS = 2_000  # looks at a word before the processor is offered to others: about 50 µs
PATIENCE = 4_000  # looks and offers before a thread without work goes to sleep: milliseconds

SECONDS_TO_LEAVE = 0.2


class Member(NamedTuple):
    """Who a thread is, among how many, and where its step's words are."""

    thread: int
    threads: int
    phases: int  # address of the first phase's words
    words: int  # from one row of the phases' words to the next: see Crew
    epoch: int
    offer: int  # address of the system's function that gives the processor to others


@inlined
def share_of(thread: int, threads: int, items: int) -> Any:
    """Which of a phase's items are a thread's own -> first, last + 1."""
    return items * thread // threads, items * (thread + 1) // threads


@compiled
def take(me: Any, phase: int, items: int, least: int) -> Any:
    """Take some items of a phase -> first, last + 1; (0, 0) where none are left.

    Every thread begins with its own share, and then helps the others with theirs. Half of what is
    left of a share at a time, but never less than `least`: few trips to the board, and nobody waits
    long at the end.
    """
    for n in range(me.threads):
        owner = (me.thread + n) % me.threads
        start, end = share_of(owner, me.threads, items)
        word = me.phases + ((1 + owner) * me.words + phase) * 8
        while True:
            seen = atomic_load(word)
            if seen >> EPOCH_SHIFT != me.epoch:
                return 0, 0
            first = start + (seen & COUNT_MASK)
            if first >= end:
                break
            count = min(end - first, max(least, (end - first) // 2))
            if compare_and_swap(word, seen, seen + count):
                return first, first + count
    return 0, 0


@compiled
def complete(me: Any, phase: int, items: int, mine: int) -> None:
    """Note that `mine` of a phase's items are done, what they wrote is visible to all; and wait for
    the others, or until the step is over and it never mattered."""
    word = me.phases + phase * 8
    if mine > 0:
        atomic_add(word, mine)
    goal = (me.epoch << EPOCH_SHIFT) + items
    looks = 0
    while True:
        seen = atomic_load(word)
        if seen == goal or seen >> EPOCH_SHIFT != me.epoch:
            return
        looks += 1
        if looks > SPINS:
            call_system(me.offer)
        else:
            relax()


@entry
def announce(board: int, orders: Any, first_phase: int, words: int) -> Any:
    """Begin a new step on the board -> its epoch.

    The words first: from then on late threads take nothing, whatever they read of the orders.
    """
    epoch = (atomic_load(board + EPOCH * 8) + 1) & 0x7FFFFFFF
    for word in range(words):
        atomic_store(board + (first_phase + word) * 8, epoch << EPOCH_SHIFT)
    for n in range(len(orders)):
        atomic_store(board + (ORDERS + n) * 8, orders[n])
    atomic_swap(board + EPOCH * 8, epoch)
    return epoch


@compiled
def next_epoch(board: int, thread: int, last: int) -> Any:
    """Wait for a step after `last` -> its epoch, or -1 where none came for a while: sleep then."""
    parked = board + (PARKED + thread * LINE) * 8
    for looks in range(PATIENCE):
        epoch = atomic_load(board + EPOCH * 8)
        if epoch != last:
            return epoch
        if looks > SPINS:
            call_system(atomic_load(board + YIELD * 8))
        else:
            relax()
    atomic_swap(parked, 1)
    epoch = atomic_add(board + EPOCH * 8, 0)
    if epoch != last and atomic_swap(parked, 0) == 1:
        return epoch  # it came just now, and nobody is about to wake this thread
    return -1


def offer_address() -> int:
    """The system's own way to give up the processor, as an address that native code can call."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def processors() -> int:
    """How many processors this process may use: affinity and container limits honoured."""
    quota = cgroup_quota()
    return max(1, min(usable_cores(), math.ceil(quota) if quota else usable_cores()))


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
    """The caller's thread and some more that stay: they wait for steps, then sleep if none come.

    `serve(thread, threads, board address, first_phase, words, last_epoch, *rest)` is the compiled
    function that the others run; it returns the last epoch it has seen, when it may sleep.
    """

    def __init__(self, threads: int, phases: int) -> None:
        self.threads = threads
        self.first_phase = PARKED + threads * LINE
        # For every phase how many items are done; then, thread by thread, so that they do not
        # write to each other's cache lines, how many of its share are taken.
        self.words = -(-phases // LINE) * LINE
        words = self.first_phase + (1 + threads) * self.words
        memory = np.zeros(words + LINE, np.int64)
        start = -memory.ctypes.data // 8 % LINE
        self.board = memory[start : start + words]
        self.address = self.board.ctypes.data
        self.board[YIELD] = offer_address()
        self._others: list[threading.Thread] = []
        self._beds = [threading.Lock() for _ in range(threads)]

    def start(self, serve: Callable[..., int], *rest: Any, keep: Any) -> None:
        """Begin to serve, on threads - 1 threads. `serve` must be compiled already.

        What `serve` reaches by address must live until the last thread has left it, which may be
        after the engine is gone: the threads hold on to `keep`.
        """
        atomically_clear(self.address + PARKED * 8)  # compiled now, not when first needed
        for thread in range(1, self.threads):
            self._beds[thread].acquire()
            place = (thread, self.threads, self.address, self.first_phase, self.words)
            member = threading.Thread(
                target=serve_or_sleep, name=f"engine-{thread}", daemon=True,
                args=(self._beds[thread], self.board, serve, place, rest, keep),
            )  # fmt: skip
            member.start()
            self._others.append(member)

    def wake(self) -> None:
        """Get up those who sleep: a step has been announced."""
        for thread in range(1, self.threads):
            place = PARKED + thread * LINE
            if self.board[place] and atomically_clear(self.address + place * 8):
                self._beds[thread].release()

    def stop(self) -> None:
        """End the other threads; the engine is not used any more."""
        self.board[STOP] = 1
        self.board[EPOCH] += 1
        self.wake()
        for other in self._others:
            if other is not threading.current_thread():  # the collector may run on any of them
                other.join(SECONDS_TO_LEAVE)


@entry
def atomically_clear(word: int) -> Any:
    return atomic_swap(word, 0) == 1


def serve_or_sleep(
    bed: threading.Lock,
    board: Any,
    serve: Callable[..., int],
    place: tuple[int, ...],
    rest: Any,
    _keep: Any,
) -> None:
    """The life of a thread of the crew."""
    epoch = 0
    while not board[STOP]:
        epoch = serve(*place, epoch, *rest)
        if not board[STOP]:
            bed.acquire()
