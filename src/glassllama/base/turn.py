"""One call at a time: other threads wait, the same thread is refused.

The caller's own thread can come back in the middle of a call, in a signal's handler: waiting for
itself, it would wait for ever.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from glassllama.base.errors import GenerationError

BUSY = (
    "already in a step in this thread: a signal handler or a finalizer cannot use the same model "
    "meanwhile; note there what is wanted, and do it when the call has returned"
)

S = TypeVar("S", bound=Any)  # something with a `turn`
P = ParamSpec("P")
R = TypeVar("R")


class Turn:
    """Whose turn it is. The lock lets its own thread through, `taken` says that it must not be."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.taken = False
        TURNS[:] = [other for other in TURNS if other() is not None]
        TURNS.append(weakref.ref(self))

    def renew(self) -> None:
        """In the child of a fork: the thread whose turn it was may not be here."""
        if self.lock.acquire(blocking=False):
            self.lock.release()
        else:
            self.lock, self.taken = threading.RLock(), False


TURNS: list[weakref.ref[Turn]] = []


def renew_all() -> None:
    for reference in TURNS:
        if (turn := reference()) is not None:
            turn.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_all)


def in_turn(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method of something with a `turn`: one call at a time.

    An exception may come at any moment (Ctrl-C): before `taken` is set nothing has begun, and no
    exception comes between that and `try`, where nothing is called.
    """

    @wraps(method)
    def called(self: S, *args: P.args, **more: P.kwargs) -> R:
        turn: Turn = self.turn
        with turn.lock:
            if turn.taken:
                raise GenerationError(BUSY)
            turn.taken = True
            try:
                result = method(self, *args, **more)
            finally:
                turn.taken = False
        return result

    return cast(Callable[Concatenate[S, P], R], called)
