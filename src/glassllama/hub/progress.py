"""Telling how far a download is by looking at the files it makes grow.

Both downloaders (pip, huggingface_hub) are other people's; the growing files are the one thing that
every version of them has.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glassllama.base.interfaces import Progress

LOOK_EVERY = 0.1  # seconds


@contextmanager
def watching(measure: Callable[[], int], total: int, progress: Progress | None) -> Iterator[None]:
    """While the body runs, report measure() of `total` bytes from a thread; at its end, all."""
    if progress is None:
        yield
        return
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_EVERY):
            progress(min(measure(), total), total)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    progress(total, total)


def file_sizes(folder: Path) -> list[int]:
    """Bytes of every file below `folder`, which may change under our eyes."""
    sizes = []
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(path, name)).st_size)
            except FileNotFoundError:  # moved since it was listed
                continue
    return sizes
