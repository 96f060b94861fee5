"""From a bigram to a Llama, a step at a time: what each step gains and costs, measured.

    python benchmarks/ladder.py                      (goes on where it was stopped)
    python benchmarks/ladder.py --data bpe --seeds 5
    python benchmarks/ladder.py --speed              (tokens per second, on an idle machine)
    python benchmarks/ladder.py --render             (docs/ladder.md and docs/ladder.svg)

Every rung of benchmarks/rungs.py is trained with the package's own training step on the same
batches, from a few seeds. Each run takes one thread, as many go at a time as there are processors,
and each leaves a JSON line in benchmarks/results/.
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
from ladder_page import RESULTS, SEEDS, read_lines, render
from rungs import GPT, Sizes, WithQKNorm, WithRMSNorm, WithRoPE, WithSwiGLU

from glassllama import __version__
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.train.batches import Batches
from glassllama.train.data import Data, open_data
from glassllama.train.loop import judged, one_step
from glassllama.train.optimizers import Optimisers
from glassllama.train.run import Run
from glassllama.train.settings import (
    DataSettings,
    ModelSettings,
    OptimiserSettings,
    RunSettings,
    ScheduleSettings,
    Settings,
)

CONTEXT, BATCH, STEPS = 64, 32, 490  # of Tiny Shakespeare: one pass
DATA = {
    "characters": DataSettings(corpus="tinyshakespeare", context=CONTEXT, batch=BATCH),
    "bpe": DataSettings(corpus="shakespeare", tokenizer="bpe:1024", context=CONTEXT, batch=BATCH),
}
WARMUP = 40  # steps
CURVE = 10  # steps over which a point of the curve is a mean
MANY = range(1, 11)  # seeds: as many as the page has quantiles for
BFLOAT16_BYTES = 2  # what a cache keeps a number in
SPEED_STEPS, SPEED_ROUNDS = 5, 7

ADAMW = OptimiserSettings(kind="adamw", lr=4e-3, weight_decay=0.1)
MUON = OptimiserSettings(kind="muon", lr=4e-3, matrix_lr=0.02, weight_decay=0.1)
# A table has no depth: it takes large steps, and a large weight in it is no fault.
TABLE = OptimiserSettings(kind="adamw", lr=0.1)


def bigram(sizes: Sizes) -> Bigram:
    return Bigram(BigramConfig(vocab_size=sizes.vocab_size, max_seq_len=sizes.max_seq_len))


@dataclass(frozen=True)
class Rung:
    """`sizes`: what differs from a GPT's, so that about as many numbers are learnt."""

    name: str
    model: Callable[[Sizes], Any]
    optimiser: OptimiserSettings = ADAMW
    sizes: Mapping[str, int] = field(default_factory=dict)


GATED = {"ffn_dim": 344}  # three matrices instead of two, and the table of positions is gone
GROUPED = {"ffn_dim": 384, "n_kv_heads": 2}  # what keys and values lose goes to the features
RUNGS = (
    Rung("bigram", bigram, TABLE),
    Rung("GPT", GPT),
    Rung("+ RMSNorm", WithRMSNorm),
    Rung("+ RoPE", WithRoPE),
    Rung("+ SwiGLU", WithSwiGLU, ADAMW, GATED),
    Rung("+ GQA", WithSwiGLU, ADAMW, GROUPED),
    Rung("+ QK-norm", WithQKNorm, ADAMW, GROUPED),
    Rung("+ Muon", WithQKNorm, MUON, GROUPED),
    Rung("GPT with Muon", GPT, MUON),  # beside the ladder: is it the optimiser alone?
)
BY_NAME = {rung.name: rung for rung in RUNGS}


@dataclass(frozen=True)
class Task:
    """One run; two tasks that are equal have the same loss."""

    rung: str
    seed: int
    data: str
    steps: int
    folder: str  # for ids, of this process and its children

    def identity(self) -> dict[str, Any]:
        """What a result must say of itself to be this task's."""
        rung = BY_NAME[self.rung]
        return {
            "rung": self.rung, "seed": self.seed, "data": self.data, "steps": self.steps,
            "batch": BATCH, "context": CONTEXT, "sizes": dict(rung.sizes),
            "optimiser": asdict(rung.optimiser),
        }  # fmt: skip


@cache
def data_of(name: str, folder: str) -> Data:
    return open_data(DATA[name], Path(folder) / f"{name}-{os.getpid()}")


