"""A thread pool whose threads stay inside compiled code and share the work of a forward step.

A step is a fixed list of phases. A phase is a number of work items (groups of matrix rows, tokens,
attention heads) that may be done in any order. Every thread claims items of its own share first and
then helps the others; a phase ends when all of its items are done, not when all threads have
arrived. So a thread that another program has preempted delays the others only while it holds
claimed items, and a late thread finds everything claimed and moves on to the current phase.

All threads communicate through one array of 64-bit words, the control block. The upper half of
every word holds the number of the step (its epoch), so that a late thread cannot claim items of a
step that is over, or add to its counters.

A step is one native call (`model.worker_loop`), from its announcement to its end, including the
waking of threads that sleep. So no Python exception, such as KeyboardInterrupt, can leave the other
threads in a step whose caller has gone.
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

from glassllama.base.machine import usable_cores
from glassllama.native.jit.compile import STRICT, callback_address, compiled, inlined
from glassllama.native.jit.intrinsics import (
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

LINE = 8  # 64-bit words of a cache line: words that different threads write must not share one
# Offsets into the control block, in words.
EPOCH, STOP, YIELD, STEP_ARGS = 0, LINE, 2 * LINE, 3 * LINE
ACQUIRE, RELEASE = YIELD + 1, YIELD + 2  # like YIELD: addresses of C functions
STEP_ARGS_WORDS = 2 * LINE  # size of the arguments of a step (layer_ops.Step)
ASLEEP = STEP_ARGS + STEP_ARGS_WORDS  # for each thread: whether it sleeps, and the lock to wake it
EPOCH_SHIFT = 32
COUNT_MASK = (1 << EPOCH_SHIFT) - 1

SPINS_BEFORE_YIELD = 2_000  # reads of a word before the thread yields its processor: about 50 µs
SPINS_BEFORE_SLEEP = 4_000  # reads and yields before an idle thread goes to sleep: milliseconds

JOIN_SECONDS = 0.2


class Worker(NamedTuple):
    """What a thread knows of itself in one step."""

    thread: int
    threads: int
    phases: int  # address of the first phase's words
    words: int  # words from one thread's counters to the next: see ThreadPool
    epoch: int
    yield_address: int  # address of the system function that yields the processor


@inlined
def share_of(thread: int, threads: int, items: int) -> Any:
    """The items of a phase that belong to a thread at first -> first, last + 1."""
    return items * thread // threads, items * (thread + 1) // threads


@compiled
def claim(worker: Any, phase: int, items: int, min_items: int) -> Any:
    """Claim some items of a phase -> first, last + 1; (0, 0) if none are left.

    A thread claims from its own share first, then from those of the others. It claims half of what
    is left of a share, but at least `min_items`: few atomic operations, and no long wait at the
    end.
    """
    for n in range(worker.threads):
        owner = (worker.thread + n) % worker.threads
        start, end = share_of(owner, worker.threads, items)
        word = worker.phases + ((1 + owner) * worker.words + phase) * 8
        while True:
            value = atomic_load(word)
            if value >> EPOCH_SHIFT != worker.epoch:
                return 0, 0
            first = start + (value & COUNT_MASK)
            if first >= end:
                break
            count = min(end - first, max(min_items, (end - first) // 2))
            if compare_and_swap(word, value, value + count):
                return first, first + count
    return 0, 0


@compiled
def finish_phase(worker: Any, phase: int, items: int, num_done: int) -> None:
    """Add `num_done` to the finished items of a phase, then wait until all are finished.

    What this thread has written is visible to all others afterwards. Returns early if the step is
    over: then a late thread has called this, and nothing depends on it.
    """
    word = worker.phases + phase * 8
    while num_done > 0:
        value = atomic_load(word)
        if value >> EPOCH_SHIFT != worker.epoch:
            return
        if compare_and_swap(word, value, value + num_done):
            break
    goal = (worker.epoch << EPOCH_SHIFT) + items
    spins = 0
    while True:
        value = atomic_load(word)
        if value == goal or value >> EPOCH_SHIFT != worker.epoch:
            return
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            call_system(worker.yield_address)
        else:
            relax()


@inlined
def parallel_for(
    worker: Any, phase: int, items: int, min_items: int, body: Any, arguments: Any
) -> None:
    """One thread's part of a phase: body(first, last, *arguments) for items first … last-1.

    Claims `min_items` or more at a time, then waits until the other threads have finished the
    phase. `body` is the name of a compiled function in the caller: this function is inlined, so
    that the call is a direct one and the caller's machine code can be cached on disk.
    """
    first, last = claim(worker, phase, items, min_items)
    num_done = 0
    while first < last:
        body(first, last, *arguments)
        num_done += last - first
        first, last = claim(worker, phase, items, min_items)
    finish_phase(worker, phase, items, num_done)


@compiled
def begin_step(
    control_block: int, threads: int, first_phase: int, words: int, step_args: Any
) -> Any:
    """Write a new step into the control block and wake sleeping threads -> its epoch.

    The counters are written first: from then on late threads claim nothing, whichever arguments
    they have read.
    """
    epoch = (atomic_load(control_block + EPOCH * 8) + 1) & 0x7FFFFFFF
    for word in range(words * (1 + threads)):
        atomic_store(control_block + (first_phase + word) * 8, epoch << EPOCH_SHIFT)
    for n in range(len(step_args)):
        atomic_store(control_block + (STEP_ARGS + n) * 8, step_args[n])
    atomic_swap(control_block + EPOCH * 8, epoch)
    wake(control_block, threads)
    return epoch


@compiled
def wake(control_block: int, threads: int) -> None:
    """Wake the threads that sleep."""
    for thread in range(1, threads):
        asleep = control_block + (ASLEEP + thread * LINE) * 8
        if atomic_add(asleep, 0) == 1 and atomic_swap(asleep, 0) == 1:
            call_kernel(atomic_load(control_block + RELEASE * 8), (atomic_load(asleep + 8),))


@compiled
def next_epoch(control_block: int, thread: int, last: int) -> Any:
    """Wait for a step after the epoch `last` -> its epoch, or any number if the pool stops.

    The thread sleeps if no step begins for some milliseconds.
    """
    asleep = control_block + (ASLEEP + thread * LINE) * 8
    while True:
        for spins in range(SPINS_BEFORE_SLEEP):
            epoch = atomic_load(control_block + EPOCH * 8)
            if epoch != last or atomic_load(control_block + STOP * 8) != 0:
                return epoch
            if spins > SPINS_BEFORE_YIELD:
                call_system(atomic_load(control_block + YIELD * 8))
            else:
                relax()
        atomic_swap(asleep, 1)
        epoch = atomic_add(control_block + EPOCH * 8, 0)
        called = epoch != last or atomic_add(control_block + STOP * 8, 0) != 0
        if called and atomic_swap(asleep, 0) == 1:
            return epoch  # a step began just now, and nobody else is about to wake this thread
        call_kernel(atomic_load(control_block + ACQUIRE * 8), (atomic_load(asleep + 8), 1))


def stop_all(control_block: int, threads: int, _: int) -> None:
    """Make all other threads leave `worker_loop`; a step that has begun is finished first."""
    atomic_swap(control_block + STOP * 8, 1)
    wake(control_block, threads)


@cache
def stopper() -> Any:
    """`stop_all` as a C function of (control block, threads, any object)."""
    signature = types.void(types.int64, types.int64, types.int64)
    form = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.py_object)
    return form(callback_address(signature, stop_all, STRICT))


def address_of(function: Any) -> int:
    """The address at which native code can call a C function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def system_yield() -> Any:
    """The system's function that yields the processor to another thread."""
    if sys.platform == "win32":
        return ctypes.windll.kernel32.SwitchToThread
    return ctypes.CDLL(None).sched_yield


