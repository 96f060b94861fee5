"""Ctrl-C and SIGTERM while the first start compiles: at once, and without a word too many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.programs import COMMAND, PATIENCE
from glassllama.cli.console import COMPILING


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_start_ends_while_it_compiles(
    sent: signal.Signals, code: int, default_model: Path, tmp_path: Path
) -> None:
    """When the first compiled file is there, many are still to come. (On a slow or busy machine it
    is said by then that code is being compiled.)"""
    with subprocess.Popen(
        [*COMMAND, "generate", "hi", "-n", "3", "-m", str(default_model)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"GLASSLLAMA_HOME": str(tmp_path)},
    ) as process:
        begun = time.monotonic()
        while not list(tmp_path.rglob("*.nbc")):
            assert process.poll() is None
            assert time.monotonic() - begun < PATIENCE, "nothing was compiled"
            time.sleep(0.02)
        process.send_signal(sent)
        out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert out == b""
    assert errors.decode().strip() in ("", COMPILING)


WHILE_COMPILING = """
import os, signal, threading, time
import numba
from glassllama.native.jit.deferred_signals import defer_signals_while_compiling
{hold}
compiling = threading.Event()

@numba.extending.intrinsic
def slowly(context, x):
    os.kill(os.getpid(), signal.SIGINT)  # in the middle of it
    for _ in range(1000):
        pass  # where Python calls handlers
    ended.append("typed")
    return x(x), lambda context, builder, signature, arguments: arguments[0]

@numba.njit
def function(x):
    return slowly(x)

ended = []
try:
    function(3)
except KeyboardInterrupt:
    ended.append("interrupted")
print(*ended, function(4), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize(
    ("hold", "says"),
    [("defer_signals_while_compiling()", "typed interrupted 4 True"), ("", "interrupted")],
)
def test_a_program_is_interrupted_when_the_compiler_is_done(hold: str, says: str) -> None:
    """And without the holding at once: so what is tested here is the holding."""
    code = WHILE_COMPILING.format(hold=hold)
    if not hold:  # the second signal, of the second compilation, would end it
        code = code.replace("print(*ended, function(4)", "print(*ended")
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert ran.stdout.startswith(says), ran.stderr
