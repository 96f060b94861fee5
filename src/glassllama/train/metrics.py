"""What a run reports: metrics of every step, their log files, and whether the loss is normal.

A preset's file in reference_runs/ is made by benchmarks/train_reference_runs.py from runs of
several seeds: for each block of steps the range in which the mean training loss is expected.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

from glassllama.base.errors import MissingExtraError, TrainingError, quoted
from glassllama.base.fields import Fields
from glassllama.hub import has_dataset
from glassllama.train.settings import Settings, fingerprint, load_settings, preset_names


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step. `step` counts from 1; losses are in nats per token."""

    step: int
    loss: float  # of the batch, before the step
    lr: float  # of AdamW
    grad_norm: float  # before clipping
    tokens: int  # seen so far
    tok_s: float
    seconds: float  # of training so far, without evaluations


@dataclass(frozen=True, kw_only=True)
class LoggedMetrics(StepMetrics):
    """A line of the log: a step, and the validation score if there was an evaluation after it."""

    val_loss: float | None = None
    val_error: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a display of a run needs to know before the first step."""

    folder: Path
    first_step: int  # steps that were made before
    total_steps: int
    flops_per_token: float  # of training; 0: not known
    peak_flops: float  # per second, of all ranks together


class Listener(Protocol):
    """Receives what happens in `train`, on rank 0 and in the calling thread.

    Order of calls: on_download (bytes of a text that is fetched), on_note (lines about checks and
    settings), on_start; then on_step for every step and on_sample for every sample, with notes in
    between; on_end after the last step, with a sample if the run is complete.
    """

    def on_download(self, name: str, done: int, total: int) -> None: ...
    def on_note(self, text: str) -> None: ...
    def on_start(self, info: RunInfo) -> None: ...
    def on_step(self, metrics: LoggedMetrics) -> None: ...
    def on_sample(self, step: int, text: str) -> None: ...
    def on_end(self, sample: str | None) -> None: ...


class NullListener:
    """Ignores everything: the default, and for ranks other than 0. Also a base class."""

    def on_note(self, *_: Any, **__: Any) -> None:
        """Nothing is done, as in all other methods of a Listener."""

    on_download = on_start = on_step = on_sample = on_end = on_note


# --- log files ------------------------------------------------------------------------------

COLUMNS = [field.name for field in fields(LoggedMetrics)]
SCORES = [name for name in COLUMNS if name not in {field.name for field in fields(StepMetrics)}]
NUMBERS = [name for name in COLUMNS if name not in ("step", "tokens", *SCORES)]
MAX_TOKENS = 2**63 - 1
REMEDY = "remove the log to go on without it"


class MetricsLog:
    """Writes log.jsonl, log.csv and, on request, TensorBoard's files into a run's folder.

    The files are opened at the first step, after `on_open` was called; records after `last_step`
    are dropped then. Raises MissingExtraError if TensorBoard is requested and not installed.
    """

    def __init__(
        self,
        folder: Path,
        last_step: int = 0,
        *,
        tensorboard: bool = False,
        on_open: Callable[[], None] | None = None,
    ) -> None:
        if tensorboard and find_spec("tensorboard") is None:
            raise MissingExtraError("run.tensorboard", "train")
        self._folder, self._last_step = folder, last_step
        self._tensorboard, self._on_open = tensorboard, on_open
        self._files: list[IO[str]] = []
        self._summary: Any = None

    def write(self, metrics: LoggedMetrics) -> None:
        if not self._files:
            self._open()
        self._append(metrics)
        if self._summary is not None:
            for name, value in asdict(metrics).items():
                if value is not None and name != "step":
                    self._summary.add_scalar(name, value, metrics.step)

    def _open(self) -> None:
        if self._on_open is not None:
            self._on_open()
        earlier = [r for r in read_log(self._folder) if r.step <= self._last_step]
        paths = (self._folder / "log.jsonl", self._folder / "log.csv")
        self._files = [path.open("w", encoding="utf-8", newline="") for path in paths]
        self._rows = csv.DictWriter(self._files[1], COLUMNS)
        self._rows.writeheader()
        for metrics in earlier:
            self._append(metrics)
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._summary = SummaryWriter(str(self._folder), purge_step=self._last_step + 1)

    def _append(self, metrics: LoggedMetrics) -> None:
        values = {name: value for name, value in asdict(metrics).items() if value is not None}
        self._files[0].write(json.dumps(values) + "\n")
        self._rows.writerow(values)
        for file in self._files:
            file.flush()

    def close(self) -> None:
        for file in (*self._files, *([] if self._summary is None else [self._summary])):
            file.close()


def read_log(folder: Path) -> list[LoggedMetrics]:
    """The metrics logged so far; an incomplete last line is left out.

    Raises TrainingError that names the line that cannot be read.
    """
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    complete = path.read_bytes().rpartition(b"\n")[0]
    return [
        read_line(f"{path}, line {number}", line)
        for number, line in enumerate(complete.splitlines(), start=1)
    ]


def read_line(source: str, line: bytes) -> LoggedMetrics:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise TrainingError(f"{source}: not valid JSON, got {quoted(line)}; {REMEDY}") from None
    try:
        get = Fields(source, values, TrainingError)
        step, tokens = get.integer("step"), get.integer("tokens", minimum=0, maximum=MAX_TOKENS)
        numbers: dict[str, Any] = {name: get.number(name) for name in NUMBERS}
        numbers |= {name: get.number(name, None) for name in SCORES}
    except TrainingError as error:
        raise TrainingError(f"{error}; {REMEDY}") from None
    return LoggedMetrics(step=step, tokens=tokens, **numbers)


# --- reference runs -------------------------------------------------------------------------

REFERENCE_RUNS = resources.files("glassllama.train") / "reference_runs"
# May differ from the preset: the expected loss stays the same.
FREE = ("run.seed", "run.device", "run.compile", "run.accumulate", "run.loss_chunk")
SMOOTH = 50  # steps over which the plotted line is a mean

ABOVE_EARLY = (
    "learning is slow from the beginning: usually the learning rate or its warmup, other text than "
    "the preset's, or part of the model frozen"
)
ABOVE = (
    "it began well and then fell behind: usually a learning rate too high for this phase, a "
    "schedule that decays too early, or another precision than the preset's"
)
BELOW = (
    "better than it should be: usually the model sees what it is to predict (mask, targets), the "
    "training text repeats itself, or it contains the validation text"
)


@dataclass(frozen=True, kw_only=True)
class ReferenceRuns:
    """For each of `steps` the expected mean training loss of the steps since the one before it."""

    seeds: int
    steps: Sequence[int]
    low: Sequence[float]
    high: Sequence[float]


def reference_for(settings: Settings) -> ReferenceRuns | None:
    """The reference of a preset; None if there is none or the settings were changed."""
    file = REFERENCE_RUNS / f"{settings.name}.json"
    if settings.name not in preset_names() or not file.is_file():
        return None
    if compared(settings) != compared(load_settings(settings.name)):
        return None
    return ReferenceRuns(**json.loads(file.read_text(encoding="utf-8")))


def reference_for_text(settings: Settings) -> ReferenceRuns | None:
    """The same, but None if another text replaces the preset's (see hub.fetch_dataset)."""
    reference = reference_for(settings)
    return reference if reference is not None and has_dataset(settings.data.corpus) else None


