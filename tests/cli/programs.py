"""Real runs of the command line: as a process with pipes, and as a process on a terminal."""

from __future__ import annotations

import atexit
import json
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
from functools import lru_cache

REACTION = 0.1  # seconds
COMMAND = [sys.executable, "-m", "glassllama"]
PATIENCE = 300  # seconds until something that never comes is given up
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The program with these arguments, nothing on stdin unless `input` says otherwise."""
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


FORKS = """
import gc, json, os, sys, tempfile
from glassllama.__main__ import main
import glassllama.cli.app, glassllama.engine.executor

def unread():
    reader, writer = os.pipe()
    os.close(reader)
    return writer

places = {"unread": unread, "full": lambda: os.open("/dev/full", os.O_WRONLY)}

def ended(folder, arguments, kinds):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, file, kind in zip((1, 2), (out, err), kinds):
                os.dup2(places[kind]() if kind in places else file.fileno(), number)
            os.chdir(folder)
            sys.argv[1:] = arguments
            main()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return [code, *((file.seek(0), file.read().decode())[1] for file in (out, err))]

gc.freeze()  # a child that ends need not look at what it was born with
for request in sys.stdin:
    folder, lines, kinds = json.loads(request)
    print(json.dumps([ended(folder, line, kinds) for line in lines]), flush=True)
"""


@lru_cache(maxsize=1)
def forking() -> subprocess.Popen[str]:
    """A process that has imported what the verbs import, and forks a child for each line."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,  # as stdout no file: what children inherit cannot be sought in
        encoding="utf-8",
    )
    atexit.register(process.kill)
    return process


def run_many(
    lines: list[list[str]], out: str = "file", err: str = "file"
) -> list[subprocess.CompletedProcess[str]]:
    """The program once for each line, in the current folder, as forks of `forking()`.

    `out`, `err`: "file", what is printed comes back; "unread", a pipe whose reader has gone;
    "full", a device without room.
    """
    process = forking()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([os.getcwd(), lines, [out, err]]) + "\n")
    process.stdin.flush()
    assert select.select([process.stdout], [], [], PATIENCE)[0], "no answer"
    answer = process.stdout.readline()
    assert answer, process.communicate()[1]
    return [
        subprocess.CompletedProcess(line, code, out, err)
        for line, (code, out, err) in zip(lines, json.loads(answer), strict=True)
    ]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing larger ones fails in here, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def is_clean_error(process: subprocess.CompletedProcess[str], *words: str) -> bool:
    """Code 1, nothing on stdout, and one line on stderr that begins with "error:"."""
    lines = process.stderr.splitlines()
    assert process.returncode == 1, process.stderr
    assert process.stdout == ""
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    assert "unexpected" not in lines[0]
    for word in words:
        assert word in lines[0]
    return True


class Terminal:
    """The program on a terminal of 80 columns; `screen` is what it wrote, without controls."""

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
        """Type it, as late as a person would: readline shows its prompt a moment before it listens.

        A Ctrl-C between the two is noticed with the next key only (CPython's readline.c).
        """
        time.sleep(REACTION)
        os.write(self.master, text.encode())

    def ctrl_c(self) -> None:
        self.send("\x03")

    def ctrl_d(self) -> None:
        self.send("\x04")

    def wait_for(self, text: str) -> str:
        """Read until `text` appears -> what came up to it; later calls look behind it."""
        limit = time.monotonic() + PATIENCE
        while text not in self.screen:
            assert time.monotonic() < limit, f"never came: {text!r} after {self.screen[-500:]!r}"
            if not self._read():
                raise AssertionError(f"ended before {text!r}: {self.screen[-500:]!r}")
        before, _, self.screen = self.screen.partition(text)
        return before

    def end(self) -> int:
        """Wait until it has ended -> its exit code."""
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
        except OSError:  # Linux: the other side is closed
            return False
        self.raw += data.decode(errors="replace")
        self.screen += CONTROLS.sub("", data.decode(errors="replace"))
        return bool(data)
