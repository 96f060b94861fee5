"""Arrow keys and earlier lines at the prompt, kept from one conversation to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from glassllama.base.errors import UntrustedError
from glassllama.base.trust import make_folder
from glassllama.cli.console import note

KEPT_LINES = 1000
PRIVATE = 0o600  # what one says to a model is nobody else's business


@contextmanager
def line_editing() -> Iterator[None]:
    """While the body runs, input() edits lines and remembers them (where Python has readline)."""
    try:
        import readline
    except ImportError:  # Windows, whose console edits lines by itself
        yield
        return
    from glassllama.base.machine import cache_home

    path = cache_home() / "history"
    readline.set_history_length(KEPT_LINES)
    try:
        make_folder(path.parent)
        path.touch(mode=PRIVATE)
        readline.read_history_file(path)
    except (OSError, UntrustedError) as error:
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
        note(f"(lines are not remembered: {reason})")
        yield
        return
    try:
        yield
    finally:
        readline.write_history_file(path)
