"""Run the notebooks and write them with their results: FOLDER/NAME.ipynb and NAME.html.

python lessons/make.py [FOLDER] [--model PATH]          (FOLDER: build/notebooks)

Each notebook runs in a new kernel. If a cell raises an error, for example a failed check, the exit
code is 1. `--model` replaces the value of MODEL in the notebook.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

ROOT = Path(__file__).parent.parent
LESSONS = [ROOT / "lessons" / "llama_step_by_step.py"]
SECONDS = 300  # for one cell, at most
MODEL = re.compile(r'^MODEL = ".*"$', re.MULTILINE)


def read_notebook(source: Path, model: str | None) -> nbformat.NotebookNode:
    text = source.read_text(encoding="utf-8")
    if model is not None:
        text, changed = MODEL.subn(lambda _: f"MODEL = {model!r}", text)
        assert changed == 1, f"{source.name}: expected one line MODEL = "
    return jupytext.reads(text, fmt="py:percent")


def make(source: Path, folder: Path, model: str | None) -> None:
    notebook = read_notebook(source, model)
    resources = {"metadata": {"path": str(source.parent)}}  # the kernel's folder
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    notebook.metadata["title"] = "A prompt through a Llama, step by step"
    nbformat.write(notebook, folder / f"{source.stem}.ipynb")
    html, _ = HTMLExporter().from_notebook_node(notebook)
    (folder / f"{source.stem}.html").write_text(html, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "notebooks")
    parser.add_argument("--model")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for source in LESSONS:
        try:
            make(source, arguments.folder, arguments.model)
        except CellExecutionError as error:
            print(f"{source.name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
