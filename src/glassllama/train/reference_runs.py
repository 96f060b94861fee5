"""Is my run normal? Where the loss of a preset's runs usually is, and what it means to be outside.

A preset's file in bands/ is made by benchmarks/train_bands.py from runs of several seeds: for each
block of steps the range in which the mean training loss of a normal run is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from glassllama.train.resolve import preset_names, resolve
from glassllama.train.run import essential
from glassllama.train.settings import Settings

BANDS = resources.files("glassllama.train") / "bands"
FREE = ("run.seed", "run.device", "run.compile", "run.accumulate", "run.loss_chunk")  # of the band
SPREADS, MARGIN = 4.0, 0.03  # standard deviations of the seeds, and nats, to either side


@dataclass(frozen=True, kw_only=True)
class Band:
    """For each of `steps` the usual mean training loss of the steps since the one before it."""

    seeds: int
    steps: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def band_of(settings: Settings) -> Band | None:
    """The band of a preset, None where there is none or the settings are not the preset's own."""
    file = BANDS / f"{settings.name}.json"
    if settings.name not in preset_names() or not file.is_file():
        return None
    if compared(settings) != compared(resolve(settings.name)):
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    steps, low, high = (tuple(values[name]) for name in ("steps", "low", "high"))
    return Band(seeds=values["seeds"], steps=steps, low=low, high=high)


def compared(settings: Settings) -> dict[str, object]:
    """What must be the preset's own for its band to hold; the corpus among it."""
    values = {name: value for name, value in essential(settings).items() if name not in FREE}
    return values | {"data.corpus": settings.data.corpus}


def make_band(steps: Sequence[int], losses: Sequence[Sequence[float]]) -> Band:
    """From the losses of each step, one list a seed -> their band at `steps`."""
    low, high = [], []
    for first, last in zip([0, *steps], steps, strict=False):
        means = [sum(seed[first:last]) / (last - first) for seed in losses]
        middle = sum(means) / len(means)
        spread = (sum((m - middle) ** 2 for m in means) / max(1, len(means) - 1)) ** 0.5
        low.append(round(middle - SPREADS * spread - MARGIN, 4))
        high.append(round(middle + SPREADS * spread + MARGIN, 4))
    return Band(seeds=len(losses), steps=tuple(steps), low=tuple(low), high=tuple(high))


class Watchman:
    """Compares a run with its band, block by block, and speaks once when it leaves it."""

    def __init__(self, band: Band, first_step: int = 0) -> None:
        self.band, self.outside = band, False
        self._block: list[float] = []
        self._whole = first_step == 0  # a block that began before a resumption is passed over

    def hear(self, step: int, loss: float) -> str | None:
        """What to say after this step, if anything."""
        self._block.append(loss)
        if step not in self.band.steps:
            return None
        mean, whole = sum(self._block) / len(self._block), self._whole
        self._block, self._whole = [], True
        at = self.band.steps.index(step)
        low, high = self.band.low[at], self.band.high[at]
        if not whole or self.outside or low <= mean <= high:
            return None
        self.outside = True
        causes = BELOW if mean < low else ABOVE_EARLY if at < len(self.band.steps) / 4 else ABOVE
        return f"step {step}: loss {mean:.3f} is outside the usual {low:.3f} … {high:.3f}: {causes}"


ABOVE_EARLY = (
    "learning is slow from the beginning: usually the learning rate or its warmup, other text than "
    "the preset's, or part of the model frozen"
)
ABOVE = (
    "it began well and then fell behind: usually a learning rate too high for this place, a "
    "schedule that decays too early, or another precision than the preset's"
)
BELOW = (
    "better than it should be: usually the model sees what it is to predict (mask, targets), the "
    "training text repeats itself, or it holds the validation text"
)