def compared(settings: Settings) -> dict[str, object]:
    """The settings that must be the preset's own."""
    values = {name: value for name, value in fingerprint(settings).items() if name not in FREE}
    return values | {"data.corpus": settings.data.corpus}


class LossMonitor:
    """Compares a run with its reference, block by block, and warns once when it is outside."""

    def __init__(self, reference: ReferenceRuns, first_step: int = 0) -> None:
        self.reference, self.outside = reference, False
        self._block: list[float] = []
        self._complete = first_step == 0  # a block that began before a resumption is skipped

    def check_loss(self, step: int, loss: float) -> str | None:
        """The warning after this step, if any."""
        self._block.append(loss)
        if step not in self.reference.steps:
            return None
        mean, complete = sum(self._block) / len(self._block), self._complete
        self._block, self._complete = [], True
        at = self.reference.steps.index(step)
        low, high = self.reference.low[at], self.reference.high[at]
        if not complete or self.outside or low <= mean <= high:
            return None
        self.outside = True
        early = at < len(self.reference.steps) / 4
        causes = BELOW if mean < low else ABOVE_EARLY if early else ABOVE
        return f"step {step}: loss {mean:.3f} is outside the usual {low:.3f} … {high:.3f}: {causes}"


def plot_loss(
    records: Sequence[LoggedMetrics],
    folder: Path,
    title: str,
    reference: ReferenceRuns | None = None,
) -> list[Path]:
    """Plot training and validation loss -> loss.svg and loss.png in `folder`.

    `reference` is drawn behind. Raises MissingExtraError.
    """
    try:
        import matplotlib.figure
    except ImportError:
        raise MissingExtraError("loss.svg", "train") from None

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = [r.step for r in records], [r.loss for r in records]
    ends = range(1, len(losses) + 1)
    means = [sum(losses[max(0, end - SMOOTH) : end]) / min(SMOOTH, end) for end in ends]
    if reference is not None:
        low, high = reference.low, reference.high
        axes.fill_between(reference.steps, low, high, color="#dddddd", label="usual")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.5)
    axes.plot(steps, means, color="#08519c", label="training")
    scores = [(r.step, r.val_loss) for r in records if r.val_loss is not None]
    axes.plot(*zip(*scores, strict=True), "o-", color="#d94801", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    paths = [folder / "loss.svg", folder / "loss.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