class Locks:
    """CPython's own locks as C functions: they need no GIL and run no Python code."""

    def __init__(self) -> None:
        python = ctypes.pythonapi
        self.acquire, self.release = python.PyThread_acquire_lock, python.PyThread_release_lock
        self._allocate, self._free = python.PyThread_allocate_lock, python.PyThread_free_lock
        self._allocate.restype, self._allocate.argtypes = ctypes.c_void_p, []
        self._free.restype, self._free.argtypes = None, [ctypes.c_void_p]
        self.acquire.argtypes = [ctypes.c_void_p, ctypes.c_int]

    def new(self) -> int:
        """A new lock, already acquired. Raises MemoryError."""
        lock = self._allocate()
        if not lock:
            raise MemoryError("no more locks")
        self.acquire(lock, 1)
        return int(lock)

    def free(self, lock: int) -> None:
        self._free(lock)


LOCKS = Locks()


def num_processors() -> int:
    """How many processors this process may use, by its affinity and a container's limit."""
    quota = cgroup_quota()
    return max(1, min(usable_cores(), math.ceil(quota) if quota else usable_cores()))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors granted by a container's limit (cgroup v2, then v1); None: no limit."""
    try:
        allowed, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            allowed = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if allowed in ("max", "-1") else int(allowed) / int(period)


