"""The threads that compute a step together, and the board on which they share out its work.

A step is a fixed list of phases; a phase is a number of items (groups of rows, tokens, heads) that
may be done in any order. Every thread has a share of them, and helps the others when it is through;
a phase is over when all its items are done, not when all threads have been there. So a thread that
has lost its processor to another program holds up nobody, unless with items in hand, and one that
comes late finds nothing to take and walks on to where the others are.

Every word of the board carries the number of the step (its epoch) in its upper half: what a late
thread tries to take from a step that is over, or to add to it, is refused.

A step is one native call from its announcement to its end (model.serve), with the waking of threads
that sleep. So no Python exception, such as Ctrl-C, can leave the others in a step without a caller.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import cfunc

from glassllama.base.machine import usable_cores
from glassllama.engine.compiled import STRICT, compiled, inlined, keep_in_cache
from glassllama.engine.intrinsics import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    call_kernel,
    call_system,
    compare_and_swap,
    relax,
    types,
)

LINE = 8  # 64-bit words of a cache line: what different threads write must not share one
EPOCH, STOP, YIELD, ORDERS = 0, LINE, 2 * LINE, 3 * LINE  # places on the board
ACQUIRE, RELEASE = YIELD + 1, YIELD + 2  # addresses of functions, as YIELD
ORDER_WORDS = 2 * LINE  # room for what a step is told, see model.py
PARKED = ORDERS + ORDER_WORDS  # of each thread: whether it sleeps, and the lock that wakes it
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
    while mine > 0:
        seen = atomic_load(word)
        if seen >> EPOCH_SHIFT != me.epoch:
            return
        if compare_and_swap(word, seen, seen + mine):
            break
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


@compiled
def announce(board: int, threads: int, first_phase: int, words: int, orders: Any) -> Any:
    """Begin a new step on the board, and wake who sleeps -> its epoch.

    The words first: from then on late threads take nothing, whatever they read of the orders.
    """
    epoch = (atomic_load(board + EPOCH * 8) + 1) & 0x7FFFFFFF
    for word in range(words * (1 + threads)):
        atomic_store(board + (first_phase + word) * 8, epoch << EPOCH_SHIFT)
    for n in range(len(orders)):
        atomic_store(board + (ORDERS + n) * 8, orders[n])
    atomic_swap(board + EPOCH * 8, epoch)
    wake(board, threads)
    return epoch


@compiled
def wake(board: int, threads: int) -> None:
    """Get up the threads that sleep."""
    for thread in range(1, threads):
        parked = board + (PARKED + thread * LINE) * 8
        if atomic_add(parked, 0) == 1 and atomic_swap(parked, 0) == 1:
            call_kernel(atomic_load(board + RELEASE * 8), (atomic_load(parked + 8),))


@compiled
def next_epoch(board: int, thread: int, last: int) -> Any:
    """Wait for a step after `last` -> its epoch, or any number when the threads are to leave.

    Sleeps where none comes for a while.
    """
    parked = board + (PARKED + thread * LINE) * 8
    while True:
        for looks in range(PATIENCE):
            epoch = atomic_load(board + EPOCH * 8)
            if epoch != last or atomic_load(board + STOP * 8) != 0:
                return epoch
            if looks > SPINS:
                call_system(atomic_load(board + YIELD * 8))
            else:
                relax()
        atomic_swap(parked, 1)
        epoch = atomic_add(board + EPOCH * 8, 0)
        called = epoch != last or atomic_add(board + STOP * 8, 0) != 0
        if called and atomic_swap(parked, 0) == 1:
            return epoch  # it came just now, and nobody is about to wake this thread
        call_kernel(atomic_load(board + ACQUIRE * 8), (atomic_load(parked + 8), 1))


def stop_all(board: int, threads: int, _: int) -> None:
    """Let the other threads go: those in a step finish it first."""
    atomic_swap(board + STOP * 8, 1)
    wake(board, threads)


@cache
def stopper() -> tuple[Any, Any]:
    """`stop_all` as a C function of (board, threads, any object), and what keeps its code alive."""
    signature = types.void(types.int64, types.int64, types.int64)
    code = keep_in_cache(
        lambda keep: cfunc(signature, error_model="numpy", fastmath=STRICT, cache=keep)(stop_all)
    )
    form = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.py_object)
    return form(code.address), code


def address_of(function: Any) -> int:
    """Where native code can call a C function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def offer() -> Any:
    """The system's own way to give up the processor."""
    if sys.platform == "win32":
        return ctypes.windll.kernel32.SwitchToThread
    return ctypes.CDLL(None).sched_yield


