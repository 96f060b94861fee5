"""The speed record: writes benchmarks/RECORD.md and the table of the README from stored results.

    python benchmarks/record.py                                 write both from the stored results
    python benchmarks/record.py --measure [--models FOLDER]     measure what is missing, then write
    python benchmarks/record.py --measure --again 1b-Q4_0       repeat one measurement

Each measurement is one file in benchmarks/results/record/. A measurement that has a file is
skipped, so an interrupted run continues. Models with random weights are written into FOLDER one at
a time (benchmarks/synthetic.py, padded.py) and deleted afterwards, unless they existed before. All
measurements take 25 minutes on two idle cores, those against ik_llama.cpp (--llama-bench) 16 more;
they need 10 GB of disk, 16 GB of memory and the bench extra.
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

from record_page import (
    DEFAULT,
    HERE,
    IK_COMMAND,
    LINES,
    PADDED,
    PAGE,
    PROGRAM,
    README,
    REAL,
    Line,
    page,
    readme,
)

from glassllama.weights import packed_cache


def measure(line: Line, models: Path, fork_program: str) -> None:
    """Run the command of a line in its own process and store its results."""
    with model_file(line.model, models) as model:
        words = shlex.split(line.command.replace("MODEL", shlex.quote(model)))
        words = [fork_program if word == PROGRAM else word for word in words]
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
    """Name or path of the model; a file that did not exist is written, and deleted afterwards."""
    shape, _, kind = model.partition("-")
    path = models / f"{model}.gguf"
    if model in REAL or path.exists():
        yield model if model in REAL else str(path)
        return
    before = set(packed_cache.folder().glob("*.packed"))
    random = ["synthetic.py", "--shape", shape]
    script, *options = ["padded.py"] if shape == PADDED else random
    words = [str(HERE / script), str(models), *options, "--type", kind]
    try:
        subprocess.run([sys.executable, *words], check=True)
        yield str(path)
    finally:
        path.unlink(missing_ok=True)
        for packed in set(packed_cache.folder().glob("*.packed")) - before:
            packed.unlink()


def code() -> str:
    """The commit of the measured code, or "unknown"."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def warm_up() -> None:
    """Compile the code of the default model: load times are measured without compiling."""
    words = ["-m", "glassllama", "bench", DEFAULT, "--prompt", "16", "--new", "1", "--runs", "1"]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def measure_missing(models: Path, again: set[str], fork_program: str) -> None:
    warm_up()
    for line in LINES:
        if line.result.exists() and line.name not in again:
            continue
        if line.command == IK_COMMAND and not fork_program:
            continue
        started = time.perf_counter()
        print(f"\n=== {line.name}: {line.command.replace('MODEL', line.model)}", flush=True)
        print(f"load average before: {os.getloadavg()[0]:.2f}", flush=True)
        measure(line, models, fork_program)
        print(f"=== {line.name}: {time.perf_counter() - started:.0f} s", flush=True)
        write_pages()


def write_pages() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--again", action="append", default=[], metavar="LINE")
    parser.add_argument("--llama-bench", default="", help="path of ik_llama.cpp's program")
    parser.add_argument("--models", type=Path, help="folder for files of random weights")
    flags = parser.parse_args()
    unknown = set(flags.again) - {line.name for line in LINES}
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(line.name for line in LINES)}")
    if flags.measure:
        with tempfile.TemporaryDirectory() as folder:
            models = flags.models or Path(folder)
            measure_missing(models.absolute(), set(flags.again), flags.llama_bench)
    write_pages()


if __name__ == "__main__":
    main()