class ThreadPool:
    """The caller's thread and threads - 1 others, which wait for steps and sleep if none come.

    All of them run one compiled function, `worker_loop(thread, threads, control block address,
    first_phase, words, *rest)`: the caller for one step, the others until the pool is stopped.
    """

    def __init__(self, threads: int, phases: int) -> None:
        self.threads = threads
        first_phase = ASLEEP + threads * LINE
        # For each phase the number of finished items; then for each thread, in cache lines of its
        # own, how many items of its share are claimed.
        words = -(-phases // LINE) * LINE
        total = first_phase + (1 + threads) * words
        memory = np.zeros(total + LINE, np.int64)
        start = -memory.ctypes.data // 8 % LINE
        self.control_block = memory[start : start + total]
        self.native_args = (threads, self.control_block.ctypes.data, first_phase, words)
        self.control_block[YIELD] = address_of(system_yield())
        self.control_block[ACQUIRE] = address_of(LOCKS.acquire)
        self.control_block[RELEASE] = address_of(LOCKS.release)
        self.workers: list[threading.Thread] = []

    @property
    def is_started(self) -> bool:
        return len(self.workers) >= self.threads - 1

    def start(self, worker_loop: Callable[..., None], *rest: Any, keep: Any) -> None:
        """Start the other threads. `worker_loop` must be compiled already.

        The memory that `worker_loop` reaches by address must live until the last thread has left
        it, which may be after the engine is gone: the threads keep a reference to `keep`. If this
        is interrupted, it can be called again: no two threads ever have the same number.
        """
        while not self.is_started:
            thread = 1 + len(self.workers)
            lock = LOCKS.new()
            self.control_block[ASLEEP + thread * LINE + 1] = lock
            worker = threading.Thread(
                target=run_worker, name=f"engine-{thread}", daemon=True,
                args=(
                    worker_loop, (thread, *self.native_args, *rest), lock,
                    (self.control_block, keep),
                ),
            )  # fmt: skip
            self.workers.append(worker)
            worker.start()

    def stop_with(self, owner: object) -> None:
        """Stop the threads when `owner` is garbage collected, or the program ends.

        The weak reference calls a C function. A callback in Python could be interrupted by Ctrl-C,
        and an exception in a weak reference's callback is lost.
        """
        function = stopper()
        stop = partial(function, self.native_args[1], self.threads)
        LIVE_POOLS[:] = [pair for pair in LIVE_POOLS if pair[0]() not in (None, owner)]
        LIVE_POOLS.append((weakref.ref(owner, stop), self))

    def stop(self) -> None:
        """Stop the other threads. The caller can still compute steps alone."""
        stopper()(self.native_args[1], self.threads, None)
        for worker in self.workers:
            if worker.is_alive():
                worker.join(JOIN_SECONDS)


# Owners of thread pools, and the pools.
LIVE_POOLS: list[tuple[weakref.ref[Any], ThreadPool]] = []


@atexit.register
def stop_all_pools() -> None:
    """No thread may run compiled code while the interpreter frees it at exit."""
    for _, pool in LIVE_POOLS:
        pool.stop()


def run_worker(
    worker_loop: Callable[..., None], arguments: tuple[Any, ...], lock: int, _keep: Any
) -> None:
    """What a thread of the pool runs, from its start to its end."""
    worker_loop(*arguments)
    LOCKS.free(lock)
