"""What happened, step by step: log.jsonl and log.csv, and TensorBoard's files where wanted."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from glassllama.base.errors import MissingExtraError, quoted
from glassllama.base.fields import Fields
from glassllama.train.faults import TrainingError


@dataclass(frozen=True, kw_only=True)
class Made:
    """One optimiser step. `step` counts from 1; losses in nats per token; rates per second."""

    step: int
    loss: float  # of the batch, before the step
    lr: float  # AdamW's
    grad_norm: float  # before clipping
    tokens: int  # seen so far
    tok_s: float
    seconds: float  # of training so far, without evaluations


@dataclass(frozen=True, kw_only=True)
class Record(Made):
    """A line of the log: a step, and the score after it where the model was judged then."""

    val_loss: float | None = None
    val_error: float | None = None
    bits_per_byte: float | None = None


COLUMNS = [field.name for field in fields(Record)]
SCORES = [name for name in COLUMNS if name not in {field.name for field in fields(Made)}]
NUMBERS = [name for name in COLUMNS if name not in ("step", "tokens", *SCORES)]
MOST_TOKENS = 2**63 - 1
MEND = "remove the log to go on without it"


class Journal:
    """Appends records to the files in a run's folder; begins again after `last_step`."""

    def __init__(self, folder: Path, last_step: int = 0, *, tensorboard: bool = False) -> None:
        kept = [r for r in read_records(folder) if r.step <= last_step]
        self._jsonl = (folder / "log.jsonl").open("w", encoding="utf-8")
        self._csv = (folder / "log.csv").open("w", encoding="utf-8", newline="")
        self._rows = csv.DictWriter(self._csv, COLUMNS)
        self._rows.writeheader()
        for record in kept:
            self._append(record)
        self._board = open_tensorboard(folder, last_step) if tensorboard else None

    def write(self, record: Record) -> None:
        self._append(record)
        if self._board is not None:
            for name, value in asdict(record).items():
                if value is not None and name != "step":
                    self._board.add_scalar(name, value, record.step)

    def _append(self, record: Record) -> None:
        values = {name: value for name, value in asdict(record).items() if value is not None}
        self._jsonl.write(json.dumps(values) + "\n")
        self._rows.writerow(values)
        self._jsonl.flush()
        self._csv.flush()

    def close(self) -> None:
        self._jsonl.close()
        self._csv.close()
        if self._board is not None:
            self._board.close()


def read_records(folder: Path) -> list[Record]:
    """The records of a run so far; a last line that was cut off while being written is left out.

    Raises TrainingError naming the line that is no record.
    """
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [
        read_record(f"{path}, line {number}", line)
        for number, line in enumerate(whole.splitlines(), start=1)
    ]


def read_record(place: str, line: bytes) -> Record:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise TrainingError(f"{place}: no JSON, got {quoted(line)}; {MEND}") from None
    try:
        get = Fields(place, values, TrainingError)
        step, tokens = get.whole("step"), get.whole("tokens", least=0, most=MOST_TOKENS)
        numbers: dict[str, Any] = {name: get.number(name) for name in NUMBERS}
        numbers |= {name: get.number(name, None) for name in SCORES}
    except TrainingError as error:
        raise TrainingError(f"{error}; {MEND}") from None
    return Record(step=step, tokens=tokens, **numbers)


def open_tensorboard(folder: Path, last_step: int) -> Any:
    """TensorBoard's writer. Raises MissingExtraError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("run.tensorboard", "train") from None
    return SummaryWriter(str(folder), purge_step=last_step + 1)
