"""The record: what was measured on one machine, held against the targets -> benchmarks/RECORD.md.

    python benchmarks/record.py                                 write the page from what is there
    python benchmarks/record.py --measure [--models FOLDER]     measure what is missing, then write
    python benchmarks/record.py --measure --again 1b-Q4_0       measure this line anew

One line, one file in benchmarks/results/record/: what is there is not measured again, so a run that
was stopped goes on where it was. Models that come in no package are written into FOLDER one at a
time (benchmarks/synthetic.py, widened.py) and deleted again, unless they were there before.
Everything takes about 25 minutes on two idle cores, beside a fork (--llama-bench) 16 more; 10 GB of
disk and 16 GB of memory. It needs the bench extra.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from record_page import BESIDE_IK, DEFAULT, HERE, LINES, PAGE, PROGRAM, WIDENED, Line, page

from glassllama.weights import packed_cache


def measure(line: Line, models: Path, program_of_fork: str) -> None:
    """Run a line's command in a process of its own and keep what it found."""
    with model_file(line.model, models) as model:
        words = shlex.split(line.command.replace("MODEL", shlex.quote(model)))
        words = [program_of_fork if word == PROGRAM else word for word in words]
        program = [sys.executable, "-m"] if words[0] == "glassllama" else [sys.executable]
        rest = words if words[0] == "glassllama" else words[1:]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "line.jsonl"
            subprocess.run([*program, *rest, "--out", str(out)], check=True, cwd=HERE.parent)
            found = json.loads(out.read_text())
    found["model"] = line.model
    whole = {
        "line": line.name,
        "date": datetime.date.today().isoformat(),
        "code": code(),
        "result": found,
    }
    line.result.parent.mkdir(parents=True, exist_ok=True)
    line.result.write_text(json.dumps(whole, indent=1) + "\n")


@contextmanager
def model_file(model: str, models: Path) -> Iterator[str]:
    """The name or path to be given; a file that was not there is made, and deleted afterwards."""
    shape, _, kind = model.partition("-")
    path = models / f"{model}.gguf"
    if model == DEFAULT or path.exists():
        yield model if model == DEFAULT else str(path)
        return
    before = set(packed_cache.folder().glob("*.packed"))
    random = ["synthetic.py", "--shape", shape]
    script, *options = ["widened.py"] if shape == WIDENED else random
    words = [str(HERE / script), str(models), *options, "--type", kind]
    try:
        subprocess.run([sys.executable, *words], check=True)
        yield str(path)
    finally:
        path.unlink(missing_ok=True)
        for packed in set(packed_cache.folder().glob("*.packed")) - before:
            packed.unlink()


def code() -> str:
    """The commit that was measured, where git knows."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    asked = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def warm_up() -> None:
    """Compile what the default model needs: its load is measured with that done."""
    words = ["-m", "glassllama", "bench", DEFAULT, "--prompt", "16", "--new", "1", "--runs", "1"]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def measure_missing(models: Path, again: set[str], program_of_fork: str) -> None:
    warm_up()
    for line in LINES:
        if line.result.exists() and line.name not in again:
            continue
        if line.command == BESIDE_IK and not program_of_fork:
            continue
        started = time.perf_counter()
        print(f"\n=== {line.name}: {line.command.replace('MODEL', line.model)}", flush=True)
        print(f"load average before: {os.getloadavg()[0]:.2f}", flush=True)
        measure(line, models, program_of_fork)
        print(f"=== {line.name}: {time.perf_counter() - started:.0f} s", flush=True)
        PAGE.write_text(page())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--again", action="append", default=[], metavar="LINE")
    parser.add_argument("--llama-bench", default="", help="of ik_llama.cpp, to measure beside it")
    parser.add_argument("--models", type=Path, help="where files of random weights are, or may be")
    flags = parser.parse_args()
    unknown = set(flags.again) - {line.name for line in LINES}
    if unknown:
        sys.exit(f"{', '.join(unknown)}: the lines are {', '.join(line.name for line in LINES)}")
    if flags.measure:
        with tempfile.TemporaryDirectory() as folder:
            models = flags.models or Path(folder)
            measure_missing(models.absolute(), set(flags.again), flags.llama_bench)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
