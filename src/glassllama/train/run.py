"""One training run: its parts, its progress, and what identifies it in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glassllama.base.errors import TrainingError, named, quoted
from glassllama.models.language_model import LanguageModel
from glassllama.train.batches import Batches
from glassllama.train.data import Data
from glassllama.train.distributed import SINGLE_PROCESS, DistContext
from glassllama.train.optimizers import EMA, Optimizers
from glassllama.train.settings import Settings, current_key

TEXTS = ("training text", "validation text")  # their hashes are part of a run's identity
# May change when a run is resumed: it has no influence on the weights.
REPORTING = (
    "eval_every", "save_every", "sample_every", "sample_tokens", "prompt", "keep", "tensorboard",
)  # fmt: skip


@dataclass
class Progress:
    """How far a run is. All random numbers follow from `run.seed` and `step`."""

    step: int = 0  # optimizer steps made
    seconds: float = 0.0  # spent on them
    best_step: int | None = None
    best_loss: float | None = None

    def record_score(self, loss: float) -> bool:
        """Whether this validation loss is the best so far; if so it is stored."""
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_step, self.best_loss = self.step, loss
        return True


@dataclass
class Run:
    """What the training loop works on."""

    settings: Settings
    folder: Path
    data: Data
    model: LanguageModel
    optimizers: Optimizers
    batches: Batches
    ema: EMA | None = None
    progress: Progress = field(default_factory=Progress)
    dist: DistContext = SINGLE_PROCESS
    extended: str = ""  # how the schedule differs from that of the resumed run

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def complete(self) -> bool:
        return self.progress.step >= self.settings.schedule.steps

    @property
    def tokens_per_step(self) -> int:
        return self.settings.data.batch * self.settings.data.context

    def identity(self) -> dict[str, Any]:
        """What must be equal in the run that wrote a checkpoint and the run that resumes it."""
        texts = (self.data.train.sha256, self.data.val.sha256)
        return dict(zip(TEXTS, texts, strict=True)) | fingerprint(self.settings)


def fingerprint(settings: Settings) -> dict[str, Any]:
    """The settings that the weights depend on, `table.field` -> value."""
    values = {
        f"{table}.{name}": value
        for table, values in asdict(settings).items()
        if isinstance(values, dict)
        for name, value in values.items()
        if not (table == "run" and name in REPORTING) and (table, name) != ("data", "corpus")
    }
    if not settings.model.init_from:  # runs of older versions have no such setting
        del values["model.init_from"]
    return values


def require_same_run(place: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Raise TrainingError unless both identities are equal, naming each difference.

    With more steps than before the schedule may differ -> its differences.
    """
    before = {current_key(name): value for name, value in before.items()}
    differences = {}
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            was, is_ = (
                quoted(values[name]) if name in values else "not set" for values in (before, now)
            )
            differences[name] = f"{named(name)} was {was}, is {is_}"
    steps = now["schedule.steps"] - before["schedule.steps"]
    others = [text for name, text in differences.items() if not name.startswith("schedule.")]
    if steps > 0 and not others:
        return "; ".join(differences.values())
    if differences:
        shown = others if steps > 0 else list(differences.values())
        shorter = "; a run can be extended, not shortened" if steps < 0 else ""
        raise TrainingError(
            f"{place}: another run: {'; '.join(shown[:5])}{shorter}; begin a new one with --out"
        )
    return ""
