"""Where the losses of a preset's runs usually are: several seeds, into src/glassllama/train/bands.

python benchmarks/train_bands.py PRESET … [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from glassllama.train import reference_runs
from glassllama.train.data import open_data
from glassllama.train.loop import train
from glassllama.train.metrics import Journal, Record, read_records
from glassllama.train.prepare import prepare
from glassllama.train.resolve import resolve
from glassllama.train.signals import Wish

BLOCKS = 20  # of steps, at whose ends a run is compared


class Quiet:
    """Prints a line now and then."""

    def on_step(self, record: Record) -> None:
        if record.val_loss is not None:
            print(f"step {record.step}: {record.val_loss:.4f}", flush=True)

    def on_sample(self, step: int, text: str) -> None:
        pass


def losses_of(name: str, seed: int) -> list[float]:
    """The training loss of every step of one run."""
    settings = resolve(name, [f"run.seed={seed}", "run.sample_every=0"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = prepare(settings, open_data(settings.data, folder), folder)
        journal = Journal(folder)
        train(run, journal, Quiet(), Wish())
        journal.close()
        return [record.loss for record in read_records(folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in options.presets:
        losses = [losses_of(name, seed) for seed in range(1, options.seeds + 1)]
        total = len(losses[0])
        steps = [total * block // BLOCKS for block in range(1, BLOCKS + 1)]
        band = reference_runs.make_band(steps, losses)
        path = Path(reference_runs.__file__).parent / "bands" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(band)) + "\n", encoding="utf-8")
        print(f"{path}: {len(steps)} blocks of {options.seeds} seeds")


if __name__ == "__main__":
    main()
