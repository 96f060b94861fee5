"""What is said while code is compiled: nobody should have to wonder what takes so long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from glassllama.cli.console import note
from glassllama.native.jit import code_cache
from glassllama.native.jit.deferred_signals import compilations

PATIENCE_SECONDS = 2.0
COMPILING = "compiling for this processor: once, up to a minute"
AGAIN = "compiling for this processor: up to a minute"


@contextmanager
def told_of_compiling() -> Iterator[None]:
    """A note on stderr where something is compiled that is not over after two seconds."""
    over = Event()
    thread = Thread(target=watch, args=(over, compilations.begun), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def watch(over: Event, before: int) -> None:
    """Say it once, unless the work is `over` first or nothing was compiled since `before`."""
    while not over.wait(PATIENCE_SECONDS):
        if compilations.begun > before:
            note(AGAIN if code_cache.notes else COMPILING)
            return
