"""Small runs for the tests of training: real text, real models, seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glassllama.train.data import open_data
from glassllama.train.loop import train
from glassllama.train.metrics import Journal, Record
from glassllama.train.prepare import prepare, take_up
from glassllama.train.resolve import resolve
from glassllama.train.run import Run
from glassllama.train.signals import Wish

TINY = {
    "llama": ["model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.head_dim=6",
              "model.dim=24", "model.ffn_dim=40"],
    "gpt": ["model.n_layers=2", "model.n_heads=3", "model.dim=24", "model.ffn_dim=40"],
    "bigram": [],
}  # fmt: skip
PRESET = {
    "llama": "llama-tinyshakespeare-cpu",
    "gpt": "gpt-tinyshakespeare-cpu",
    "bigram": "bigram-tinyshakespeare",
}
SHORT = [
    "data.context=16", "data.batch=6", "schedule.steps=12", "schedule.warmup=2",
    "run.eval_every=4", "run.save_every=4",
]  # fmt: skip


def write_text(folder: Path, source: Path, characters: int = 6000) -> Path:
    """The beginning of a text, as a file of its own."""
    path = folder / "text.txt"
    path.write_text(source.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return path


def changes(kind: str, text: Path, *more: str) -> list[str]:
    return [*TINY[kind], *SHORT, f"data.corpus={text}", *more]


def new_run(folder: Path, text: Path, kind: str = "llama", *more: str) -> Run:
    """A tiny run of that kind, ready for its first step, or for the next after its checkpoint."""
    settings = resolve(PRESET[kind], changes(kind, text, *more))
    folder.mkdir(parents=True, exist_ok=True)
    run = prepare(settings, open_data(settings.data, folder), folder)
    take_up(run)
    return run


class Listener:
    """Keeps what it is told; raises the wish to stop after a step, if asked."""

    def __init__(self, wish: Wish | None = None, stop_after: int = -1, **_: Any) -> None:
        self.records: list[Record] = []
        self.samples: list[str] = []
        self.wish, self.stop_after = wish, stop_after

    def on_step(self, record: Record) -> None:
        self.records.append(record)
        if record.step == self.stop_after and self.wish is not None:
            import signal

            self.wish.signal = signal.SIGINT

    def on_sample(self, step: int, text: str) -> None:
        self.samples.append(text)


def make_steps(run: Run, stop_after: int = -1) -> list[Record]:
    """Train to the end, or as if Ctrl-C came in that step -> the records of these steps."""
    wish = Wish()
    listener = Listener(wish, stop_after)
    journal = Journal(run.folder, run.progress.step)
    try:
        train(run, journal, listener, wish)
    finally:
        journal.close()
    return listener.records
