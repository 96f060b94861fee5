"""What a busy neighbour costs: decode speed beside a busy process, and alone.

    python benchmarks/neighbour.py [MODEL] [--new 64] [--rounds 5] [--out FILE]    (bench extra)

The process keeps one of two cores busy and does nothing else; it is stopped and let go on in turns,
and each time both engines decode, one after the other, on both cores. A perfect scheduler would
leave three quarters of the speed to them (half of a core is the neighbour's), or more where memory
is the limit; an engine whose threads wait for one another by spinning may lose far more. Prints a
table and one line of JSON: medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from glassllama import load
from glassllama.benchmark import (
    Cell,
    LlamaCppRunner,
    LLMRunner,
    Runner,
    machine_info,
    seconds_of,
    versions,
)

CORES = 2
SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@dataclass(frozen=True)
class Lost:
    """Tokens per second, and the share that the neighbour took."""

    name: str
    alone: float
    beside: float

    @property
    def share(self) -> float:
        return 1 - self.beside / self.alone


@contextmanager
def neighbour(core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps a core busy; stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", SPIN, str(core)])
    try:
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def measure(runners: list[Runner], core: int, new: int, rounds: int) -> list[Lost]:
    """Speeds of all, in turns, with the neighbour stopped and running."""
    cell = Cell("decode", new)
    rates: dict[tuple[int, bool], list[float]] = {}
    for each in runners:
        each.reset(1, new)
    with neighbour(core) as process:
        for _ in range(rounds):
            for busy in (False, True):
                process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
                for n, each in enumerate(runners):
                    each.decode(1)  # awake, before time counts
                    rates.setdefault((n, busy), []).append(new / seconds_of(each, cell, []))
                    each.rewind(0)
                    time.sleep(0.05)  # until its threads have gone to sleep
    return [
        Lost(each.name, median(rates[n, False]), median(rates[n, True]))
        for n, each in enumerate(runners)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    around, cores = machine_info(), sorted(os.sched_getaffinity(0))[:CORES]
    if len(cores) < CORES:
        sys.exit("needs two cores: on one there is nothing to share")
    os.sched_setaffinity(0, cores)
    llm = load(flags.model, backend="engine", threads=CORES)
    lost = measure(
        [LLMRunner(llm), LlamaCppRunner(llm.path, CORES)], cores[-1], flags.new, flags.rounds
    )
    for row in lost:
        print(f"{row.name:18} alone {row.alone:7.1f} tok/s   beside a busy process "
              f"{row.beside:7.1f}   lost {row.share:4.0%}")  # fmt: skip
    line = {"model": Path(flags.model).name, "new": flags.new, "rounds": flags.rounds,
            "machine": around, "versions": versions(),
            "rows": [asdict(row) | {"lost": row.share} for row in lost]}  # fmt: skip
    print(json.dumps(line))
    if flags.out:
        with flags.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
