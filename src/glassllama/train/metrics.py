"""What a run reports: metrics of every step, the Listener that receives them, and the log files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

from glassllama.base.errors import MissingExtraError, TrainingError, quoted
from glassllama.base.fields import Fields


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

    def on_download(self, name: str, done: int, total: int) -> None:
        pass

    def on_note(self, text: str) -> None:
        pass

    def on_start(self, info: RunInfo) -> None:
        pass

    def on_step(self, metrics: LoggedMetrics) -> None:
        pass

    def on_sample(self, step: int, text: str) -> None:
        pass

    def on_end(self, sample: str | None) -> None:
        pass


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
        jsonl = (self._folder / "log.jsonl").open("w", encoding="utf-8")
        table = (self._folder / "log.csv").open("w", encoding="utf-8", newline="")
        self._files = [jsonl, table]
        self._rows = csv.DictWriter(table, COLUMNS)
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
        for file in self._files:
            file.close()
        if self._summary is not None:
            self._summary.close()


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


def read_line(place: str, line: bytes) -> LoggedMetrics:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise TrainingError(f"{place}: not valid JSON, got {quoted(line)}; {REMEDY}") from None
    try:
        get = Fields(place, values, TrainingError)
        step, tokens = get.whole("step"), get.whole("tokens", least=0, most=MAX_TOKENS)
        numbers: dict[str, Any] = {name: get.number(name) for name in NUMBERS}
        numbers |= {name: get.number(name, None) for name in SCORES}
    except TrainingError as error:
        raise TrainingError(f"{error}; {REMEDY}") from None
    return LoggedMetrics(step=step, tokens=tokens, **numbers)
