"""Ctrl-C and SIGTERM while code is compiled: held back until the compiler is out of the way.

Python raises what a signal's handler raises wherever it happens to be. In one of LLVM's callbacks
it would be lost, and between two of them the compiler would be left half done. So the handlers that
were there are called when compiling ends. A program that has nothing to save then need not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import lru_cache
from signal import Signals
from typing import Any

HEARD = (signal.SIGINT, signal.SIGTERM)
# What is called at once instead of a handler: something that ends the process.
instead: dict[Any, Callable[[Signals], None]] = {}


class Holding:
    """What Numba tells when its compiler is taken and given back, by any thread and nested."""

    def __init__(self) -> None:
        self._depth = 0
        self._before: dict[Signals, Any] = {}
        self._held: list[Signals] = []

    def on_start(self, _: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's, which is somewhere else
        if self._depth == 0:
            try:
                self._take_over()
            except BaseException:  # of another signal's handler
                self._give_back()
                raise
        self._depth += 1

    def on_end(self, _: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            try:
                self._give_back()
            finally:
                self._give_back()  # the rest, where a signal came in the middle
            held, self._held = self._held, []
            if held:
                signal.raise_signal(held[0])

    def notify(self, event: Any) -> None:
        if event.is_start:
            self.on_start(event)
        else:
            self.on_end(event)

    def _take_over(self) -> None:
        for number in HEARD:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._hold:
                self._before[number] = handler
                signal.signal(number, self._hold)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hold(self, number: int, _: object) -> None:
        at_once = instead.get(self._before[Signals(number)])
        if at_once is not None:
            at_once(Signals(number))
        self._held.append(Signals(number))


class Compilations:
    """How many functions Numba has begun to compile because they were not on disk."""

    begun = 0

    def notify(self, event: Any) -> None:
        self.begun += event.is_start


compilations = Compilations()


@lru_cache(maxsize=1)
def hold_while_compiling() -> Holding:
    """From now on, in this process; and count what is compiled."""
    from numba.core import event as untyped

    event: Any = untyped
    for listener in (Holding, Compilations):  # they are, and this file need not import Numba
        event.Listener.register(listener)
    holding = Holding()
    event.register("numba:compiler_lock", holding)
    event.register("numba:compile", compilations)
    return holding
