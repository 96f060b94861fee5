"""Is the loss of a run normal? Reference runs of the presets; and the plot of a run's loss.

A preset's file in reference_runs/ is made by benchmarks/train_reference_runs.py from runs of
several seeds: for each block of steps the range in which the mean training loss is expected.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from glassllama.base.errors import MissingExtraError
from glassllama.hub import has_dataset
from glassllama.train.metrics import LoggedMetrics
from glassllama.train.run import fingerprint
from glassllama.train.settings import Settings, load_settings, preset_names

REFERENCE_RUNS = resources.files("glassllama.train") / "reference_runs"
# May differ from the preset: the expected loss stays the same.
FREE = ("run.seed", "run.device", "run.compile", "run.accumulate", "run.loss_chunk")
DEVIATIONS, MARGIN = 4.0, 0.03  # standard deviations over seeds, and nats, to either side
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
    steps: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def reference_for(settings: Settings) -> ReferenceRuns | None:
    """The reference of a preset; None if there is none or the settings were changed."""
    file = REFERENCE_RUNS / f"{settings.name}.json"
    if settings.name not in preset_names() or not file.is_file():
        return None
    if compared(settings) != compared(load_settings(settings.name)):
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    steps, low, high = (tuple(values[name]) for name in ("steps", "low", "high"))
    return ReferenceRuns(seeds=values["seeds"], steps=steps, low=low, high=high)


def reference_for_text(settings: Settings) -> ReferenceRuns | None:
    """The same, but None if another text replaces the preset's (see hub.fetch_dataset)."""
    reference = reference_for(settings)
    return reference if reference is not None and has_dataset(settings.data.corpus) else None


def compared(settings: Settings) -> dict[str, object]:
    """The settings that must be the preset's own."""
    values = {name: value for name, value in fingerprint(settings).items() if name not in FREE}
    return values | {"data.corpus": settings.data.corpus}


def make_reference(steps: Sequence[int], losses: Sequence[Sequence[float]]) -> ReferenceRuns:
    """From the losses of each step, one list per seed -> their range at `steps`."""
    low, high = [], []
    for first, last in zip([0, *steps], steps, strict=False):
        means = [sum(seed[first:last]) / (last - first) for seed in losses]
        center = sum(means) / len(means)
        spread = (sum((m - center) ** 2 for m in means) / max(1, len(means) - 1)) ** 0.5
        low.append(round(center - DEVIATIONS * spread - MARGIN, 4))
        high.append(round(center + DEVIATIONS * spread + MARGIN, 4))
    return ReferenceRuns(seeds=len(losses), steps=tuple(steps), low=tuple(low), high=tuple(high))


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
    if reference is not None:
        low, high = reference.low, reference.high
        axes.fill_between(reference.steps, low, high, color="#dddddd", label="usual")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.5)
    axes.plot(steps, moving_average(losses), color="#08519c", label="training")
    scores = [(r.step, r.val_loss) for r in records if r.val_loss is not None]
    axes.plot(*zip(*scores, strict=True), "o-", color="#d94801", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    paths = [folder / "loss.svg", folder / "loss.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def moving_average(losses: Sequence[float]) -> list[float]:
    """For each step the mean of the last SMOOTH losses, or of as many as there are."""
    return [
        sum(losses[max(0, end - SMOOTH) : end]) / min(SMOOTH, end)
        for end in range(1, len(losses) + 1)
    ]
