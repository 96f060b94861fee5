"""Decode speed while another process keeps one core busy, compared with an idle machine.

    python benchmarks/busy_core.py [MODEL] [--new 64] [--rounds 5] [--out FILE]    (bench extra)

The other process runs an endless loop on one of two cores; it is stopped and continued alternately.
Each time, both programs decode one after the other, on both cores. With a fair scheduler they lose
a quarter of their speed (half of one core), or less if memory bandwidth is the limit. A program
whose threads spin while they wait for each other may lose far more. Prints a table and one line of
JSON: medians of the rounds.
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
class Rates:
    """Tokens per second without and with the other process, and the share that is lost."""

    name: str
    alone: float
    with_load: float

    @property
    def lost(self) -> float:
        return 1 - self.with_load / self.alone


@contextmanager
def busy_process(core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps a core busy. It is stopped (SIGSTOP) at first."""
    process = subprocess.Popen([sys.executable, "-c", SPIN, str(core)])
    try:
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def measure(runners: list[Runner], core: int, new: int, rounds: int) -> list[Rates]:
    """Speeds of all programs, with the other process stopped and running alternately."""
    cell = Cell("decode", new)
    rates: dict[tuple[int, bool], list[float]] = {}
    for each in runners:
        each.reset(1, new)
    with busy_process(core) as process:
        for _ in range(rounds):
            for busy in (False, True):
                process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
                for n, each in enumerate(runners):
                    each.decode(1)  # wakes the threads before time is measured
                    rates.setdefault((n, busy), []).append(new / seconds_of(each, cell, []))
                    each.rewind(0)
                    time.sleep(0.05)  # until its threads sleep
    return [
        Rates(each.name, median(rates[n, False]), median(rates[n, True]))
        for n, each in enumerate(runners)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    machine, cores = machine_info(), sorted(os.sched_getaffinity(0))[:CORES]
    if len(cores) < CORES:
        sys.exit("This benchmark needs two cores.")
    os.sched_setaffinity(0, cores)
    llm = load(flags.model, backend="engine", threads=CORES)
    rates = measure(
        [LLMRunner(llm), LlamaCppRunner(llm.path, CORES)], cores[-1], flags.new, flags.rounds
    )
    for row in rates:
        print(f"{row.name:18} alone {row.alone:7.1f} tok/s   with a busy process "
              f"{row.with_load:7.1f}   lost {row.lost:4.0%}")  # fmt: skip
    line = {"model": Path(flags.model).name, "new": flags.new, "rounds": flags.rounds,
            "machine": machine, "versions": versions(),
            "rows": [asdict(row) | {"lost": row.lost} for row in rates]}  # fmt: skip
    print(json.dumps(line))
    if flags.out:
        with flags.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
