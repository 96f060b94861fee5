"""Input and output of the verbs: results on stdout; notes, progress bars and errors on stderr.

Rich is imported when something is first drawn with it. On a stream that is not a terminal, tables
are as wide as their content and there are no progress bars.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Event, Thread, Timer
from typing import IO, TYPE_CHECKING, Any, Literal

from glassllama.base.errors import GlassError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from glassllama.base.interfaces import Progress

BAR_WIDTH = 20  # leaves room for amount, speed and remaining time in 80 columns
MAX_PROMPT_BYTES = 1 << 24  # more text than any context holds
STDIN_NOTICE_SECONDS = 2.0
STDIN_NOTICE = "reading standard input until it ends (for none: </dev/null)"
COMPILE_NOTICE_SECONDS = 2.0
COMPILING = "compiling for this processor: once, up to a minute"
COMPILING_AGAIN = "compiling for this processor: up to a minute"  # the cache cannot be used
UNLIMITED = 10_000  # columns of a stream that is not a terminal
ASCII_DRAWING = "ascii drawing"  # name of the error handler below
ASCII = str.maketrans(
    # bars and shades; frames; marks and arrows; the rest: one character for one
    "█▉▊▋▌▍▎▏" "▁▂▃▄▅▆▇" "░▒▓" "─━│┃└┘┌┐├┤┬┴┼╭╮╰╯" "✓✗" "→←↑↓↗↙↖↘↵⇥" "␣⟨⟩·…×÷√",
    "#######|" "_.-=+*%" ".+#" "--||+++++++++++++" "+x" "><^v//\\\\/>" "_<>..x/V",
)  # fmt: skip


def encode_as_ascii(error: UnicodeError) -> tuple[str, int]:
    """Error handler of codecs for outputs without UTF-8: similar ASCII characters, else `?`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(ASCII)
    return "".join(c if c.isascii() else "?" for c in text), error.end


codecs.register_error(ASCII_DRAWING, encode_as_ascii)


# --- output ---------------------------------------------------------------------------------------


