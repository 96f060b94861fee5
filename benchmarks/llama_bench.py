"""Compare glassllama with a fork of llama.cpp by its own `llama-bench`, on the same file.

    python benchmarks/llama_bench.py PROGRAM MODEL [--flags="-rtr 1"]… [--runs 3] [--out FILE]

PROGRAM is a `llama-bench` that you have built. Each of its runs is a new process, which warms up,
processes a prompt of 512 tokens and generates 64; then glassllama does the same with the same
number of threads. llama-bench runs once without flags and once with every given set of flags; a
ratio compares with the best of these. MODEL is a short name or a GGUF file. Prints a table and one
line of JSON: medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from glassllama import load
from glassllama.base.machine import usable_cores
from glassllama.benchmark import (
    Cell,
    LLMRunner,
    Roofline,
    machine_info,
    prepare,
    random_ids,
    read_bandwidth,
    seconds_of,
    versions,
)

PROMPT, NEW = 512, 64
CELLS = (Cell("prefill", PROMPT), Cell("decode", NEW))
Speeds = tuple[float, ...]  # tokens per second of each cell


def theirs(program: str, path: Path, flags: str) -> Speeds:
    """Run `llama-bench` once."""
    command = [
        program, "-m", str(path), "-t", str(usable_cores()), "-p", str(PROMPT), "-n", str(NEW),
        "-r", "1", "-o", "json", *shlex.split(flags),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(done[done.index("[") :])
    speeds = {row["n_prompt"] > 0: float(row["avg_ts"]) for row in found}
    return speeds[True], speeds[False]


def ours(runner: LLMRunner, vocab_size: int, run: int) -> Speeds:
    speeds = []
    for cell in CELLS:
        prepare(runner, cell, vocab_size)
        seconds = seconds_of(runner, cell, random_ids(cell.tokens, vocab_size, run))
        speeds.append(cell.tokens / seconds)
    return tuple(speeds)


def compare(name: str, program: str, model: str, flags: list[str], runs: int) -> dict[str, Any]:
    """Medians over the runs; each run measures glassllama and all variants of the other program."""
    machine, llm = machine_info(), load(model)
    runner, roofline, threads = LLMRunner(llm), Roofline.of(llm), usable_cores()
    before = read_bandwidth(roofline.bytes, threads)
    found: dict[str, list[Speeds]] = {name: [] for name in ("glassllama", *flags)}
    for run in range(runs):
        found["glassllama"].append(ours(runner, roofline.vocab_size, run))
        for each in flags:
            found[each].append(theirs(program, llm.path, each))
    medians = {
        name: [median(run[n] for run in each) for n in range(len(CELLS))]
        for name, each in found.items()
    }
    return {
        "model": Path(model).name,
        "peer": name,
        "machine": machine,
        "versions": versions(),
        "runs": runs,
        "bandwidth": max(before, read_bandwidth(roofline.bytes, threads)),
        "rows": list(rows(medians, flags, roofline)),
    }


def rows(
    medians: dict[str, list[float]], flags: list[str], roofline: Roofline
) -> Iterator[dict[str, Any]]:
    for n, cell in enumerate(CELLS):
        peers = {each: medians[each][n] for each in flags}
        speed = medians["glassllama"][n]
        yield {"what": cell.what, "tokens": cell.tokens, "tok_s": speed, "peers": peers,
               "ratio": speed / max(peers.values()),
               "bytes_s": roofline.result(cell, speed, []).bytes_s}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--name", default="llama-bench", help="its name and version")
    parser.add_argument("--flags", action="append", default=[], help="for another run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    line = compare(given.name, given.program, given.model, ["", *given.flags], given.runs)
    print(f"{line['model']}, {line['peer']}")
    for row in line["rows"]:
        peers = ", ".join(f"{speed:.1f} {each}".strip() for each, speed in row["peers"].items())
        print(f"  {row['what']:8}{row['tok_s']:8.1f} tok/s; theirs {peers}: {row['ratio']:.2f}")
    print(json.dumps(line))
    if given.out:
        with given.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
