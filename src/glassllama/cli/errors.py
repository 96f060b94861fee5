"""How the program ends: each error is one line on stderr and an exit code, never a traceback.

0 done · 1 error · 2 wrong usage · 130 Ctrl-C · 141 broken pipe · 143 SIGTERM
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from io import TextIOBase
from typing import IO, Any, NoReturn, cast

from glassllama.base.errors import GlassError, MemoryShortError, quoted
from glassllama.base.machine import address_space_left, gigabytes
from glassllama.cli.console import ASCII_DRAWING
from glassllama.cli.render import wrapped
from glassllama.native.jit import deferred_signals

ERROR, WRONG_USAGE, CTRL_C, BROKEN_PIPE, TERMINATED = 1, 2, 130, 141, 143
OUT_OF_MEMORY = "out of memory: try a smaller or more quantized model, or a shorter context"
RAISE_LIMIT = ", or raise this shell's limit ('ulimit -v')"
MEMORY_REFUSED = (  # in the messages of libraries
    "failed to map segment", "cannot allocate memory", "can't allocate memory",
    "can't start new thread", "unable to allocate", "not enough memory",
)  # fmt: skip
# Address space in bytes that importing these takes (compiling included), times 1.5. With less they
# abort the process.
LIBRARIES = {"numpy": 200_000_000, "numba": 1_000_000_000, "torch": 1_000_000_000}
SHOW_CURSOR = "\x1b[?25h"


class ClosedStdout(TextIOBase):
    """Standard output that the caller has closed (`>&-`): writing is an error.

    `placeholder` keeps file descriptor 1 in use, so that no opened file gets it.
    """

    def __init__(self, placeholder: IO[Any]) -> None:
        self.placeholder = placeholder

    def write(self, _: str) -> NoReturn:
        raise OSError(errno.EBADF, "closed, nothing can be written to it", "stdout")

    def reconfigure(self, **_: object) -> None:
        """Nothing is encoded."""


class AddressSpaceCheck:
    """Import hook: a library that would abort for lack of address space is an error instead."""

    def find_spec(self, name: str, *_: object) -> None:
        needed, left = LIBRARIES.get(name), address_space_left()
        if needed is not None and left is not None and left < needed:
            raise MemoryShortError(
                f"out of memory: {name} needs about {gigabytes(needed)} of address space, "
                f"{gigabytes(left)} are left: raise this shell's limit ('ulimit -v')"
            )


def prepare() -> None:
    """Before anything is printed: output in any encoding, missing streams, a SIGTERM handler."""
    if address_space_left() is not None:
        sys.meta_path.insert(0, cast(Any, AddressSpaceCheck()))
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, such as `<&-`
            stream = open(os.devnull, mode)  # noqa: SIM115 -- stays open to the end
            setattr(sys, name, stream if name != "stdout" else ClosedStdout(stream))
    for stream in (sys.stdout, sys.stderr):
        cast(Any, stream).reconfigure(errors=ASCII_DRAWING)
    signal.signal(signal.SIGTERM, _on_sigterm)
    deferred_signals.instead = {
        signal.default_int_handler: _exit_at_once,
        _on_sigterm: _exit_at_once,
    }


def _exit_at_once(number: signal.Signals) -> NoReturn:
    """End in the middle of compiling: only what is not yet compiled is lost."""
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)  # a progress bar may have hidden it
    if number == signal.SIGINT:
        sys.stderr.write("\n")  # after the line that shows ^C
    sys.stderr.flush()
    os._exit(128 + number)


def _on_sigterm(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)


def exit_code_of(program: Callable[[], object], *, debug: bool = False) -> int:
    """Run `program` and print its error, if any -> exit code. `debug`: unexpected errors raise."""
    try:
        program()
        sys.stdout.flush()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # how Rich ends then
            _redirect_to_null(sys.stdout, sys.stderr)
            return BROKEN_PIPE
        return _flush_stdout(end.code if isinstance(end.code, int) else int(end.code is not None))
    except KeyboardInterrupt:
        _write_stderr("\n")  # after the line that shows ^C
        return CTRL_C
    except BrokenPipeError:
        _redirect_to_null(sys.stdout, sys.stderr)
        return BROKEN_PIPE
    except Exception as error:
        message = user_message(error)
        if message is None and debug:
            raise
        return print_error(message or _unexpected_message(error))
    return 0


def user_message(error: Exception) -> str | None:
    """The line for an error that the user can do something about; None for a bug."""
    if is_out_of_memory(error.__cause__ if isinstance(error, GlassError) else error):
        return OUT_OF_MEMORY + (RAISE_LIMIT if address_space_left() is not None else "")
    if isinstance(error, GlassError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename or "input or output"
        shown = quoted(name) if error.errno == errno.ENAMETOOLONG else name
        return f"{shown}: {error.strerror}"
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the system refused memory: libraries report it in many ways, also as a cause."""
    while error is not None:
        no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
        text = str(error).lower()
        if no_memory or isinstance(error, MemoryError) or any(x in text for x in MEMORY_REFUSED):
            return not isinstance(error, GlassError)
        error = error.__cause__ or error.__context__
    return False


def print_error(message: str) -> int:
    """Print an error as one line -> exit code 1."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    _flush_stdout(ERROR)
    _write_stderr(wrapped(f"error: {line}\n", sys.stderr))
    return ERROR


def _write_stderr(text: str) -> None:
    """If stderr cannot be written to, the exit code has to suffice."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _redirect_to_null(sys.stderr)


def _unexpected_message(error: Exception) -> str:
    return (
        f"unexpected {type(error).__name__} ({error}): a bug of glassllama; please report it with "
        "the output of the same command as 'glassllama --debug …'"
    )


def _flush_stdout(code: int) -> int:
    """Flush stdout -> `code`, or another exit code if that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _redirect_to_null(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        _redirect_to_null(sys.stdout)
        return code or print_error(f"stdout: {error.strerror}")
    return code


def _redirect_to_null(*streams: IO[Any]) -> None:
    """Make Python's own flush at exit succeed; otherwise it prints several lines."""
    for stream in streams:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
        except (OSError, ValueError):  # no file descriptor, or closed
            continue
