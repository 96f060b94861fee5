"""Ablations: what each part of a Llama gains and costs, from a bigram to a Llama in single changes.

    python benchmarks/ablations.py                      (continues an interrupted run)
    python benchmarks/ablations.py --data bpe --seeds 5
    python benchmarks/ablations.py --speed              (tokens per second, on an idle machine)
    python benchmarks/ablations.py --render             (docs/ablations.md and docs/ablations.svg)

Every variant of benchmarks/ablation_models.py is trained with the package's own training step on
the same batches, from a few seeds. Each run uses one thread, as many run at the same time as there
are processors, and the result of each is one JSON line in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean
from threading import Thread
from typing import Any

import torch
from ablation_models import GPT, Sizes, WithQKNorm, WithRMSNorm, WithRoPE, WithSwiGLU
from ablations_page import RESULTS, SEEDS, read_lines, render

from glassllama import __version__
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.train.checkpoint import Run
from glassllama.train.corpus import Data, open_data
from glassllama.train.loop import evaluate_run, train_step
from glassllama.train.optimizers import Optimizers
from glassllama.train.settings import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
    Settings,
)
from glassllama.train.tokens import Batches

CONTEXT, BATCH, STEPS = 64, 32, 490  # one epoch of Tiny Shakespeare
DATA = {
    "characters": DataSettings(corpus="tinyshakespeare", context=CONTEXT, batch=BATCH),
    "bpe": DataSettings(corpus="shakespeare", tokenizer="bpe:1024", context=CONTEXT, batch=BATCH),
}
WARMUP = 40  # steps
CURVE = 10  # each point of a curve is the mean of so many steps
SEED_COUNTS = range(1, 11)  # limited by the quantiles in ablations_page.py
BFLOAT16_BYTES = 2
SPEED_STEPS, SPEED_ROUNDS = 5, 7

ADAMW = OptimizerSettings(kind="adamw", lr=4e-3, weight_decay=0.1)
MUON = OptimizerSettings(kind="muon", lr=4e-3, matrix_lr=0.02, weight_decay=0.1)
# The bigram has no layers, so a high learning rate without weight decay is stable.
TABLE = OptimizerSettings(kind="adamw", lr=0.1)


def bigram(sizes: Sizes) -> Bigram:
    return Bigram(BigramConfig(vocab_size=sizes.vocab_size, max_seq_len=sizes.max_seq_len))


@dataclass(frozen=True)
class Variant:
    """`sizes` differ from a GPT's so that all variants have about the same number of parameters."""

    name: str
    model: Callable[[Sizes], Any]
    optimizer: OptimizerSettings = ADAMW
    sizes: Mapping[str, int] = field(default_factory=dict)


