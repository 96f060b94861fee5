"""`glassllama train`: train a model from a preset or a TOML file; and the display of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import pairwise
from json import dumps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

import typer

from glassllama.base.errors import MissingExtraError
from glassllama.cli.console import console, is_terminal, note, progress_bars, write
from glassllama.cli.options import OFFLINE

if TYPE_CHECKING:
    from rich.live import Live

    from glassllama.base.interfaces import Progress
    from glassllama.train.metrics import LoggedMetrics, RunInfo

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # characters of the loss curve
LINES = 20  # plain lines in a whole run, besides evaluations
REFRESH = 4  # times a second
INTERVAL = 1.0  # seconds over which speed is measured in the live view


def presets(incomplete: str) -> Iterator[str]:
    """Completions for the shell, which adds files by itself."""
    from glassllama.train.settings import preset_names

    return (name for name in preset_names() if name.startswith(incomplete))


def train(
    what: str | None = typer.Argument(
        None, metavar="PRESET|FILE.toml", show_default="lists the presets", autocompletion=presets,
        help="A preset's name, or a file of settings like the settings.toml of every run.",
    ),
    change: list[str] | None = typer.Option(
        None, "--set", metavar="A.B=C",
        help="Change a setting, e.g. schedule.steps=500; may be given several times.",
    ),
    data: Path | None = typer.Option(
        None, metavar="FILE", help="Train on this text, .jsonl file or folder of them."
    ),
    out: Path | None = typer.Option(
        None, metavar="FOLDER", help="Where the run goes.", show_default="runs/NAME"
    ),
    resume: Literal["auto"] | None = typer.Option(
        None, metavar="auto",
        help="auto: go on from the folder's last checkpoint; begin where there is none.",
    ),
    init_from: str | None = typer.Option(
        None, metavar="MODEL", show_default="random weights",
        help="Begin with the weights of this model: same architecture, sizes and vocabulary.",
    ),
    preflight: bool = typer.Option(
        True, "--preflight/--no-preflight",
        help="Check data, memory and model before the run.",
    ),
    offline: bool = OFFLINE,
) -> None:  # fmt: skip
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
        if any((change, data, out, resume, offline, init_from, not preflight)):
            hint = f"missing; have {', '.join(training.preset_names())}, or a FILE.toml"
            raise typer.BadParameter(hint, param_hint="PRESET")
        print("\n".join(training.preset_names()))
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


# --- display --------------------------------------------------------------------------------------


class TrainView:
    """Shows what a training run reports (train/metrics.py's Listener).

    `settings` are lines that are printed when the run starts.
    """

    info: RunInfo

    def __init__(self, settings: str = "") -> None:
        self._settings = settings
        self._losses: list[float] = []
        self._validation = ""
        self._tok_s = 0.0  # when last measured
        self._measured: LoggedMetrics | None = None  # the step of that measurement
        self._stack = ExitStack()  # of progress bars, until the live view starts
        self._bars = self._stack.enter_context(progress_bars())
        self._bar: Progress | None = None
        self._live: Live | None = None

    def __enter__(self) -> TrainView:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_download(self, name: str, done: int, total: int) -> None:
        self._bar = self._bar or self._bars(f"downloading {name}", "bytes")
        if self._bar is not None:
            self._bar(done, total)

    def on_note(self, text: str) -> None:
        """A line that stays, above the live view."""
        if self._live is not None:
            self._live.console.print(text, soft_wrap=True)
        else:
            note(text)

    def on_start(self, info: RunInfo) -> None:
        self._stack.close()
        if self._settings:
            note(self._settings)
        self.info, self._started = info, time.perf_counter()
        if is_terminal(sys.stderr):
            from rich.live import Live

            self._live = Live(console=console("stderr"), refresh_per_second=REFRESH, transient=True)
            self._live.start()

    def on_step(self, metrics: LoggedMetrics) -> None:
        self._losses.append(metrics.loss)
        if metrics.val_loss is not None:
            self._validation = f"validation {metrics.val_loss:.4f} ± {metrics.val_error:.4f}"
            bits = f"{metrics.bits_per_byte:.3f} bits per byte"
            self.on_note(f"step {metrics.step:,}: {self._validation}, {bits}")
        if self._live is not None:
            from rich.text import Text

            self._measure(metrics, INTERVAL)
            lines = (self._line(metrics), self._validation, curve(self._losses, WIDTH))
            self._live.update(Text("\n".join(line for line in lines if line)))
        elif metrics.step % max(1, self.info.total_steps // LINES) == 0:
            self._measure(metrics)
            note(self._line(metrics))

    def on_sample(self, step: int, text: str) -> None:
        self.on_note(f"step {step:,}, a sample:\n{text}\n")

    def on_end(self, sample: str | None) -> None:
        self.__exit__()
        if sample is not None:
            write(sample.strip() + "\n")
            folder = quote(str(self.info.folder))
            note(f"complete: try it with: glassllama generate -m {folder} TEXT")

    def _measure(self, metrics: LoggedMetrics, interval: float = 0.0) -> None:
        """Tokens per second since the last measurement, if that is more than `interval` ago."""
        if self._measured is None:
            self._tok_s, self._measured = metrics.tok_s, metrics
        elif (seconds := metrics.seconds - self._measured.seconds) > interval:
            self._tok_s = (metrics.tokens - self._measured.tokens) / seconds
            self._measured = metrics

    def _line(self, metrics: LoggedMetrics) -> str:
        """`step 120/1,000  loss 1.842  lr 3.0e-03  41,200 tok/s  MFU 23%  50 s left`."""
        from glassllama.train.preflight import duration

        info, step = self.info, metrics.step
        seconds = (time.perf_counter() - self._started) / (step - info.first_step)
        parts = (
            f"step {step:,}/{info.total_steps:,}",
            f"loss {metrics.loss:.3f}",
            f"lr {metrics.lr:.1e}",
            f"{self._tok_s:,.0f} tok/s",
            f"MFU {self._tok_s * info.flops_per_token / info.peak_flops:.0%}"
            if info.flops_per_token
            else "",
            f"{duration(seconds * (info.total_steps - step))} left",
        )
        return "  ".join(part for part in parts if part)


def curve(values: Sequence[float], width: int) -> str:
    """The values as a row of at most `width` blocks, each the mean of its share of them."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [at * len(values) // count for at in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
