"""`glassllama walkthrough`: one prompt through one model, step by step, every number checked."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from glassllama.cli.options import JSON, SPECIALS, ModelOptions, note_specials

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.walkthrough.mistakes import Comparison
    from glassllama.walkthrough.step import Step
    from glassllama.walkthrough.walkthrough import Walkthrough

MIN_WIDTH, UNKNOWN_WIDTH = 60, 80  # columns
Correctness = Literal["right", "wrong"]


def walkthrough(
    which: ModelOptions,
    prompt: str | None = typer.Argument(
        None, metavar="PROMPT", help="The text; read from stdin if it is left out."
    ),
    layer: int = typer.Option(0, metavar="N", help="The layer to show."),
    head: int = typer.Option(0, metavar="N", help="The attention head to show."),
    step: int | None = typer.Option(
        None, metavar="N", help="Only this step.", show_default="all, 0 to 17"
    ),
    text: bool = typer.Option(False, "--text", help="Print text for a terminal: the default."),
    json: bool = JSON,
    html: Path | None = typer.Option(
        None, metavar="FILE", help="Write the walkthrough as an HTML page."
    ),
    open_page: bool = typer.Option(
        False, "--open", help="Open the HTML page in a browser, at --step."
    ),
    layers: str | None = typer.Option(
        None, metavar="LIST", show_default="the one of --layer",
        help="Layers with all their tensors in a page or --json: 0,5,29 or all.",
    ),
    specials: bool = SPECIALS,
    stream_layers: bool = typer.Option(
        False, "--stream-layers",
        help="Keep one layer in memory at a time: for models larger than memory.",
    ),
    no_mask: bool = typer.Option(
        False, "--no-mask", help="Show the mistake: attention without the causal mask."
    ),
    rope_layout: Correctness = typer.Option(
        "right", metavar="wrong", help="Show the mistake: RoPE rotates the wrong coordinates."
    ),
    scale: Correctness = typer.Option(
        "right", metavar="wrong", help="Show the mistake: scores are not scaled by 1/√D."
    ),
) -> None:  # fmt: skip
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
    prompt = text_or_stdin(prompt, "PROMPT", MAX_PROMPT_BYTES)
    options = {"layer": layer, "head": head, "stream_layers": stream_layers, "specials": specials}
    walk = start(which, prompt, step, options)
    if walk.tokenizer is not None:
        note_specials(walk.tokenizer, walk.prompt or "", specials)
    full = full_layers(layers, walk)
    if to_page:
        show_page(walk, to_object(walk, mistakes, None, full), step or 0, html, open_page)
    elif json:
        print_json(to_object(walk, mistakes, step, full))
    elif mistakes:
        for comparison in comparisons(walk, mistakes):
            print_text(comparison)
    else:
        print_steps(walk, step)


def require_one_form(forms: dict[str, bool]) -> None:
    first, *others = [form for form, given in forms.items() if given] or [""]
    if others:
        raise typer.BadParameter(f"not together with {first}", param_hint=others[0])


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
    path = which.path()
    with progress_bars() as bar:
        progress = bar(f"loading {which.model}", "tensors")
        return open_walkthrough(path, prompt, name=which.model, progress=progress, **options)


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


def print_text(shown: Step | Comparison) -> None:
    from glassllama.walkthrough.export import Layout, render

    color = is_terminal(sys.stdout) and "NO_COLOR" not in os.environ
    columns = shutil.get_terminal_size((UNKNOWN_WIDTH, 24)).columns
    write(render(shown, Layout(max(columns, MIN_WIDTH), color=color)) + "\n")


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


def to_object(
    walk: Walkthrough, mistakes: list[str], step: int | None, full: list[int] | None
) -> dict[str, Any]:
    """The walkthrough as JSON has it: all steps or one, and the comparisons after them."""
    from glassllama.walkthrough.export import to_json

    done, steps = comparisons(walk, mistakes), None if step is None else [step]
    with progress_bars() as bar:
        progress = bar("computing", "steps")
        return to_json(walk, layers=full, steps=steps, mistakes=done, progress=progress)


def show_page(
    walk: Walkthrough, walked: dict[str, Any], step: int, html: Path | None, open_page: bool
) -> None:
    """Write the page to `html`, or to a temporary file that is not deleted, and print its path."""
    from glassllama.walkthrough.export import html_page

    path = html or Path(tempfile.mkdtemp(prefix="glassllama-")) / "walkthrough.html"
    write_file(path, html_page(walk, walked, start=step))
    write(f"{path}\n")
    if open_page and not webbrowser.open(path.absolute().as_uri()):
        raise GlassError(f"no browser was found: open {path} in one")
