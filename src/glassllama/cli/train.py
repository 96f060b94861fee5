"""`glassllama train`: a model of your own, from a preset or a TOML file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from enum import StrEnum
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from glassllama.base.errors import MissingExtraError
from glassllama.cli.console import note, progress_bars, write
from glassllama.cli.options import Offline
from glassllama.cli.train_view import View

if TYPE_CHECKING:
    from glassllama.train.data import Data
    from glassllama.train.distributed import Team
    from glassllama.train.reference_runs import Band
    from glassllama.train.run import Run
    from glassllama.train.settings import Settings
    from glassllama.train.signals import Wish


class Resume(StrEnum):
    auto = "auto"


def presets(incomplete: str) -> Iterator[str]:
    """What the shell offers; it adds files by itself."""
    from glassllama.train.resolve import preset_names

    return (name for name in preset_names() if name.startswith(incomplete))


What = Annotated[
    str | None,
    typer.Argument(
        metavar="PRESET|FILE.toml",
        help="A preset's name, or a file of settings like the settings.toml of every run.",
        show_default="lists the presets",
        autocompletion=presets,
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Change a setting, e.g. schedule.steps=500; may be given several times.",
    ),
]


def train(
    what: What = None,
    change: Changes = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Learn from this text, .jsonl file or folder of them."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the run goes.", show_default="runs/NAME"),
    ] = None,
    resume: Annotated[
        Resume | None,
        typer.Option(
            metavar="auto",
            help="auto: go on from the folder's last checkpoint; begin where there is none.",
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Begin with the weights of this model: same architecture, sizes and vocabulary.",
            show_default="random weights",
        ),
    ] = None,
    preflight: Annotated[
        bool,
        typer.Option("--preflight/--no-preflight", help="Leave out the checks before the run."),
    ] = True,
    offline: Offline = False,
) -> None:
    """Train a model on a text: a bigram, a GPT or a Llama.

    The run's folder holds its settings, its log, its curve, checkpoints, and the best model so far:
    'glassllama generate -m FOLDER' runs it. Ctrl-C finishes the step, saves and leaves.
    '--resume auto' with a larger schedule.steps makes a run longer.
    On several processors or GPUs: 'torchrun --nproc-per-node N -m glassllama train …'.
    What each part of a Llama brings, measured on the way up from a bigram: docs/ladder.md.
    """
    from glassllama.hub.names import RUNS
    from glassllama.train.resolve import resolve

    if what is None:
        options = (change, data, out, resume, offline, init_from)
        list_presets(alone=preflight and not any(options))
        return
    if find_spec("torch") is None:
        raise MissingExtraError("training", "train")
    if init_from == "":
        raise typer.BadParameter("empty: name a model, or leave it out", param_hint="--init-from")
    given = {"data.corpus": data, "model.init_from": init_from}
    named = [f"{key}={dumps(str(value))}" for key, value in given.items() if value is not None]
    changes = [*(change or []), *named]
    settings = resolve(what, changes)
    folder = out or Path(RUNS) / settings.name
    said = announced(what, settings, changes, folder)
    asked = Asked(folder, resume is not None, preflight, offline, said)
    if code := carry_out(settings, asked):
        raise typer.Exit(code)


def list_presets(*, alone: bool) -> None:
    """What can be trained; a fault in usage where somebody wanted more than this list."""
    from glassllama.train.resolve import preset_names

    if not alone:
        hint = f"missing; have {', '.join(preset_names())}, or a FILE.toml"
        raise typer.BadParameter(hint, param_hint="PRESET")
    print("\n".join(preset_names()))


class Asked(NamedTuple):
    """What the command line says besides the settings."""

    folder: Path
    resuming: bool
    checked: bool
    offline: bool
    announced: str  # said when the run begins


def announced(what: str, settings: Settings, changes: list[str], folder: Path) -> str:
    """What is trained, which settings were changed, and where all will be."""
    from glassllama.train.resolve import changed_lines

    lines = changed_lines(what, settings, changes)
    if settings.model.sizes.get("qk_norm"):
        lines.append("qk_norm: no Llama 3: glassllama reads this model, transformers does not")
    return "\n".join([f"settings of {what}; all go to {folder / 'settings.toml'}", *lines])


def carry_out(settings: Settings, asked: Asked) -> int:
    """The whole run -> the exit code."""
    # PyTorch's threads are to sleep where they would spin: the loops between its products run in
    # threads of ours (native/training/blocks.py), and small steps have many ends of parallel work
    # to wait at.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when PyTorch is loaded
    from glassllama.train.distributed import together
    from glassllama.train.estimate import require_step_fits
    from glassllama.train.prepare import prepare, take_up
    from glassllama.train.run_dir import occupy, require_free

    folder = asked.folder
    with together(settings.run.device) as team, ExitStack() as held:

        def begin() -> Data:
            if team.leads:
                held.enter_context(occupy(folder))
                require_free(folder, settings, resuming=asked.resuming)
            team.require_even(settings.data.batch, settings.run.accumulate)
            return opened(settings, folder, team, asked.offline)

        data = team.lead_first(begin)
        run = prepare(settings, data, folder, team, offline=asked.offline)
        if team.alone:  # of several ranks `check` looks at it, and `prepare` has at the most of it
            require_step_fits(run)
        resumed = take_up(run)
        if asked.checked and not resumed:
            team.lead_first(lambda: check(run))
        tell(team, asked.announced)
        if resumed:
            tell(team, going_on(run))
        code = go(run)
        finish(run)
        team.wait()  # torchrun ends the leader where another rank has left with a signal's code
    return code


def opened(settings: Settings, folder: Path, team: Team, offline: bool) -> Data:
    """The text as ids: written by the leader, read by all ranks."""
    from glassllama.train.data import open_data
    from glassllama.train.run_dir import STAGE

    stage = folder / STAGE
    if not team.leads:
        return open_data(
            settings.data, stage, offline=offline, written=True, before=folder,
            told=lambda _: None,
        )  # fmt: skip
    with progress_bars() as bar:
        progress = bar(f"downloading {settings.data.corpus}", "bytes")
        return open_data(
            settings.data, stage, offline=offline, progress=progress, before=folder, told=note
        )


def check(run: Run) -> None:
    """The checks before a run; of several ranks the leader makes them, as if it were alone."""
    from glassllama.train.preflight import preflight
    from glassllama.train.prepare import rehearsal

    if run.team.leads:
        alone = run if run.team.alone else rehearsal(run.settings, run.data, run.folder, run.team)
        for line in preflight(alone):
            note(f"checked {line}")


def going_on(run: Run) -> str:
    """After which step, and what a longer schedule means for the learning rate."""
    from glassllama.train.schedule import rate_factor

    step, schedule = run.progress.step, run.settings.schedule
    line = f"going on after step {step:,}"
    if run.extended:
        share = rate_factor(step, schedule)
        line += f": {run.extended}; the learning rate goes on at {share:.0%} of its peak"
    return line


def tell(team: Team, text: str) -> None:
    """Say it once, however many ranks there are."""
    if team.leads:
        note(text)


def go(run: Run) -> int:
    """Make the steps -> the exit code: that of the signal which stopped them, or 0.

    A signal during the last save stops nothing: the run is complete.
    """
    from glassllama.train.loop import Nobody, train
    from glassllama.train.signals import listening

    first = run.progress.step
    with listening() as wish:
        if run.team.leads:
            watched(run, wish)
        else:
            train(run, Nobody(), Nobody(), wish)
    if run.complete or not wish:
        return 0
    if (last := run.progress.step) > first:
        tell(run.team, f"stopped and saved after step {last:,}; go on with --resume auto")
    else:
        tell(run.team, f"stopped before step {last + 1:,}; nothing has changed")
    return wish.exit_code


def watched(run: Run, wish: Wish) -> None:
    """Make the steps, with a view and a journal of them."""
    from glassllama.train.loop import train
    from glassllama.train.mfu import dtype_of, flops_per_token, peak_flops
    from glassllama.train.reference_runs import Watchman
    from glassllama.train.run_dir import FirstStep

    s, done, band = run.settings, run.progress.step, band_of_text(run)
    note("band: none for these settings" if band is None else f"band: of {band.seeds} seeds")
    view = View(
        steps=s.schedule.steps,
        first=done,
        flops=flops_per_token(run.model, s.data.context),
        peak=peak_flops(s.run.device, dtype_of(s.run.precision, s.run.device)) * run.team.world,
        watchman=None if band is None else Watchman(band, done),
    )
    journal = FirstStep(run)
    try:
        with view:
            train(run, journal, view, wish)
    finally:
        journal.close()


def band_of_text(run: Run) -> Band | None:
    """The preset's band, unless another text stands in for the preset's (see hub.fetch_dataset)."""
    from glassllama.hub import has_dataset
    from glassllama.train.reference_runs import band_of

    band = band_of(run.settings)
    return band if band is not None and has_dataset(run.settings.data.corpus) else None


def finish(run: Run) -> None:
    """The curve, and where the model is; a sample where the run is complete."""
    from glassllama.train.loop import sample_text
    from glassllama.train.metrics import read_records
    from glassllama.train.plot import draw_curve

    text = sample_text(run) if run.complete else ""  # by all ranks together
    if not run.team.leads or not (records := read_records(run.folder)):
        return
    try:
        draw_curve(records, run.folder, run.settings.name, band_of_text(run))
    except MissingExtraError as error:
        note(f"note: {error}")
    if run.complete:
        write(text.strip() + "\n")
        note(f"complete: try it with: glassllama generate -m {quote(str(run.folder))} TEXT")
