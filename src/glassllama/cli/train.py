"""`glassllama train`: train a model from a preset or a TOML file."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from glassllama.base.errors import MissingExtraError
from glassllama.cli.options import Offline
from glassllama.cli.train_view import TrainView


class Resume(StrEnum):
    auto = "auto"


def presets(incomplete: str) -> Iterator[str]:
    """Completions for the shell, which adds files by itself."""
    from glassllama.train.settings import preset_names

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
        typer.Option(metavar="FILE", help="Train on this text, .jsonl file or folder of them."),
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
    What each part of a Llama brings, measured one change at a time: docs/ablations.md.
    """
    from glassllama import train as training
    from glassllama.hub.names import RUNS
    from glassllama.train.settings import changed_lines

    if what is None:
        list_presets(any((change, data, out, resume, offline, init_from, not preflight)))
        return
    if find_spec("torch") is None:
        raise MissingExtraError("training", "train")
    if init_from == "":
        raise typer.BadParameter("empty: name a model, or leave it out", param_hint="--init-from")
    given = {"data.corpus": data, "model.init_from": init_from}
    named = [f"{key}={dumps(str(value))}" for key, value in given.items() if value is not None]
    changes = [*(change or []), *named]
    settings = training.load_settings(what, changes)
    folder = out or Path(RUNS) / settings.name
    lines = [f"settings of {what}; all are saved in {folder / 'settings.toml'}"]
    lines += changed_lines(what, settings, changes)
    if settings.model.sizes.get("qk_norm"):
        lines.append("qk_norm: not a Llama 3: glassllama reads this model, transformers does not")
    with TrainView("\n".join(lines)) as view:
        training.train(
            settings, folder=folder, resume=resume is not None, checks=preflight,
            offline=offline, listener=view,
        )  # fmt: skip


def list_presets(more_given: bool) -> None:
    """What can be trained; wrong usage if more than the list was asked for."""
    from glassllama.train.settings import preset_names

    if more_given:
        hint = f"missing; have {', '.join(preset_names())}, or a FILE.toml"
        raise typer.BadParameter(hint, param_hint="PRESET")
    print("\n".join(preset_names()))