class Locks:
    """Python's own locks as C functions: these need no GIL and run no Python."""

    def __init__(self) -> None:
        python = ctypes.pythonapi
        self.acquire, self.release = python.PyThread_acquire_lock, python.PyThread_release_lock
        self._allocate, self._free = python.PyThread_allocate_lock, python.PyThread_free_lock
        self._allocate.restype, self._allocate.argtypes = ctypes.c_void_p, []
        self._free.restype, self._free.argtypes = None, [ctypes.c_void_p]
        self.acquire.argtypes = [ctypes.c_void_p, ctypes.c_int]

    def new(self) -> int:
        """A lock that is taken."""
        lock = self._allocate()
        if not lock:
            raise MemoryError("no more locks")
        self.acquire(lock, 1)
        return int(lock)

    def free(self, lock: int) -> None:
        self._free(lock)


LOCKS = Locks()


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

    `serve(thread, threads, board address, first_phase, words, *rest)` is the compiled function that
    all of them run (model.serve): the caller for one step, the others until they are let go.
    """

    def __init__(self, threads: int, phases: int) -> None:
        self.threads = threads
        first_phase = PARKED + threads * LINE
        # For every phase how many items are done; then, thread by thread, so that they do not
        # write to each other's cache lines, how many of its share are taken.
        words = -(-phases // LINE) * LINE
        total = first_phase + (1 + threads) * words
        memory = np.zeros(total + LINE, np.int64)
        start = -memory.ctypes.data // 8 % LINE
        self.board = memory[start : start + total]
        self.place = (threads, self.board.ctypes.data, first_phase, words)
        self.board[YIELD] = address_of(offer())
        self.board[ACQUIRE], self.board[RELEASE] = map(address_of, (LOCKS.acquire, LOCKS.release))
        self.others: list[threading.Thread] = []

    @property
    def complete(self) -> bool:
        return len(self.others) >= self.threads - 1

    def start(self, serve: Callable[..., None], *rest: Any, keep: Any) -> None:
        """Begin to serve, on threads - 1 threads. `serve` must be compiled already.

        What `serve` reaches by address must live until the last thread has left it, which may be
        after the engine is gone: the threads hold on to `keep`. Interrupted, it can be called
        again: no two threads ever have the same number.
        """
        while not self.complete:
            thread = 1 + len(self.others)
            lock = LOCKS.new()
            self.board[PARKED + thread * LINE + 1] = lock
            member = threading.Thread(
                target=serve_until_stopped, name=f"engine-{thread}", daemon=True,
                args=(serve, (thread, *self.place, *rest), lock, (self.board, keep)),
            )  # fmt: skip
            self.others.append(member)
            member.start()

    def stop_with(self, owner: object) -> None:
        """Let the other threads go when `owner` is gone, or the program ends.

        No step of Python's interpreter is taken when `owner` goes: there a Ctrl-C that came just
        then would be raised, and lost.
        """
        function, _ = stopper()
        stop = partial(function, self.place[1], self.threads)
        LIVING[:] = [pair for pair in LIVING if pair[0]() not in (None, owner)]
        LIVING.append((weakref.ref(owner, stop), self))

    def stop(self) -> None:
        """Let the other threads go. Steps are still computed, by their callers alone."""
        stopper()[0](self.place[1], self.threads, None)
        for other in self.others:
            if other.is_alive():
                other.join(SECONDS_TO_LEAVE)


# Owners of crews, and these.
LIVING: list[tuple[weakref.ref[Any], Crew]] = []


@atexit.register
def stop_everyone() -> None:
    """Nobody may run compiled code while it is taken down with the rest of the program."""
    for _, crew in LIVING:
        crew.stop()


def serve_until_stopped(
    serve: Callable[..., None], arguments: tuple[Any, ...], lock: int, _keep: Any
) -> None:
    """The life of a thread of the crew."""
    serve(*arguments)
    LOCKS.free(lock)
