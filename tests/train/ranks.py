"""What each of two ranks does in test_distributed.py.

FOLDER/alone holds a run by one process, whose last checkpoint is that of step 8. All results come
back as files: report.json, and the whole state of resumed runs, gathered.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from glassllama.train.data import open_data
from glassllama.train.distributed import Team, together, whole
from glassllama.train.loop import Nobody, train
from glassllama.train.metrics import Record
from glassllama.train.prepare import prepare, take_up
from glassllama.train.resolve import resolve
from glassllama.train.run import Run, training_state
from glassllama.train.signals import Wish
from train.recipes import PRESET, Listener, changes

# The preset's own rate is Muon's; of AdamW for every matrix it is so large that gradients leap
# from step to step, and a rounding of the first grows a hundredfold by the twelfth.
CALM = "optimiser.lr=0.002"
WAYS = {
    "muon": (
        "llama", "optimiser.ema=0.9", "run.accumulate=3", "run.loss_chunk=10",
        "model.tie_embeddings=false",
    ),
    "adamw": ("llama", "optimiser.kind=adamw", CALM),
    "gpt": ("gpt", "optimiser.weight_decay=0.1"),
    "bigram": ("bigram",),
    "bfloat16": ("llama", "optimiser.kind=adamw", CALM, "run.precision=bfloat16"),
}  # fmt: skip
HALF, STEPS = 8, 12  # checkpoints of a run that are kept


def settings_of(way: str) -> list[str]:
    return ["run.precision=float32", *WAYS[way][1:]]


def share_of_run(folder: Path, text: Path, way: str, team: Team) -> Run:
    settings = resolve(PRESET[WAYS[way][0]], changes(WAYS[way][0], text, *settings_of(way)))
    folder.mkdir(parents=True, exist_ok=True)
    data = team.lead_first(lambda: open_data(settings.data, folder, written=not team.leads))
    run = prepare(settings, data, folder, team)
    take_up(run)
    return run


def steps_of(run: Run) -> list[Record]:
    listener = Listener()
    train(run, Nobody(), listener, Wish())
    return listener.records


def losses(records: list[Record]) -> list[float]:
    return [value for r in records for value in (r.loss, r.grad_norm, r.val_loss) if value]


def write_whole(run: Run, path: Path) -> None:
    """The state that was resumed, gathered: all ranks, then the leader's file."""
    state = {name: whole(tensor).contiguous() for name, tensor in training_state(run).items()}
    if run.team.leads:
        save_file(state, path)


def without_last(source: Path, target: Path, team: Team) -> Path:
    """A copy of a run's folder, as if it had been killed before its last checkpoint."""
    if team.leads:
        shutil.copytree(source, target)
        shutil.rmtree(target / "checkpoints" / f"step-{STEPS:06d}")
    team.wait()
    return target


def same_everywhere(one: Run, other: Run) -> bool:
    """Whether both have the same state, bit for bit, on every rank."""
    left, right = (
        {name: getattr(t, "_local_tensor", t) for name, t in training_state(run).items()}
        for run in (one, other)
    )
    same = set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)
    return one.team.greatest(int(not same)) == 0


def main(home: Path, text: Path) -> None:
    with together("cpu") as team:
        report: dict[str, object] = {}
        straight = {way: share_of_run(home / way, text, way, team) for way in WAYS}
        for way, run in straight.items():
            report[way] = losses(steps_of(run))
        halves = share_of_run(
            without_last(home / "muon", home / "halves", team), text, "muon", team
        )
        report["resumed at"] = halves.progress.step
        write_whole(halves, home / "halves.safetensors")
        report["halves"] = losses(steps_of(halves))
        report["same bits"] = same_everywhere(straight["muon"], halves)
        from_one = share_of_run(home / "alone", text, "muon", team)
        write_whole(from_one, home / "from_one.safetensors")
        report["from one"] = losses(steps_of(from_one))
        if team.leads:
            (home / "report.json").write_text(json.dumps(report), encoding="utf-8")
