"""Forks of a process that has already imported the modules: they start in milliseconds.

A fork has its own environment, folder, output and exit code, and ends like any Python process.
`serve` runs in the process that forks; tests use it through `Server`.
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
PLACES = {"full": "/dev/full"}  # a full device


def serve(answer: Callable[[Any], object]) -> None:
    """Fork for each line of stdin and print the exit code; in the fork: call the function and
    return."""
    gc.collect()
    gc.freeze()  # so that forks do not free the objects of this process when they end
    for line in sys.stdin:
        request, *around = json.loads(line)
        child = os.fork()
        if child == 0:
            become(*around)
            answer(request)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(environment: dict[str, str], folder: str, out: str, err: str) -> None:
    """Make this process look as if it had been started with these arguments."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, place in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(without_reader() if place == "unread" else os.open(place, os.O_RDWR), number)
    signal.alarm(PATIENCE)


def without_reader() -> int:
    """The write end of a pipe whose read end is closed."""
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
            stderr=subprocess.PIPE,  # not a file: sys.stderr of a fork must not seek
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
        """The exit code and output of a fork that handles a request.

        `out`, `err`: "file": the output is returned; "unread": a pipe whose reader has closed it;
        "full": a full device.
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
    """The server of this test run."""
    return Server(script, *options)


def run_script(script: str, *arguments: object) -> str:
    """The output of a script run with these arguments, with PyTorch imported; it must succeed."""
    ran = server(WITH_TORCH).run([script, *map(str, arguments)])
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
