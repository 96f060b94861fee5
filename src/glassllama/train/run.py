"""One training run: its parts, its progress, and what identifies it in a checkpoint."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glassllama.models.language_model import LanguageModel
from glassllama.train.corpus import Data
from glassllama.train.distributed import SINGLE_PROCESS, DistContext
from glassllama.train.optimizers import EMA, Optimizers
from glassllama.train.settings import Settings, fingerprint
from glassllama.train.tokens import Batches

TEXTS = ("training text", "validation text")  # their hashes are part of a run's identity


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

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has its averaged weights, if there are any."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def identity(self) -> dict[str, Any]:
        """What must be equal in the run that wrote a checkpoint and the run that resumes it."""
        texts = (self.data.train.sha256, self.data.val.sha256)
        return dict(zip(TEXTS, texts, strict=True)) | fingerprint(self.settings)
