"""Ctrl-C and SIGTERM while the first start compiles: the program ends soon, without other
output."""

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
    """The signal is sent when the first compiled file exists, while many others are missing.

    A slow or busy machine may have printed the notice about compiling by then.
    """
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
    os.kill(os.getpid(), signal.SIGINT)  # during compilation
    for _ in range(1000):
        pass  # at an instruction where Python calls handlers
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
def test_a_signal_during_compilation_is_raised_after_it(hold: str, says: str) -> None:
    """Without deferred signals the exception would come at once, so this tests deferring."""
    code = WHILE_COMPILING.format(hold=hold)
    if not hold:  # a second signal, in the second compilation, would end it
        code = code.replace("print(*ended, function(4)", "print(*ended")
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert ran.stdout.startswith(says), ran.stderr
