"""Runs the command line in a real process, with pipes or on a terminal."""

from __future__ import annotations

import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

from forks import server
from glassllama.cli.console import COMPILING

REACTION = 0.1  # seconds
COMMAND = [sys.executable, "-m", "glassllama"]
PATIENCE = 300  # seconds until a test stops waiting
FORKED = Path(__file__).parent / "forked.py"
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the program with these arguments; stdin is empty unless `input` is given."""
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    environment = os.environ | dict(options.pop("env", {}))  # type: ignore[call-overload]
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        **options,  # type: ignore[call-overload]
    )


def run_many(
    lines: list[list[str]], out: str = "file", err: str = "file"
) -> list[subprocess.CompletedProcess[str]]:
    """Run the program once per line, in the current folder, as forks of one process."""
    return [server(FORKED).run(line, out=out, err=err) for line in lines]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Make writing larger files fail in this context, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def error_lines(stderr: str) -> list[str]:
    """The lines of stderr without the notice that code is being compiled."""
    return [line for line in stderr.splitlines() if line != COMPILING]


def is_clean_error(process: subprocess.CompletedProcess[str], *words: str) -> bool:
    """Code 1, nothing on stdout, and one line on stderr that begins with "error:"."""
    lines = error_lines(process.stderr)
    assert process.returncode == 1, process.stderr
    assert process.stdout == ""
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    assert "unexpected" not in lines[0]
    for word in words:
        assert word in lines[0]
    return True


class Terminal:
    """The program on a terminal of 80 columns; `screen` is its output without control sequences."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        environment |= {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""} | (env or {})
        self.screen, self.raw = "", ""
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def send(self, text: str) -> None:
        """Type text after a short delay: readline prints its prompt shortly before it reads.

        A Ctrl-C between the two is handled only after the next key (CPython's readline.c).
        """
        time.sleep(REACTION)
        os.write(self.master, text.encode())

    def ctrl_c(self) -> None:
        self.send("\x03")

    def ctrl_d(self) -> None:
        self.send("\x04")

    def wait_for(self, text: str) -> str:
        """Read until `text` appears -> the output before it; later calls search after it."""
        limit = time.monotonic() + PATIENCE
        while text not in self.screen:
            assert time.monotonic() < limit, f"timeout: no {text!r} after {self.screen[-500:]!r}"
            if not self._read():
                raise AssertionError(f"ended before {text!r}: {self.screen[-500:]!r}")
        before, _, self.screen = self.screen.partition(text)
        return before

    def end(self) -> int:
        """Wait until the program has ended -> its exit code."""
        while self._read():
            pass
        os.close(self.master)
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.end()

    def _read(self) -> bool:
        if not select.select([self.master], [], [], PATIENCE)[0]:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # Linux: the other end is closed
            return False
        self.raw += data.decode(errors="replace")
        self.screen += CONTROLS.sub("", data.decode(errors="replace"))
        return bool(data)