def is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def write(text: str) -> None:
    """Write to stdout and flush."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """One line of JSON; escaped to ASCII where stdout is not UTF-8."""
    print(json.dumps(value, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8"))


def note(text: str) -> None:
    """A line on stderr: dim on a terminal."""
    sys.stdout.flush()  # keeps the order of both streams
    if is_terminal(sys.stderr):
        console("stderr").print(text, style="dim")
    else:
        print(text, file=sys.stderr)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout. A title that ends in `>` makes its column right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=any(columns))
    for title in columns:
        right = title.endswith(">")
        table.add_column(title.rstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console("stdout").print(table)


@cache
def console(stream: Literal["stdout", "stderr"]) -> Console:
    """A console without markup."""
    from rich.console import Console

    return Console(
        stderr=stream == "stderr",
        width=None if is_terminal(getattr(sys, stream)) else UNLIMITED,
        highlight=False,
        markup=False,
        emoji=False,
    )


@contextmanager
def compile_notice() -> Iterator[None]:
    """While the body runs: a note if code is being compiled for longer than two seconds."""
    from glassllama.native.jit.deferred_signals import compilations

    over = Event()
    thread = Thread(target=watch_compiling, args=(over, compilations.begun), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def watch_compiling(over: Event, before: int) -> None:
    """Print the note once more functions than `before` are being compiled, unless `over` first."""
    from glassllama.native.jit.deferred_signals import compilations

    while not over.wait(COMPILE_NOTICE_SECONDS):
        if compilations.begun > before:
            note(COMPILING_AGAIN if compiler_notes() else COMPILING)
            return


def compiler_notes() -> list[str]:
    """Why compiled code cannot be saved for other processes, if it cannot."""
    from glassllama.native.jit import code_cache

    return code_cache.notes


# --- progress bars --------------------------------------------------------------------------------


@contextmanager
def progress_bars() -> Iterator[Bars]:
    """Progress bars on stderr that disappear at the end; none if it is not a terminal."""
    bars = Bars()
    try:
        yield bars
    finally:
        if bars.live is not None:
            bars.live.stop()


class Bars:
    """Call it for a progress function `(done, total)`; its bar appears with the first call."""

    live: RichProgress | None = None

    def __call__(self, title: str, unit: str, *, after: float = 0) -> Progress | None:
        """`unit`: what is counted. `after`: seconds from the first call until the bar appears."""
        if not is_terminal(sys.stderr):
            return None
        task: TaskID | None = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None and done >= total:
                return
            if self.live is None:
                self.live = new_progress()
                self.live.start()
            if task is None:
                task = self.live.add_task(title, total=total, unit=unit, after=after)
            if done < total:
                self.live.update(task, completed=done)
            else:  # what follows (a checksum, compiling) reports no progress
                self.live.update(task, description="getting ready")
                self.live.tasks[task].total = None

        return show


def new_progress() -> RichProgress:
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text()
            text = amount(task.completed, task.total, task.speed, task.fields["unit"])
            return Text(text, no_wrap=True)

    class DelayedProgress(RichProgress):
        def get_renderables(self) -> Iterator[Any]:
            due = [t for t in self.tasks if (t.elapsed or 0) >= t.fields["after"]]
            if due:
                yield self.make_tasks_table(due)

    title = TextColumn("{task.description}", markup=False)
    columns = (title, BarColumn(BAR_WIDTH), Amount(), TimeRemainingColumn())
    return DelayedProgress(*columns, console=console("stderr"), transient=True)


def amount(done: float, total: float, rate: float | None, unit: str) -> str:
    """`12.0/98.4 MB 9.1/s`, `512/2,048 tokens 800/s`."""
    scale, digits, name = (1e6, 1, "MB") if unit == "bytes" else (1, 0, unit)
    speed = "" if rate is None else f" {rate / scale:,.{digits}f}/s"
    return f"{done / scale:,.{digits}f}/{total / scale:,.{digits}f} {name}{speed}"


# --- standard input -------------------------------------------------------------------------------


def text_or_stdin(text: str | None, name: str, max_bytes: int | None = None) -> str:
    """`text` if given, else all of stdin as UTF-8 without its last line end.

    Raises GlassError if stdin is a terminal, empty, not UTF-8, or longer than `max_bytes`.
    """
    if text is not None:
        return text
    if is_terminal(sys.stdin):
        raise GlassError(f"{name} is missing: give it as an argument or pipe it in")
    if not (text := read_stdin(max_bytes)):
        raise GlassError(f"{name} is missing: standard input is empty")
    return text


def prompt_from(text: str | None, name: str) -> str:
    """A prompt: `text`, a blank line and piped input; or the one of them that is given.

    Raises GlassError like `text_or_stdin`, but not for an empty stdin beside a `text`.
    """
    if text is None or is_terminal(sys.stdin):
        return text_or_stdin(text, name, MAX_PROMPT_BYTES)
    piped = read_stdin(MAX_PROMPT_BYTES)
    return f"{text}\n\n{piped}" if piped else text


def read_stdin(max_bytes: int | None) -> str:
    """All of stdin, which is not a terminal. A note says so if it takes long."""
    if sys.stdin is None or sys.stdin.closed:
        return ""
    size = -1 if max_bytes is None else max_bytes + 1
    notice = Timer(STDIN_NOTICE_SECONDS, note, [STDIN_NOTICE])
    notice.daemon = True
    notice.start()
    try:
        raw = sys.stdin.buffer.read(size)
    except OSError as error:
        raise GlassError(f"standard input: {error.strerror or error}") from None
    finally:
        notice.cancel()
    if max_bytes is not None and len(raw) > max_bytes:
        raise GlassError(f"standard input: more than {max_bytes:,} bytes, too long for any context")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GlassError(f"standard input: not UTF-8 at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


# --- files ----------------------------------------------------------------------------------------


def write_file(path: Path, text: str) -> None:
    """Write a UTF-8 file completely or not at all: a temporary file beside it is renamed.

    Links stay links; a pipe or device (/dev/stdout) is written to directly. Raises GlassError.
    """
    with naming(path):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        target = path.resolve()
        part = target.with_name(f"{target.name}.part")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a GlassError that names `path` (a full disk's does not)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise GlassError(f"{path}: cannot be written ({error.strerror or error})") from None