def settings(task: Task) -> Settings:
    return Settings(
        name=task.rung,
        model=ModelSettings(kind="bigram" if task.rung == "bigram" else "llama"),
        data=DATA[task.data],
        optimiser=BY_NAME[task.rung].optimiser,
        schedule=ScheduleSettings(
            kind="cosine", steps=task.steps, warmup=min(WARMUP, task.steps // 2)
        ),
        run=RunSettings(seed=task.seed),
    )


def make_run(task: Task) -> Run:
    """The rung, as the package's trainer takes it; nothing is ever saved."""
    rung, data = BY_NAME[task.rung], data_of(task.data, task.folder)
    sizes = Sizes(vocab_size=data.tokenizer.vocab_size, max_seq_len=CONTEXT, **rung.sizes)
    model = rung.model(sizes)
    model.initialize(torch.Generator().manual_seed(task.seed))
    return Run(
        settings=settings(task),
        folder=Path(task.folder),
        data=data,
        model=model.train(),
        optimisers=Optimisers(model, rung.optimiser),
        batches=Batches(data.learnt, CONTEXT, BATCH, task.seed),
    )


def kv_bytes(task: Task) -> int:
    """What a cache would keep of every token, in bfloat16."""
    if task.rung == "bigram":
        return 0
    s = Sizes(vocab_size=1, max_seq_len=1, **BY_NAME[task.rung].sizes)
    return 2 * s.n_layers * s.n_kv_heads * s.head_dim * BFLOAT16_BYTES


def measure(task: Task) -> dict[str, Any]:
    """Train one rung from one seed -> its line of results."""
    run, started, worked = make_run(task), time.perf_counter(), time.process_time()
    losses = [one_step(run).loss for _ in range(run.settings.schedule.steps)]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    score = judged(run)
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
    """Add a result; the file is there whole or as before, whatever stops the writer."""
    lines = [*read_lines(path), line]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    os.replace(partial, path)


def missing(tasks: list[Task], lines: list[dict[str, Any]], path: Path) -> list[Task]:
    """The tasks without a result. Ends the program where a result is of another ladder."""
    wanted = {(task.rung, task.seed): task for task in tasks}
    for line in lines:
        task = wanted.get((line["rung"], line["seed"]))
        if task is None:
            continue
        for name, value in task.identity().items():
            if line[name] != value:
                sys.exit(f"{path}: {task.rung}, seed {task.seed}: {name} was {line[name]}, is now "
                         f"{value}; begin another ladder with --out FILE.jsonl")  # fmt: skip
        del wanted[task.rung, task.seed]
    return list(wanted.values())


def begin_worker() -> None:
    """One thread for a run; and none goes on when the program that asked for it is gone."""
    torch.set_num_threads(1)
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def climb(tasks: list[Task], path: Path, at_once: int) -> None:
    """Run what is missing, seed after seed, and keep every result as soon as it is there."""
    left = missing(tasks, read_lines(path), path)
    print(f"{path}: {len(tasks) - len(left)} of {len(tasks)} runs are there", file=sys.stderr)
    with ProcessPoolExecutor(at_once, get_context("spawn"), initializer=begin_worker) as pool:
        for done in as_completed([pool.submit(measure, task) for task in left]):
            line = done.result()
            append(path, line)
            print(f"{line['rung']:14} seed {line['seed']}  val loss {line['val_loss']:.4f}  "
                  f"{line['seconds']:.0f} s", flush=True)  # fmt: skip


def speeds(data: str, folder: str) -> Iterator[dict[str, Any]]:
    """Tokens per second of each rung, by processor time of one thread, the best of some rounds.

    The rungs take turns, so that what else the machine does disturbs all alike.
    """
    torch.set_num_threads(1)
    runs = {rung.name: make_run(Task(rung.name, 1, data, STEPS, folder)) for rung in RUNGS}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(1 + SPEED_ROUNDS):  # in the first round everything is slow, and it never wins
        for name, run in runs.items():
            started = time.process_time()
            for _ in range(SPEED_STEPS):
                one_step(run)
            best[name] = min(best[name], time.process_time() - started)
    for name, seconds in best.items():
        tok_s = SPEED_STEPS * BATCH * CONTEXT / seconds
        yield {"rung": name, "data": data, "tok_s": round(tok_s), "load": os.getloadavg()[0]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=DATA, default="characters")
    parser.add_argument("--seeds", type=int, default=SEEDS, choices=MANY, metavar="N")
    parser.add_argument("--rungs", nargs="+", choices=BY_NAME, default=list(BY_NAME))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--speed", action="store_true", help="measure tokens per second instead")
    parser.add_argument("--render", action="store_true", help="write the page instead")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.render:
        return render()
    with tempfile.TemporaryDirectory(prefix="ladder-") as folder:
        if given.speed:
            path = given.out or RESULTS / f"ladder-{given.data}-speed.jsonl"
            lines = list(speeds(given.data, folder))
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            return print(path.read_text(encoding="utf-8"), end="")
        seeds = range(1, given.seeds + 1)
        tasks = [
            Task(rung, seed, given.data, given.steps, folder)
            for seed in seeds
            for rung in given.rungs
        ]
        climb(tasks, given.out or RESULTS / f"ladder-{given.data}.jsonl", given.at_once)


if __name__ == "__main__":
    main()
