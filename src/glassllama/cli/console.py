"""What the verbs print with: answers to stdout; notes, progress and errors to stderr.

Rich is imported when the first table or bar is drawn. Where a stream is no terminal, tables are as
wide as their content and there are no bars; NO_COLOR is Rich's to honour.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock, Timer
from typing import IO, TYPE_CHECKING, Any, Literal

from glassllama.base.errors import GlassError
from glassllama.cli.wrap import fitted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from glassllama.base.interfaces import Progress

BAR_WIDTH = 20  # so that bar, amount, rate and time left fit into 80 columns
MOST_PROMPT = 1 << 24  # bytes of a prompt: 16 MiB of text are more than a context holds
WAITING_SECONDS = 2.0
WAITING = "reading standard input until it ends (for none: </dev/null)"
UNLIMITED = 10_000  # columns, where no window sets a width


def is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def write(text: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """One line of JSON; characters that the output's encoding may lack are escaped."""
    print(json.dumps(value, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8"))


def note(text: str) -> None:
    """A line beside the answer: dim on a terminal."""
    sys.stdout.flush()  # keep the order in which things happened
    if is_terminal(sys.stderr):
        console("stderr").print(fitted(text, sys.stderr), style="dim", soft_wrap=True)
    else:
        print(text, file=sys.stderr)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout. A column whose title ends in `>` is aligned to the right."""
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
    """Rich's view of a stream: plain text in, nothing in it is markup."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:  # Rich would leave with code 1
            raise BrokenPipeError

    file = getattr(sys, stream)
    return Screen(
        stderr=stream == "stderr",
        width=None if is_terminal(file) else UNLIMITED,
        highlight=False,
        markup=False,
        emoji=False,
    )


@contextmanager
def progress_bars() -> Iterator[Bars]:
    """Bars on stderr with rate and time left, gone at the end; none where it is no terminal."""
    bars = Bars()
    try:
        yield bars
    finally:
        bars.stop()


class Bars:
    """One bar for each long piece of work; a bar appears when the work is first heard of."""

    def __init__(self) -> None:
        self._live: RichProgress | None = None
        self._waiting: list[AfterAWhile] = []

    def __call__(self, title: str, unit: str, *, after: float = 0) -> Progress | None:
        """What to tell the work's progress to, which is counted in `unit`.

        The bar appears when the work has lasted for `after` seconds, if it says at its beginning
        that it begins.
        """
        if not is_terminal(sys.stderr):
            return None
        task: TaskID | None = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None and done >= total:  # over before it was heard of
                return
            if self._live is None:
                self._live = new_bars()
                self._live.start()
            if task is None:
                task = self._live.add_task(title, total=total, unit=unit)
            if done < total:
                self._live.update(task, completed=done)
            else:  # what follows (a checksum, compiling) does not say how far it is
                self._live.update(task, description="getting ready")
                self._live.tasks[task].total = None

        if after == 0:
            return show
        self._waiting.append(AfterAWhile(show, after))
        return self._waiting[-1]

    def stop(self) -> None:
        for waiting in self._waiting:
            waiting.stop()
        if self._live is not None:
            self._live.stop()


class AfterAWhile:
    """Passes progress on when some seconds have gone by: at that moment, whatever the work does."""

    def __init__(self, show: Progress, seconds: float) -> None:
        self._show, self._latest = show, (0, 0)
        self._turn = Lock()
        self._open = False
        self._timer = Timer(seconds, self._begin)
        self._timer.daemon = True

    def __call__(self, done: int, total: int) -> None:
        with self._turn:
            self._latest = (done, total)
            if self._open:
                self._show(done, total)
            elif self._timer.ident is None:
                self._timer.start()

    def _begin(self) -> None:
        with self._turn:
            if not self._timer.finished.is_set():  # stop() came first
                self._open = True
                self._show(*self._latest)

    def stop(self) -> None:
        with self._turn:
            self._timer.cancel()
            self._open = False


def new_bars() -> RichProgress:
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text()
            text = amount(task.completed, task.total, task.speed, task.fields["unit"])
            return Text(text, no_wrap=True)

    title = TextColumn("{task.description}", markup=False)
    columns = (title, BarColumn(BAR_WIDTH), Amount(), TimeRemainingColumn())
    return RichProgress(*columns, console=console("stderr"), transient=True)


def amount(done: float, total: float, rate: float | None, unit: str) -> str:
    """`12.0/98.4 MB 9.1/s`, `512/2,048 tokens 800/s`: how far and how fast."""
    scale, digits, name = (1e6, 1, "MB") if unit == "bytes" else (1, 0, unit)
    speed = "" if rate is None else f" {rate / scale:,.{digits}f}/s"
    return f"{done / scale:,.{digits}f}/{total / scale:,.{digits}f} {name}{speed}"


def text_or_stdin(text: str | None, what: str, most: int | None = None) -> str:
    """`text` as given, else all of stdin as UTF-8, its last line end left out.

    Raises GlassError where stdin is a terminal, empty, not UTF-8, or longer than `most` bytes.
    """
    if text is not None:
        return text
    if is_terminal(sys.stdin):
        raise GlassError(f"{what} is missing: give it as an argument or pipe it in")
    if not (text := stdin_text(most)):
        raise GlassError(f"{what} is missing: standard input is empty")
    return text


def text_and_stdin(text: str | None, what: str) -> str:
    """A prompt: `text`, a blank line, and what is piped in; or the one of them that is there.

    Raises GlassError as `text_or_stdin` does, except for an empty stdin beside a `text`.
    """
    if text is None or is_terminal(sys.stdin):
        return text_or_stdin(text, what, MOST_PROMPT)
    piped = stdin_text(MOST_PROMPT)
    return f"{text}\n\n{piped}" if piped else text


def stdin_text(most: int | None) -> str:
    """All of stdin, which is no terminal, without its last line end; what is wrong is said."""
    with note_after(WAITING_SECONDS, WAITING):
        raw = _stdin_bytes(most)
    if most is not None and len(raw) > most:
        raise GlassError(f"standard input: more than {most:,} bytes, which no context holds")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GlassError(f"standard input: not UTF-8 at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


@contextmanager
def note_after(seconds: float, text: str) -> Iterator[None]:
    """A note, where the body takes longer than that."""
    timer = Timer(seconds, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _stdin_bytes(most: int | None) -> bytes:
    """All of stdin; of one that is longer than `most`, as much as shows it."""
    if sys.stdin is None or sys.stdin.closed:
        return b""
    size = -1 if most is None else most + 1
    buffer: Any = getattr(sys.stdin, "buffer", None)
    try:
        raw: bytes = buffer.read(size) if buffer is not None else sys.stdin.read(size).encode()
    except OSError as error:
        raise GlassError(f"standard input: {error.strerror or error}") from None
    return raw
