"""The work of each of two ranks in test_distributed.py.

FOLDER/single contains a run of one process, whose last checkpoint is that of step 8. All results
are files: report.json, and the gathered state of resumed runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from glassllama.train.api import prepare
from glassllama.train.checkpoint import Run, maybe_resume, training_state
from glassllama.train.corpus import open_data
from glassllama.train.distributed import DistContext, connect_ranks, full_tensor
from glassllama.train.loop import StopRequest, train_steps
from glassllama.train.metrics import LoggedMetrics
from glassllama.train.settings import load_settings
from train.recipes import PRESET, Listener, changes

# The preset's learning rate is for Muon; with AdamW it is so large that a rounding error in the
# first step grows a hundredfold by the twelfth.
SMALL_LR = "optimizer.lr=0.002"
WAYS = {
    "muon": (
        "llama", "optimizer.ema=0.9", "run.accumulate=3", "run.loss_chunk=10",
        "model.tie_embeddings=false",
    ),
    "adamw": ("llama", "optimizer.kind=adamw", SMALL_LR),
    "gpt": ("gpt", "optimizer.weight_decay=0.1"),
    "bigram": ("bigram",),
    "bfloat16": ("llama", "optimizer.kind=adamw", SMALL_LR, "run.precision=bfloat16"),
}  # fmt: skip
HALF, STEPS = 8, 12  # steps of the checkpoints of a run


def settings_of(way: str) -> list[str]:
    return ["run.precision=float32", *WAYS[way][1:]]


def share_of_run(folder: Path, text: Path, way: str, dist: DistContext) -> Run:
    settings = load_settings(PRESET[WAYS[way][0]], changes(WAYS[way][0], text, *settings_of(way)))
    folder.mkdir(parents=True, exist_ok=True)
    data = dist.rank0_first(lambda: open_data(settings.data, folder, written=not dist.is_rank0))
    run = prepare(settings, data, folder, dist)
    maybe_resume(run)
    return run


def steps_of(run: Run) -> list[LoggedMetrics]:
    listener = Listener()
    train_steps(run, None, listener, StopRequest())
    return listener.records


def losses(records: list[LoggedMetrics]) -> list[float]:
    return [value for r in records for value in (r.loss, r.grad_norm, r.val_loss) if value]


def write_whole(run: Run, path: Path) -> None:
    """Gather the resumed state on all ranks; rank 0 writes it."""
    state = {name: full_tensor(tensor).contiguous() for name, tensor in training_state(run).items()}
    if run.dist.is_rank0:
        save_file(state, path)


def without_last(source: Path, target: Path, dist: DistContext) -> Path:
    """A copy of a run's folder without its last checkpoint, as if the run had been killed
    before."""
    if dist.is_rank0:
        shutil.copytree(source, target)
        shutil.rmtree(target / "checkpoints" / f"step-{STEPS:06d}")
    dist.barrier()
    return target


def same_everywhere(one: Run, other: Run) -> bool:
    """Whether both have bit-identical states on every rank."""
    left, right = (
        {name: getattr(t, "_local_tensor", t) for name, t in training_state(run).items()}
        for run in (one, other)
    )
    same = set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)
    return one.dist.maximum(int(not same)) == 0


def main(home: Path, text: Path) -> None:
    with connect_ranks("cpu") as dist:
        report: dict[str, object] = {}
        straight = {way: share_of_run(home / way, text, way, dist) for way in WAYS}
        for way, run in straight.items():
            report[way] = losses(steps_of(run))
        resumed = share_of_run(
            without_last(home / "muon", home / "resumed", dist), text, "muon", dist
        )
        report["resumed at"] = resumed.progress.step
        write_whole(resumed, home / "resumed.safetensors")
        report["resumed"] = losses(steps_of(resumed))
        report["same bits"] = same_everywhere(straight["muon"], resumed)
        from_one = share_of_run(home / "single", text, "muon", dist)
        write_whole(from_one, home / "from_one.safetensors")
        report["from one"] = losses(steps_of(from_one))
        if dist.is_rank0:
            (home / "report.json").write_text(json.dumps(report), encoding="utf-8")