GATED = {"ffn_dim": 344}  # three matrices instead of two, and no table of positions
GROUPED = {"ffn_dim": 384, "n_kv_heads": 2}  # fewer kv heads, so a wider feed-forward network
VARIANTS = (
    Variant("bigram", bigram, TABLE),
    Variant("GPT", GPT),
    Variant("+ RMSNorm", WithRMSNorm),
    Variant("+ RoPE", WithRoPE),
    Variant("+ SwiGLU", WithSwiGLU, ADAMW, GATED),
    Variant("+ GQA", WithSwiGLU, ADAMW, GROUPED),
    Variant("+ QK-norm", WithQKNorm, ADAMW, GROUPED),
    Variant("+ Muon", WithQKNorm, MUON, GROUPED),
    Variant("GPT with Muon", GPT, MUON),  # shows how much the optimizer alone gains
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


@dataclass(frozen=True)
class Task:
    """One run; equal tasks have the same loss."""

    variant: str
    seed: int
    data: str
    steps: int
    folder: str  # for the token ids, used by this process and its children

    def identity(self) -> dict[str, Any]:
        """The fields that identify the result of this task."""
        variant = BY_NAME[self.variant]
        return {
            "variant": self.variant, "seed": self.seed, "data": self.data, "steps": self.steps,
            "batch": BATCH, "context": CONTEXT, "sizes": dict(variant.sizes),
            "optimizer": asdict(variant.optimizer),
        }  # fmt: skip


@cache
def data_of(name: str, folder: str) -> Data:
    return open_data(DATA[name], Path(folder) / f"{name}-{os.getpid()}")


def settings(task: Task) -> Settings:
    return Settings(
        name=task.variant,
        model=ModelSettings(kind="bigram" if task.variant == "bigram" else "llama"),
        data=DATA[task.data],
        optimizer=BY_NAME[task.variant].optimizer,
        schedule=ScheduleSettings(
            kind="cosine", steps=task.steps, warmup=min(WARMUP, task.steps // 2)
        ),
        run=RunSettings(seed=task.seed),
    )


def make_run(task: Task) -> Run:
    """A run of the variant for the package's training step; it is never saved."""
    variant, data = BY_NAME[task.variant], data_of(task.data, task.folder)
    sizes = Sizes(vocab_size=data.tokenizer.vocab_size, max_seq_len=CONTEXT, **variant.sizes)
    model = variant.model(sizes)
    model.initialize(torch.Generator().manual_seed(task.seed))
    return Run(
        settings=settings(task),
        folder=Path(task.folder),
        data=data,
        model=model.train(),
        optimizers=Optimizers(model, variant.optimizer),
        batches=Batches(data.train, CONTEXT, BATCH, task.seed),
    )


def kv_bytes(task: Task) -> int:
    """Bytes of a KV cache per token, in bfloat16."""
    if task.variant == "bigram":
        return 0
    s = Sizes(vocab_size=1, max_seq_len=1, **BY_NAME[task.variant].sizes)
    return 2 * s.n_layers * s.n_kv_heads * s.head_dim * BFLOAT16_BYTES


def measure(task: Task) -> dict[str, Any]:
    """Train one variant with one seed -> its line of results."""
    run, started, worked = make_run(task), time.perf_counter(), time.process_time()
    losses = [train_step(run).loss for _ in range(run.settings.schedule.steps)]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    score = evaluate_run(run)
    return task.identity() | {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "kv_bytes": kv_bytes(task),
        "val_loss": round(score.val_loss, 5),
        "bits_per_byte": round(score.bits_per_byte, 5),
        "curve": [round(fmean(losses[at : at + CURVE]), 4) for at in range(0, len(losses), CURVE)],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "version": __version__,
        "torch": torch.__version__,
    }


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a result, atomically."""
    lines = [*read_lines(path), line]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    os.replace(partial, path)


def missing(tasks: list[Task], lines: list[dict[str, Any]], path: Path) -> list[Task]:
    """The tasks without a result. Ends the program if a result was made with other settings."""
    left = {(task.variant, task.seed): task for task in tasks}
    for line in lines:
        task = left.get((line["variant"], line["seed"]))
        if task is None:
            continue
        for name, value in task.identity().items():
            if line[name] != value:
                sys.exit(f"{path}: {task.variant}, seed {task.seed}: {name} was {line[name]}, is "
                         f"now {value}; write new results with --out FILE.jsonl")  # fmt: skip
        del left[task.variant, task.seed]
    return list(left.values())


def begin_worker() -> None:
    """Use one thread per run, and end the worker when the main program has ended."""
    torch.set_num_threads(1)
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def run_missing(tasks: list[Task], path: Path, at_once: int) -> None:
    """Run the missing tasks, seed by seed, and store every result immediately."""
    todo = missing(tasks, read_lines(path), path)
    print(f"{path}: {len(tasks) - len(todo)} of {len(tasks)} runs are done", file=sys.stderr)
    with ProcessPoolExecutor(at_once, get_context("spawn"), initializer=begin_worker) as pool:
        for done in as_completed([pool.submit(measure, task) for task in todo]):
            line = done.result()
            append(path, line)
            print(f"{line['variant']:14} seed {line['seed']}  val loss {line['val_loss']:.4f}  "
                  f"{line['seconds']:.0f} s", flush=True)  # fmt: skip


def speeds(data: str, folder: str) -> Iterator[dict[str, Any]]:
    """Tokens per second of each variant, by CPU time of one thread, the best of some rounds.

    The variants alternate, so that other load on the machine affects all of them equally.
    """
    torch.set_num_threads(1)
    names = [variant.name for variant in VARIANTS]
    runs = {name: make_run(Task(name, 1, data, STEPS, folder)) for name in names}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(1 + SPEED_ROUNDS):  # the first round warms up
        for name, run in runs.items():
            started = time.process_time()
            for _ in range(SPEED_STEPS):
                train_step(run)
            best[name] = min(best[name], time.process_time() - started)
    for name, seconds in best.items():
        tok_s = SPEED_STEPS * BATCH * CONTEXT / seconds
        yield {"variant": name, "data": data, "tok_s": round(tok_s), "load": os.getloadavg()[0]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=DATA, default="characters")
    parser.add_argument("--seeds", type=int, default=SEEDS, choices=SEED_COUNTS, metavar="N")
    parser.add_argument("--variants", nargs="+", choices=BY_NAME, default=list(BY_NAME))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--speed", action="store_true", help="measure tokens per second instead")
    parser.add_argument("--render", action="store_true", help="write the page instead")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.render:
        return render()
    with tempfile.TemporaryDirectory(prefix="ablations-") as folder:
        if given.speed:
            path = given.out or RESULTS / f"ablations-{given.data}-speed.jsonl"
            lines = list(speeds(given.data, folder))
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            return print(path.read_text(encoding="utf-8"), end="")
        seeds = range(1, given.seeds + 1)
        tasks = [
            Task(variant, seed, given.data, given.steps, folder)
            for seed in seeds
            for variant in given.variants
        ]
        run_missing(tasks, given.out or RESULTS / f"ablations-{given.data}.jsonl", given.at_once)


if __name__ == "__main__":
    main()
