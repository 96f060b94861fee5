"""`glassllama train`: a model of your own, from a preset or a TOML file."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassllama.base.errors import MissingExtraError
from glassllama.cli.screen import note

if TYPE_CHECKING:
    from glassllama.train.journal import Record
    from glassllama.train.settings import Settings


class Resume(StrEnum):
    auto = "auto"


def train(
    source: Annotated[
        str, typer.Argument(metavar="PRESET|FILE.toml", help="What to train, and how.")
    ],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change one setting; may be repeated."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Learn from this text instead.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the run goes.", show_default="runs/NAME"),
    ] = None,
    resume: Annotated[
        Resume | None,
        typer.Option(metavar="auto", help="Go on from the last checkpoint, if there is one."),
    ] = None,
) -> None:
    """Train a model: from a preset, or from settings of your own in a TOML file."""
    if find_spec("torch") is None:
        raise MissingExtraError("training", "train")
    from glassllama.train.resolve import resolve, to_toml

    changes = [*(change or []), *([] if data is None else [f"data.corpus={data}"])]
    settings = resolve(source, changes)
    folder = out or Path("runs") / settings.name
    note(to_toml(settings))
    if code := carry_out(settings, folder, resuming=resume is not None):
        raise typer.Exit(code)


def carry_out(settings: Settings, folder: Path, *, resuming: bool) -> int:
    """Train in that folder -> the exit code."""
    from glassllama.train.data import open_data
    from glassllama.train.journal import Journal
    from glassllama.train.loop import train as make_steps
    from glassllama.train.prepare import occupy, prepare, take_up
    from glassllama.train.stopping import listening

    with occupy(folder):
        run = prepare(settings, open_data(settings.data, folder), folder)
        take_up(run, resuming=resuming)
        journal = Journal(folder, run.progress.step, tensorboard=settings.run.tensorboard)
        with listening() as wish:
            make_steps(run, journal, Lines(settings), wish)
        journal.close()
    return wish.exit_code


class Lines:
    """Progress as plain lines."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_step(self, record: Record) -> None:
        if record.step % 50 == 0:
            note(f"step {record.step} loss {record.loss:.4f} {record.tok_s:,.0f} tok/s")
        if record.val_loss is not None:
            note(
                f"step {record.step} validation loss {record.val_loss:.4f} ± {record.val_error:.4f}"
            )

    def on_sample(self, step: int, text: str) -> None:
        note(text)
