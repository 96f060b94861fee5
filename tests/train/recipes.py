"""Small runs for the tests of training: real text, real models, a few seconds."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch

from glassllama.base.config import LlamaConfig
from glassllama.models.llama import Llama
from glassllama.train.api import prepare
from glassllama.train.checkpoint import Run, maybe_resume
from glassllama.train.corpus import open_data
from glassllama.train.loop import StopRequest, train_steps
from glassllama.train.metrics import LoggedMetrics, MetricsLog, NullListener
from glassllama.train.settings import load_settings

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
    """Write the beginning of a text to a new file."""
    path = folder / "text.txt"
    path.write_text(source.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return path


def changes(kind: str, text: Path, *more: str) -> list[str]:
    return [*TINY[kind], *SHORT, f"data.corpus={text}", *more]


def new_run(folder: Path, text: Path, kind: str = "llama", *more: str) -> Run:
    """A tiny run of that kind, ready for its first step or for the next one after its
    checkpoint."""
    settings = load_settings(PRESET[kind], changes(kind, text, *more))
    folder.mkdir(parents=True, exist_ok=True)
    run = prepare(settings, open_data(settings.data, folder), folder)
    maybe_resume(run)
    return run


class Listener(NullListener):
    """Stores what it receives; requests a stop after a given step."""

    def __init__(self, stop: StopRequest | None = None, stop_after: int = -1) -> None:
        self.records: list[LoggedMetrics] = []
        self.samples: list[str] = []
        self.stop, self.stop_after = stop, stop_after

    def on_step(self, metrics: LoggedMetrics) -> None:
        self.records.append(metrics)
        if metrics.step == self.stop_after and self.stop is not None:
            self.stop.received = signal.SIGINT

    def on_sample(self, step: int, text: str) -> None:
        self.samples.append(text)


def make_steps(run: Run, stop_after: int = -1) -> list[LoggedMetrics]:
    """Train to the end, or as if Ctrl-C was pressed in that step -> the metrics of these steps."""
    stop = StopRequest()
    listener = Listener(stop, stop_after)
    log = MetricsLog(run.folder, run.progress.step)
    try:
        train_steps(run, log, listener, stop)
    finally:
        log.close()
    return listener.records


def small_llama(vocab_size: int = 69, **changes: Any) -> Llama:
    """All sizes differ; weights are large enough that every part matters."""
    sizes = {
        "dim": 40, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 12, "ffn_dim": 56,
        "vocab_size": vocab_size, "max_seq_len": 32, "norm_eps": 1e-5, "rope_theta": 10_000.0,
        "tie_embeddings": True,
    }  # fmt: skip
    model = Llama(LlamaConfig(**{**sizes, **changes}))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.3 * noise + (parameter.ndim == 1)
    return model
