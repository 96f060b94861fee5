"""What is said while code is compiled: nobody should have to wonder what takes so long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from glassllama.base.sealed import SEAL
from glassllama.cli.screen import note

PATIENCE_SECONDS = 2.0
COMPILING = "compiling for this processor: once, about 20 s"


@contextmanager
def told_of_compiling() -> Iterator[None]:
    """A note on stderr where the engine is still being compiled after two seconds."""
    over = Event()
    thread = Thread(target=watch, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def watch(over: Event) -> None:
    """Say it once, unless the work is `over` first or the code is there already."""
    while not over.wait(PATIENCE_SECONDS):
        engine: Any = sys.modules.get("glassllama.engine.executor")
        if engine is None:  # a download, PyTorch
            continue
        folder = sys.modules["glassllama.engine.compiled"].code_folder()
        if folder is not None and not (folder / SEAL).exists():
            note(COMPILING)
        return
