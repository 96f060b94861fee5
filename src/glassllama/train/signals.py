"""Ctrl-C and SIGTERM while training: the first is a wish, the second an order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from types import FrameType

from glassllama.train.distributed import Team

HEARD = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Whether somebody asked to stop, and by which signal: this process, or another rank."""

    signal: Signals | None = None
    heard_elsewhere: Signals | None = None

    def __bool__(self) -> bool:
        return bool(self.signal or self.heard_elsewhere)

    def agreed(self, team: Team) -> bool:
        """Whether any rank was asked to stop: the same answer on all, at the same step."""
        if number := team.greatest(self.signal or 0):
            self.heard_elsewhere = Signals(number)
        return number > 0

    @property
    def exit_code(self) -> int:
        """What shells expect of a program that a signal ended; 0 where none came."""
        came = self.signal or self.heard_elsewhere
        return 0 if came is None else 128 + came


@contextmanager
def listening() -> Iterator[Wish]:
    """Within, the first signal is noted in the Wish and the second ends the program at once.

    Other threads than the main one cannot listen; there nothing is changed.
    """
    wish = Wish()

    def heard(number: int, _: FrameType | None) -> None:
        if wish.signal:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        wish.signal = Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, heard) for number in HEARD}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
