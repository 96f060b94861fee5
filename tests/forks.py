"""Processes forked from one that has made the imports: they begin in milliseconds.

Such a process has an environment, a folder, an output and an exit code of its own, and ends as
every Python process does. `serve` runs in the process that forks; tests use it as a `Server`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

PATIENCE = 300  # seconds until a process that does not end is killed
WITH_TORCH = Path(__file__).parent / "with_torch.py"
PLACES = {"full": "/dev/full"}  # a device without room


def serve(answer: Callable[[Any], object]) -> None:
    """Fork for each line of stdin and print the exit code; in the fork: answer, and return."""
    gc.collect()
    gc.freeze()  # so that no fork, when it ends, collects what it has got from here
    for line in sys.stdin:
        request, *around = json.loads(line)
        child = os.fork()
        if child == 0:
            become(*around)
            answer(request)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(environment: dict[str, str], folder: str, out: str, err: str) -> None:
    """This process as if it had been started with these."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, place in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(without_reader() if place == "unread" else os.open(place, os.O_RDWR), number)
    signal.alarm(PATIENCE)


def without_reader() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


class Server:
    """A process that runs a script which ends in `serve`."""

    def __init__(self, script: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *options, str(script)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # as stdout no file: sys.stderr of a fork must not seek in it
            encoding="utf-8",
        )
        atexit.register(self.process.kill)

    def run(
        self,
        request: Any,
        environment: Mapping[str, str] | None = None,
        folder: Path | str = ".",
        out: str = "file",
        err: str = "file",
    ) -> subprocess.CompletedProcess[str]:
        """How a fork that answers a request ends.

        `out`, `err`: "file", what is printed comes back; "unread", a pipe whose reader has gone;
        "full", a device without room.
        """
        with NamedTemporaryFile() as first, NamedTemporaryFile() as second:
            files = {"file": first.name, **PLACES}, {"file": second.name, **PLACES}
            places = [names.get(kind, kind) for names, kind in zip(files, (out, err), strict=True)]
            environment = dict(os.environ if environment is None else environment)
            code = self._ask([request, environment, str(Path(folder).absolute()), *places])
            texts = (file.read().decode() for file in (first, second))
            return subprocess.CompletedProcess(request, code, *texts)

    def _ask(self, line: list[Any]) -> int:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(line), file=stdin, flush=True)
        assert select.select([stdout], [], [], 2 * PATIENCE)[0], "no answer"
        answer = stdout.readline()
        assert answer, self.process.communicate()[1]
        return int(answer)


@cache
def server(script: Path, *options: str) -> Server:
    """The one of this test run."""
    return Server(script, *options)


def run_script(script: str, *arguments: object) -> str:
    """What a script prints that is run with these arguments, PyTorch imported; it must end well."""
    ran = server(WITH_TORCH).run([script, *map(str, arguments)])
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
