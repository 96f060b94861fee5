"""Ctrl-C and SIGTERM while training: the first is a wish, the second an order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HEARD = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Whether somebody asked to stop, and by which signal."""

    signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What shells expect of a program that a signal ended; 0 where none came."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def listening() -> Iterator[Wish]:
    """Within, the first signal is noted in the Wish and the second ends the program at once.

    Other threads than the main one cannot listen; there nothing is changed.
    """
    wish = Wish()

    def heard(number: int, _: FrameType | None) -> None:
        if wish:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        wish.signal = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, heard) for number in HEARD}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
