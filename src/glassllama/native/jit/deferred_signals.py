"""Deferred SIGINT and SIGTERM: while Numba compiles, signal handlers wait until it has finished.

A signal handler may raise an exception at any bytecode. In a callback of LLVM it would be lost, and
between two of them the compiler would be left in an undefined state. So the handlers are called
when compiling ends. A handler that ends the process at once can be named in `instead`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import lru_cache
from signal import Signals
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Handler -> what is called at once instead of it, and ends the process.
instead: dict[Any, Callable[[Signals], None]] = {}


class DeferredSignals:
    """A listener for the events of Numba's compiler lock, which any thread takes, also nested."""

    def __init__(self) -> None:
        self._depth = 0
        self._before: dict[Signals, Any] = {}
        self._pending: list[Signals] = []

    def on_start(self, _: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signal handlers run in the main thread only
        if self._depth == 0:
            try:
                self._install()
            except BaseException:  # raised by the handler of another signal
                self._restore()
                raise
        self._depth += 1

    def on_end(self, _: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            try:
                self._restore()
            finally:
                self._restore()  # the rest, if a signal came in between
            pending, self._pending = self._pending, []
            if pending:
                signal.raise_signal(pending[0])

    def notify(self, event: Any) -> None:
        if event.is_start:
            self.on_start(event)
        else:
            self.on_end(event)

    def _install(self) -> None:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._defer:
                self._before[number] = handler
                signal.signal(number, self._defer)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _defer(self, number: int, _: object) -> None:
        at_once = instead.get(self._before[Signals(number)])
        if at_once is not None:
            at_once(Signals(number))
        self._pending.append(Signals(number))


class Compilations:
    """Counts the functions that Numba compiles because they are not in the cache."""

    begun = 0

    def notify(self, event: Any) -> None:
        self.begun += event.is_start


compilations = Compilations()


@lru_cache(maxsize=1)
def defer_signals_while_compiling() -> DeferredSignals:
    """From now on, in this process. Also counts what is compiled."""
    from numba.core import event as untyped

    event: Any = untyped
    for listener in (DeferredSignals, Compilations):  # without importing Numba at the top
        event.Listener.register(listener)
    deferred = DeferredSignals()
    event.register("numba:compiler_lock", deferred)
    event.register("numba:compile", compilations)
    return deferred
