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
    MAX_PROMPT_BYTES,
    is_terminal,
    print_json,
    progress_bars,
    text_or_stdin,
    write,
    write_file,
)
from glassllama.cli.options import Json, ModelOptions, Specials, note_specials

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.walkthrough.export import Layout
    from glassllama.walkthrough.mistakes import Comparison
    from glassllama.walkthrough.step import Step
    from glassllama.walkthrough.walkthrough import Walkthrough

MIN_WIDTH, UNKNOWN_WIDTH = 60, 80  # columns

Html = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the walkthrough as an HTML page."),
]
OpenPage = Annotated[
    bool, typer.Option("--open", help="Open the HTML page in a browser, at --step.")
]
FullLayers = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Layers with all their tensors in a page or --json: 0,5,29 or all.",
        show_default="the one of --layer",
    ),
]


class Correctness(StrEnum):
    right = "right"
    wrong = "wrong"


StreamLayers = Annotated[
    bool,
    typer.Option(
        "--stream-layers", help="Keep one layer in memory at a time: for models larger than memory."
    ),
]
NoMask = Annotated[
    bool, typer.Option("--no-mask", help="Show the mistake: attention without the causal mask.")
]
RopeLayout = Annotated[
    Correctness,
    typer.Option(metavar="wrong", help="Show the mistake: RoPE rotates the wrong coordinates."),
]
Scale = Annotated[
    Correctness,
    typer.Option(metavar="wrong", help="Show the mistake: scores are not divided by √D."),
]


def walkthrough(
    which: ModelOptions,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The text; read from stdin if it is left out."),
    ] = None,
    layer: Annotated[int, typer.Option(metavar="N", help="The layer to show.")] = 0,
    head: Annotated[int, typer.Option(metavar="N", help="The attention head to show.")] = 0,
    step: Annotated[
        int | None, typer.Option(metavar="N", help="Only this step.", show_default="all, 0 to 17")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Print text for a terminal: the default.")
    ] = False,
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
    """Follow a prompt through a model: 18 steps from bytes to the next token.

    Every step shows its numbers, the lines of source code that compute them, and a check that they
    equal those of the running model. --html or --open make an interactive page: one file that needs
    no network. The options that show a mistake compare the model with and without it, instead of
    the steps; in a page, after them.
    """
    to_page = html is not None or open_page
    require_one_form({"--text": text, "--json": json, "--html or --open": to_page})
    if layers is not None and not (to_page or json):
        raise typer.BadParameter("only with --html, --open or --json", param_hint="--layers")
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise GlassError(f"--html {html}: expected the name of a file in an existing folder")
    wrong = {"no-mask": no_mask, "rope-layout": rope_layout == "wrong", "scale": scale == "wrong"}
    mistakes = [name for name, chosen in wrong.items() if chosen]
    options = {"layer": layer, "head": head, "stream_layers": stream_layers, "specials": specials}
    walk = start(which, text_or_stdin(prompt, "PROMPT", MAX_PROMPT_BYTES), step, options)
    if walk.tokenizer is not None:
        note_specials(walk.tokenizer, walk.prompt or "", specials)
    if to_page:
        show_page(walk, mistakes, step, full_layers(layers, walk), html, open_page)
    elif json:
        print_object(walk, mistakes, step, full_layers(layers, walk))
    elif mistakes:
        for comparison in comparisons(walk, mistakes):
            print_text(comparison)
    else:
        print_steps(walk, step)


def require_one_form(chosen: dict[str, bool]) -> None:
    """At most one form of output."""
    first, *others = [option for option, given in chosen.items() if given] or [""]
    if others:
        raise typer.BadParameter(f"not together with {first}", param_hint=others[0])


def full_layers(layers: str | None, walk: Walkthrough) -> list[int] | None:
    """`0,5,29` or `all` -> numbers of the model's layers; None: not given."""
    if layers is None:
        return None
    count = walk.config.n_layers
    if layers == "all":
        return list(range(count))
    numbers = layers.split(",")
    if not all(n.strip().isdecimal() and int(n) < count for n in numbers):
        raise GlassError(f"--layers {layers}: expected 'all' or numbers from 0 to {count - 1}")
    return sorted({int(n) for n in numbers} | {walk.layer})


def start(
    which: ModelOptions, prompt: str, step: int | None, options: dict[str, Any]
) -> Walkthrough:
    """Load the model; bad input is refused before."""
    if find_spec("torch") is None:
        raise MissingExtraError("the walkthrough", "torch")
    # Threads of OpenMP that wait actively slow down the others: on a busy machine a walkthrough
    # took five times as long. Must be set before PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for tensors
    from glassllama.walkthrough.steps import require_step
    from glassllama.walkthrough.walkthrough import open_walkthrough

    if step is not None:
        require_step(step)

    with progress_bars() as bar:
        return open_walkthrough(
            which.path(),
            prompt,
            name=which.model,
            **options,
            progress=bar(f"loading {which.model}", "tensors"),
        )


def layout() -> Layout:
    from glassllama.walkthrough.export import Layout

    color = is_terminal(sys.stdout) and "NO_COLOR" not in os.environ
    columns = shutil.get_terminal_size((UNKNOWN_WIDTH, 24)).columns
    return Layout(max(columns, MIN_WIDTH), color=color)


def print_text(shown: Step | Comparison) -> None:
    from glassllama.walkthrough.export import render

    write(render(shown, layout()) + "\n")


def print_steps(walk: Walkthrough, step: int | None) -> None:
    """Each step is printed when it is ready; while it is computed there is a progress bar."""
    from glassllama.walkthrough.steps import STEPS, run_step

    for number in range(len(STEPS)) if step is None else [step]:
        with progress_bars() as bar:
            report(bar("computing", "steps"), number, len(STEPS))
            done = run_step(walk, number)
        print_text(done)


def report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def comparisons(walk: Walkthrough, mistakes: list[str]) -> list[Comparison]:
    from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake

    done: list[Comparison] = []
    with progress_bars() as bar:
        progress = bar("running the model with and without mistakes", "mistakes")
        for name in mistakes:
            report(progress, len(done), len(mistakes))
            done.append(compare_with_mistake(walk, MISTAKES[name]))
    return done


def print_object(
    walk: Walkthrough, mistakes: list[str], step: int | None, full: list[int] | None
) -> None:
    from glassllama.walkthrough.export import to_json

    done = comparisons(walk, mistakes)
    with progress_bars() as bar:
        walked = to_json(
            walk,
            layers=full,
            steps=None if step is None else [step],
            mistakes=done,
            progress=bar("computing", "steps"),
        )
    print_json(walked)


def show_page(
    walk: Walkthrough,
    mistakes: list[str],
    step: int | None,
    full: list[int] | None,
    html: Path | None,
    open_page: bool,
) -> None:
    """Write the page to `html`, or to a temporary file that is not deleted, and print its path."""
    from glassllama.walkthrough.export import html_page, to_json

    done = comparisons(walk, mistakes)
    with progress_bars() as bar:
        walked = to_json(walk, layers=full, mistakes=done, progress=bar("computing", "steps"))
    page = html_page(walk, walked, start=step or 0)
    path = html or Path(tempfile.mkdtemp(prefix="glassllama-")) / "walkthrough.html"
    write_file(path, page)
    write(f"{path}\n")
    if open_page and not webbrowser.open(path.absolute().as_uri()):
        raise GlassError(f"no browser was found: open {path} in one")
