"""The notebook, run by a kernel from the first to the last cell; and its HTML output."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from notebook_display import show
from safetensors.torch import load_file, save_file

from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake
from glassllama.walkthrough.steps import STEPS, run_step
from glassllama.walkthrough.walkthrough import Walkthrough
from tiny_models import META_SHAPE, hf_model, write_meta

ROOT = Path(__file__).parent.parent.parent
BUILT = ROOT / "build" / "notebooks"


def made(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "lessons" / "make.py", folder, *map(str, options)]
    around = {**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / ".ipython")}
    return subprocess.run(command, capture_output=True, text=True, env=around)


def outputs(folder: Path) -> list[Any]:
    """The outputs of every cell of code."""
    notebook = nbformat.read(folder / "llama_step_by_step.ipynb", as_version=4)
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def shown(folder: Path) -> str:
    """All HTML in the outputs."""
    parts = [part for cell in outputs(folder) for part in cell]
    return "".join(part.data.get("text/html", "") for part in parts if "data" in part)


@pytest.mark.docs
@pytest.mark.usefixtures("default_model")
def test_the_notebook_runs_on_the_default_model() -> None:
    """Its output is kept in build/notebooks, like that of `make notebooks`, so that it can be
    viewed."""
    done = made(BUILT)
    assert done.returncode == 0, done.stderr
    html = shown(BUILT)
    assert html.count('class="ok"') >= 2 * len(STEPS) + len(MISTAKES)
    assert html.count('<p class="ask">') >= len(STEPS) + len(MISTAKES)
    assert "France" in html
    assert "␣Rome" in html  # step 12: the vector of the other country was patched in
    assert (BUILT / "llama_step_by_step.html").stat().st_size < 1_000_000
    kinds = {part.output_type for cell in outputs(BUILT) for part in cell}
    assert kinds == {"execute_result", "display_data", "stream"}
    streams = [part.name for cell in outputs(BUILT) for part in cell if "name" in part]
    assert "stderr" not in streams


@pytest.mark.docs
def test_the_notebook_runs_on_metas_files_with_one_path_changed(
    tmp_path: Path, llama3_ranks: Path
) -> None:
    model = hf_model(**{**META_SHAPE, "vocab_size": 128_256})
    path = write_meta(model, tmp_path / "meta")
    shutil.copy(llama3_ranks, path / "tokenizer.model")
    done = made(tmp_path, "--model", path)
    assert done.returncode == 0, done.stderr
    assert "format meta" in shown(tmp_path)
    assert "[128000, 791, 6864, 315, 9822, 374]" in str(outputs(tmp_path))


@pytest.mark.docs
def test_a_failed_check_stops_the_notebook(tmp_path: Path, with_text: Path) -> None:
    """The error names the step in which NaN occurs first, and the notebook ends there."""
    path = shutil.copytree(with_text, tmp_path / "damaged")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    done = made(tmp_path, "--model", path)
    assert done.returncode == 1
    assert "DamagedWeightsError" in done.stderr
    assert "layers.1.feed_forward.up" in done.stderr
    assert not (tmp_path / "llama_step_by_step.ipynb").exists()


class BalancedTags(HTMLParser):
    """Fails on a tag that is not closed, or closed by another tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_of_every_step(tiny_walk: Walkthrough) -> None:
    things = [run_step(tiny_walk, number) for number in range(len(STEPS))]
    things += [compare_with_mistake(tiny_walk, MISTAKES["scale"])]
    for thing in things:
        html = show(thing)._repr_html_()
        parser = BalancedTags()
        parser.feed(html)
        assert parser.open == []
        assert html.count("✓") == repr(show(thing)).count("✓")
        for check in getattr(thing, "checks", ()):
            assert check.what in unescape(html)


def test_a_heat_map_has_every_number(tiny_walk: Walkthrough) -> None:
    drawn = run_step(tiny_walk, 9).pictures[0]
    html = show(drawn)._repr_html_()
    weights = tiny_walk.trace["layers.1.attention.weights"][0, tiny_walk.head]
    found = re.findall(r'fill-opacity="([0-9.]+)"><title>.*?: (\S+)</title>', html)
    lower = weights[tuple(torch.tril_indices(7, 7))].tolist()
    assert [float(value) for _, value in found] == pytest.approx(lower, rel=1e-3, abs=1e-9)
    strengths = [float(strength) for strength, _ in found]
    assert strengths == pytest.approx([max(w**0.5, 0.04) for w in lower], abs=0.006)


def test_texts_are_escaped(with_text: Path) -> None:
    from glassllama.walkthrough.walkthrough import open_walkthrough

    hostile = "<script>alert(1)</script>&lt;"
    walk = open_walkthrough(with_text, hostile, name=hostile)
    for number in (0, 1, 9, 13):
        html = show(run_step(walk, number))._repr_html_()
        assert "<script" not in html
    assert json.dumps(hostile)[1:-1] not in html


def test_an_object_of_another_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="expected a step, a comparison or a picture, got int"):
        show(5)
