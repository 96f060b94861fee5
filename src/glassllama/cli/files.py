"""Files that a verb writes: each is there whole or not at all, and what goes wrong names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glassllama.base.errors import GlassError


def write_file(path: Path, text: str) -> None:
    """Write beside it, then rename. A pipe or a device, /dev/stdout for one, is written to.

    Raises GlassError: nowhere to write, no space left.
    """
    with naming(path):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        place = path.resolve()  # through links, which stay what they are
        part = place.with_name(f"{place.name}.part")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in here is about this path, also where it does not say so: a full disk's."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise GlassError(f"{path}: cannot be written ({error.strerror or error})") from None
