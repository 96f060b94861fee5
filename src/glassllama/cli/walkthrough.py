"""`glassllama walkthrough`: one prompt through one model, step by step, every number checked."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import webbrowser
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glassllama.base.errors import GlassError, MissingExtraError
from glassllama.cli.console import (
    MOST_PROMPT,
    is_terminal,
    print_json,
    progress_bars,
    text_or_stdin,
    write,
)
from glassllama.cli.files import write_file
from glassllama.cli.options import Json, Specials, Which, note_specials

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.walkthrough.experiment import Experiment
    from glassllama.walkthrough.text import Page
    from glassllama.walkthrough.walk import Walk

NARROWEST, UNKNOWN_WIDTH = 60, 80  # columns
look = typer.Option

Html = Annotated[
    Path | None, look(metavar="FILE", help="Write the explorer: a page for a browser.")
]
OpenPage = Annotated[bool, look("--open", help="Show the explorer in a browser, at --step.")]
FullLayers = Annotated[
    str | None,
    look(
        metavar="LIST",
        help="Layers with all their tensors in a page or --json: 0,5,29 or all.",
        show_default="the one of --layer",
    ),
]


class Correctness(StrEnum):
    right = "right"
    wrong = "wrong"


StreamLayers = Annotated[
    bool, look("--stream-layers", help="Hold one layer at a time: for models larger than memory.")
]
NoMask = Annotated[bool, look("--no-mask", help="What breaks if attention sees the future?")]
RopeLayout = Annotated[
    Correctness, look(metavar="wrong", help="What breaks if the wrong coordinates turn?")
]
Scale = Annotated[
    Correctness, look(metavar="wrong", help="What breaks if scores are not divided by √D?")
]


def walkthrough(
    which: Which,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The text; read from stdin where it is left out."),
    ] = None,
    layer: Annotated[int, look(metavar="N", help="The layer to look into.")] = 0,
    head: Annotated[int, look(metavar="N", help="The attention head to look at.")] = 0,
    step: Annotated[
        int | None, look(metavar="N", help="Only this step.", show_default="all, 0 to 17")
    ] = None,
    text: Annotated[bool, look("--text", help="Print text for a terminal: the default.")] = False,
    json: Json = False,
    html: Html = None,
    open_page: OpenPage = False,
    layers: FullLayers = None,
    specials: Specials = False,
    stream_layers: StreamLayers = False,
    no_mask: NoMask = False,
    rope_layout: RopeLayout = Correctness.right,
    scale: Scale = Correctness.right,
) -> None:
    """Follow a prompt through a real model: 18 steps from bytes to the next token.

    Every step shows its numbers, the lines of source that made them, and a check that they equal
    the running model's. With --html or --open as a page to click through: one file that needs no
    network. With one of the three "what breaks" options: the mistaken model beside the right one,
    instead of the steps; in a page, after them.
    """
    paged = html is not None or open_page
    require_one_form({"--text": text, "--json": json, "--html or --open": paged})
    if layers is not None and not (paged or json):
        raise typer.BadParameter("only with --html, --open or --json", param_hint="--layers")
    if html is not None:
        require_place(html)
    asked = {"no-mask": no_mask, "rope-layout": rope_layout == "wrong", "scale": scale == "wrong"}
    broken = [name for name, wanted in asked.items() if wanted]
    where = {"layer": layer, "head": head, "stream_layers": stream_layers, "specials": specials}
    walk = start(which, text_or_stdin(prompt, "PROMPT", MOST_PROMPT), step, where)
    if walk.tokenizer is not None:
        note_specials(walk.tokenizer, walk.prompt or "", specials)
    if paged:
        show_page(walk, broken, step, full_layers(layers, walk), html, open_page)
    elif json:
        print_object(walk, broken, step, full_layers(layers, walk))
    elif broken:
        print_experiments(walk, broken)
    else:
        print_steps(walk, step)


def require_one_form(asked: dict[str, bool]) -> None:
    """At most one way to show the walk."""
    first, *others = [option for option, wanted in asked.items() if wanted] or [""]
    if others:
        raise typer.BadParameter(f"not together with {first}", param_hint=others[0])


def require_place(html: Path) -> None:
    """Said before the walk is taken, and not after it."""
    if html.is_dir() or not html.absolute().parent.is_dir():
        raise GlassError(f"--html {html}: expected the name of a file in a folder that is there")


def full_layers(listed: str | None, walk: Walk) -> list[int] | None:
    """`0,5,29` or `all` -> numbers of layers that the model has; None: not asked for."""
    if listed is None:
        return None
    count = walk.config.n_layers
    if listed == "all":
        return list(range(count))
    numbers = listed.split(",")
    if not all(n.strip().isdecimal() and int(n) < count for n in numbers):
        raise GlassError(f"--layers {listed}: expected 'all' or numbers from 0 to {count - 1}")
    return sorted({int(n) for n in numbers} | {walk.layer})


def start(which: Which, prompt: str, step: int | None, where: dict[str, Any]) -> Walk:
    """The model, loaded, and a walk through it; bad input is refused before anything is loaded."""
    if find_spec("torch") is None:
        raise MissingExtraError("the walkthrough", "torch")
    # Threads that wait by spinning take the core from those they wait for: on a machine with other
    # work to do a walk took five times as long. Must be said before PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for all that is kept
    from glassllama.walkthrough.all_steps import require_step
    from glassllama.walkthrough.walk import open_walk

    if step is not None:
        require_step(step)

    with progress_bars() as bar:
        return open_walk(
            which.path(),
            prompt,
            name=which.model,
            **where,
            progress=bar(f"loading {which.model}", "tensors"),
        )


def page() -> Page:
    from glassllama.walkthrough.text import Page

    terminal = is_terminal(sys.stdout)
    columns = shutil.get_terminal_size((UNKNOWN_WIDTH, 24)).columns
    return Page(max(columns, NARROWEST), colour=terminal and "NO_COLOR" not in os.environ)


def print_steps(walk: Walk, step: int | None) -> None:
    """One after the other as they are ready; a bar stands in for the one that is being taken."""
    from glassllama.walkthrough.all_steps import STEPS, take_step
    from glassllama.walkthrough.text import render

    shown = page()
    for number in range(len(STEPS)) if step is None else [step]:
        with progress_bars() as bar:
            tell(bar("walking", "steps"), number, len(STEPS))
            text = render(take_step(walk, number), shown)
        write(text + "\n")


def tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def experiments(walk: Walk, broken: list[str]) -> list[Experiment]:
    from glassllama.walkthrough.experiment import experiment
    from glassllama.walkthrough.interventions import MISTAKES

    done: list[Experiment] = []
    with progress_bars() as bar:
        progress = bar("running the model right and wrong", "mistakes")
        for name in broken:
            tell(progress, len(done), len(broken))
            done.append(experiment(walk, MISTAKES[name]))
    return done


def print_experiments(walk: Walk, broken: list[str]) -> None:
    from glassllama.walkthrough.experiment import render_experiment

    for done in experiments(walk, broken):
        write(render_experiment(done, page()) + "\n")


def print_object(walk: Walk, broken: list[str], step: int | None, full: list[int] | None) -> None:
    from glassllama.walkthrough.to_json import as_object

    done = experiments(walk, broken)
    with progress_bars() as bar:
        walked = as_object(
            walk,
            layers=full,
            steps=None if step is None else [step],
            experiments=done,
            progress=bar("walking", "steps"),
        )
    print_json(walked)


def show_page(
    walk: Walk,
    broken: list[str],
    step: int | None,
    full: list[int] | None,
    html: Path | None,
    open_page: bool,
) -> None:
    """Write the explorer to `html`, or to a new place that outlives this run, and say where."""
    from glassllama.walkthrough.page.page import explorer_page

    done = experiments(walk, broken)
    with progress_bars() as bar:
        page = explorer_page(
            walk,
            layers=full,
            experiments=done,
            start=step or 0,
            progress=bar("walking", "steps"),
        )
    path = html or Path(tempfile.mkdtemp(prefix="glassllama-")) / "walkthrough.html"
    write_file(path, page)
    write(f"{path}\n")
    if open_page and not webbrowser.open(path.absolute().as_uri()):
        raise GlassError(f"no browser was found: open {path} in one")
