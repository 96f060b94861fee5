"""A lock for objects that run one call at a time: other threads wait, reentrant calls are refused.

A signal handler or a finalizer may call an object while the same thread is already in a call of it.
Waiting would be a deadlock, so such a call is an error.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from glassllama.base.errors import GenerationError

REENTRANT_CALL = (
    "already in a step in this thread: a signal handler or a finalizer cannot use the same model; "
    "set a flag there, and use the model when the interrupted call has returned"
)

S = TypeVar("S", bound=Any)  # an object with an attribute `lock`
P = ParamSpec("P")
R = TypeVar("R")


class NonReentrantLock:
    """The lock of `synchronized` methods. `rlock` stops other threads, `busy` its own thread."""

    def __init__(self) -> None:
        self.rlock = threading.RLock()
        self.busy = False
        _all_locks[:] = [other for other in _all_locks if other() is not None]
        _all_locks.append(weakref.ref(self))

    def reset_after_fork(self) -> None:
        """Called in the child of a fork, where the thread that holds the lock does not exist."""
        if self.rlock.acquire(blocking=False):
            self.rlock.release()
        else:
            self.rlock, self.busy = threading.RLock(), False


_all_locks: list[weakref.ref[NonReentrantLock]] = []


def _reset_all() -> None:
    for reference in _all_locks:
        if (lock := reference()) is not None:
            lock.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)


def synchronized(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Decorator for methods of an object with a `lock`: one call at a time.

    Raises GenerationError if the same thread is already in such a call. Ctrl-C may raise an
    exception between any two instructions: before `busy` is set nothing has started, and between
    that and `try` nothing is called.
    """

    @wraps(method)
    def locked(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        lock: NonReentrantLock = self.lock
        with lock.rlock:
            if lock.busy:
                raise GenerationError(REENTRANT_CALL)
            lock.busy = True
            try:
                result = method(self, *args, **kwargs)
            finally:
                lock.busy = False
        return result

    return cast(Callable[Concatenate[S, P], R], locked)
