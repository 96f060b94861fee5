"""Writes the reference runs of presets (several seeds) to src/glassllama/train/reference_runs.

python benchmarks/train_reference_runs.py PRESET … [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from glassllama.train import LoggedMetrics, NullListener, load_settings, train
from glassllama.train.metrics import REFERENCE_RUNS, ReferenceRuns, read_log

BLOCKS = 20  # blocks of steps; a run is compared at the end of each
DEVIATIONS, MARGIN = 4.0, 0.03  # standard deviations over seeds, and nats, to either side


class ShowScores(NullListener):
    def on_step(self, metrics: LoggedMetrics) -> None:
        if metrics.val_loss is not None:
            print(f"step {metrics.step}: {metrics.val_loss:.4f}", flush=True)


def losses_of(name: str, seed: int) -> list[float]:
    """The training loss of every step of one run."""
    settings = load_settings(name, [f"run.seed={seed}", "run.sample_every=0"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = train(settings, folder=f"{temporary}/run", checks=False, listener=ShowScores())
        return [metrics.loss for metrics in read_log(folder)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in options.presets:
        losses = [losses_of(name, seed) for seed in range(1, options.seeds + 1)]
        total = len(losses[0])
        steps = [total * block // BLOCKS for block in range(1, BLOCKS + 1)]
        path = Path(str(REFERENCE_RUNS / f"{name}.json"))
        reference = make_reference(steps, losses)
        path.write_text(json.dumps(asdict(reference)) + "\n", encoding="utf-8")
        print(f"{path}: {len(steps)} blocks of {options.seeds} seeds")


if __name__ == "__main__":
    main()
