"""How the program ends: what went wrong becomes one line and an exit code, never a traceback.

0 done · 1 error · 2 wrong usage · 130 Ctrl-C · 141 nobody reads the output · 143 SIGTERM
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from io import TextIOBase
from typing import IO, Any, NoReturn, cast

from glassllama.base.errors import GlassError, MemoryShortError, quoted
from glassllama.base.machine import address_space_left, gigabytes
from glassllama.cli import ascii_fallback
from glassllama.cli.wrap import fitted
from glassllama.native.jit import deferred_signals

ERROR, CTRL_C, BROKEN_PIPE, TERMINATED = 1, 130, 141, 143
DEBUG = "--debug"
OUT_OF_MEMORY = "out of memory: try a smaller or more quantised model, or a shorter context"
RAISE_LIMIT = ", or raise this shell's limit ('ulimit -v')"
REFUSED = ("failed to map segment", "cannot allocate memory", "can't allocate memory",
           "can't start new thread", "unable to allocate", "not enough memory")  # fmt: skip
# Bytes of address space that these take, compiling included, and half as much again. They abort
# where they get less: nothing that Python could catch.
LIBRARIES = {"numpy": 200_000_000, "numba": 1_000_000_000, "torch": 1_000_000_000}
SHOW_CURSOR = "\x1b[?25h"


class Closed(TextIOBase):
    """A standard output that the caller has closed, as `>&-` does: an answer would be lost.

    `place` keeps its number taken, so that no file of ours gets it.
    """

    def __init__(self, place: IO[Any]) -> None:
        self.place = place

    def write(self, _: str) -> NoReturn:
        raise OSError(errno.EBADF, "closed, so that nothing can be written to it", "stdout")

    def reconfigure(self, **_: object) -> None:
        """Nothing is encoded."""


class ShortOfMemory(MetaPathFinder):
    """Refuses in one line to load a library that would end the process, for lack of memory."""

    def find_spec(self, name: str, *_: object) -> None:
        needed, left = LIBRARIES.get(name), address_space_left()
        if needed is not None and left is not None and left < needed:
            raise MemoryShortError(
                f"out of memory: {name} needs about {gigabytes(needed)} of address space, "
                f"{gigabytes(left)} are left: raise this shell's limit ('ulimit -v')"
            )


def prepare() -> None:
    """Before anything is printed: output that any locale can take, and a handler for SIGTERM."""
    if address_space_left() is not None:
        sys.meta_path.insert(0, ShortOfMemory())
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as `<&-` does
            stream = open(os.devnull, mode)  # noqa: SIM115 -- open to the very end, in its place
            setattr(sys, name, stream if name != "stdout" else Closed(stream))
    for stream in (sys.stdout, sys.stderr):
        cast(Any, stream).reconfigure(errors=ascii_fallback.NAME)
    signal.signal(signal.SIGTERM, _terminated)
    deferred_signals.instead = {signal.default_int_handler: _leave, _terminated: _leave}


def _leave(number: signal.Signals) -> NoReturn:
    """End at once, in the middle of compiling: nothing is lost but what is not compiled yet."""
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)  # a bar may have hidden it
    if number == signal.SIGINT:
        sys.stderr.write("\n")  # leave the line that shows ^C
    sys.stderr.flush()
    os._exit(128 + number)


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)


def code_of(program: Callable[[], object], *, unexpected: bool = True) -> int:
    """Run `program` -> its exit code, after saying on stderr what went wrong.

    With `unexpected` off, exceptions that are no fault of the user's or the machine's pass through:
    the parser's own are among them.
    """
    try:
        program()
        sys.stdout.flush()
    except SystemExit as end:
        return _flushed(end.code if isinstance(end.code, int) else int(end.code is not None))
    except KeyboardInterrupt:
        _say("\n")  # leave the line that shows ^C
        return CTRL_C
    except BrokenPipeError:
        _silence(sys.stdout, sys.stderr)
        return BROKEN_PIPE
    except Exception as error:
        line = foreseen(error)
        if line is None and (not unexpected or DEBUG in sys.argv):
            raise
        return failed(line or _report(error))
    return 0


def foreseen(error: Exception) -> str | None:
    """The line for a fault that the user or the machine can do something about, else None."""
    if is_of_memory(error.__cause__ if isinstance(error, GlassError) else error):
        return OUT_OF_MEMORY + (RAISE_LIMIT if address_space_left() is not None else "")
    if isinstance(error, GlassError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename or "input or output"
        shown = quoted(name) if error.errno == errno.ENAMETOOLONG else name
        return f"{shown}: {error.strerror}"
    return None


def is_of_memory(error: BaseException | None) -> bool:
    """Whether the system refused memory: libraries say so in many ways, and hide one in another."""
    while error is not None:
        refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
        text = str(error).lower()
        if refused or isinstance(error, MemoryError) or any(words in text for words in REFUSED):
            return not isinstance(error, GlassError)
        error = error.__cause__ or error.__context__
    return False


def failed(message: str) -> int:
    """Print the one line of an error -> the exit code 1."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    _flushed(ERROR)
    _say(fitted(f"error: {line}\n", sys.stderr))
    return ERROR


def _say(text: str) -> None:
    """Write to stderr; where nobody can read it, the exit code has to do."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)


def _report(error: Exception) -> str:
    return (
        f"unexpected {type(error).__name__} ({error}): a fault of glassllama's own; please report "
        f"it with what the same command prints as 'glassllama {DEBUG} …'"
    )


def _flushed(code: int) -> int:
    """Write out what is left of the answer -> the exit code, another one where that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        _silence(sys.stdout)
        return code or failed(f"stdout: {error.strerror}")
    return code


def _silence(*streams: IO[Any]) -> None:
    """Let Python's own flush at the very end succeed, or it would complain in many lines."""
    for stream in streams:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
        except (OSError, ValueError):  # it has no number, or is closed
            continue
