"""Two ranks equal one process: the same losses, and the same resumed state from either.

Real processes with gloo and tiny models: under torchrun once, otherwise forked, with their ranks in
the environment as set by torchrun.
"""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forks import WITH_TORCH, run_script, server
from glassllama.base.errors import ConfigError, TrainingError
from glassllama.llm import load
from glassllama.native.jit import code_cache
from glassllama.train.checkpoint import maybe_resume
from glassllama.train.distributed import DistContext
from glassllama.train.loop import of_all_ranks, rows_of_rank
from glassllama.train.tokens import IGNORED, Batch
from tolerances import CONDITION, difference, loss_tolerance, muon_tolerance
from train import ranks
from train.ranks import HALF, STEPS, WAYS, losses, settings_of
from train.recipes import SHORT, TINY, make_steps, new_run

TWO_RANKS = """
import os, socket, sys, time
from pathlib import Path
import torch
from glassllama.__main__ import main
from train import ranks

def begin(rank, work):
    process = os.fork()
    if process == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        work()
        os._exit(0)
    return process

with socket.create_server(("127.0.0.1", 0)) as some:
    port = some.getsockname()[1]
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
torch.set_num_threads(1)
"""
BOTH_END_WELL = """
both = [begin(rank, lambda: ranks.main(*map(Path, sys.argv[1:]))) for rank in (0, 1)]
assert [os.waitpid(process, 0)[1] for process in both] == [0, 0]
"""
ONE_IS_KILLED = """
log, lines = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
first, second = (begin(rank, main) for rank in (0, 1))
while len(log.read_text().splitlines()) < lines:
    assert os.waitpid(0, os.WNOHANG) == (0, 0), "one has ended"
    time.sleep(0.05)
os.kill(second, 9)
killed = time.monotonic()
print(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), time.monotonic() - killed)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ENDED_WITHIN = 60  # seconds after a rank was killed
PATIENCE = 300  # until the test stops waiting
TOKENS = 6 * 16  # of a batch: its loss is their mean


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, romeo_and_juliet: Path) -> Path:
    """Documents of all lengths: rows of two ranks have different numbers of targets."""
    words = romeo_and_juliet.read_text(encoding="utf-8")[:8000]
    cuts = np.cumsum(np.random.default_rng(0).integers(5, 200, 200)).clip(max=len(words))
    pieces = [words[a:b] for a, b in zip([0, *cuts], cuts, strict=False) if words[a:b].strip()]
    path = tmp_path_factory.mktemp("text") / "pieces.jsonl"
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in pieces), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Run everything in one process here; then `ranks.py` with two."""
    home = tmp_path_factory.mktemp("home")
    for way, (kind, *_) in WAYS.items():
        run = new_run(home / f"one-{way}", text, kind, *settings_of(way))
        (home / f"one-{way}.json").write_text(json.dumps(losses(make_steps(run))))
    code_cache.save_checksums()  # compiled code is shared with the ranks
    shutil.copytree(home / "one-muon", home / "single")
    shutil.rmtree(home / "single" / "checkpoints" / f"step-{STEPS:06d}")
    assert run_script(TWO_RANKS + BOTH_END_WELL, home, text) == ""
    return home


@pytest.fixture(scope="module")
def report(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / "report.json").read_text()))


def rounding(way: str, steps: int) -> float:
    """The maximum difference of losses and gradient norms, whose sums have another order.
    (Measured: float32 2e-7, Muon 2e-4, bfloat16 3e-3.)"""
    config = SimpleNamespace(dim=24, ffn_dim=40, n_layers=2)  # of recipes.TINY
    if way == "bfloat16":
        return loss_tolerance(config, steps=steps, tokens=TOKENS, dtype=torch.bfloat16)
    if way == "muon" and steps > 1:
        return muon_tolerance(config, steps=steps)
    return loss_tolerance(config, steps=steps)


def furthest(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_have_the_losses_of_one(way: str, home: Path, report: dict[str, Any]) -> None:
    one = json.loads((home / f"one-{way}.json").read_text())
    assert len(one) == 2 * STEPS + 3  # losses and norms of all steps, and three scores
    assert furthest(report[way][:2], one[:2]) < rounding(way, 1)
    assert furthest(report[way], one) < rounding(way, STEPS)


def test_resuming_is_exact(report: dict[str, Any]) -> None:
    assert report["resumed at"] == HALF
    assert report["same bits"] is True
    assert report["resumed"] == report["muon"][-len(report["resumed"]) :]


def test_one_process_resumes_a_run_of_two(home: Path, text: Path, report: dict[str, Any]) -> None:
    """2 → 1: bit-identical tensors, and the losses that two ranks would have."""
    folder = home / "to_one"
    shutil.copytree(home / "muon", folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}")
    run = new_run(folder, text, "llama", *settings_of("muon"))
    assert run.progress.step == HALF
    gathered = load_file(home / "resumed.safetensors")
    state = ranks.training_state(run)
    assert set(gathered) == set(state)
    assert all(torch.equal(gathered[name], state[name]) for name in state)
    went_on = losses(make_steps(run))
    assert furthest(went_on, report["muon"][-len(went_on) :]) < rounding("muon", STEPS)


def test_two_ranks_resume_a_run_of_one(home: Path, report: dict[str, Any]) -> None:
    gathered = load_file(home / "from_one.safetensors")
    written = load_file(
        home / "one-muon" / "checkpoints" / f"step-{HALF:06d}" / "training.safetensors"
    )
    assert set(gathered) == set(written)
    assert all(torch.equal(gathered[name], written[name]) for name in written)
    one = json.loads((home / "one-muon.json").read_text())
    assert furthest(report["from one"], one[-len(report["from one"]) :]) < rounding("muon", STEPS)


def test_rank_0_writes_a_model_that_load_reads(home: Path) -> None:
    ours, theirs = (load(str(home / name), backend="torch") for name in ("muon", "one-muon"))
    ids = ours.tokenizer.encode("To be, or not")
    apart = difference(ours.logits(ids), theirs.logits(ids))
    assert apart < CONDITION * rounding("muon", STEPS)  # single logits, not a mean of many


def test_a_missing_shard_is_an_error(home: Path, text: Path) -> None:
    folder = home / "torn"
    shutil.copytree(home / "muon", folder)
    shards = sorted((folder / "checkpoints" / f"step-{STEPS:06d}" / "training").iterdir())
    assert len(shards) == 2
    shards[0].unlink()
    with pytest.raises(TrainingError, match="missing"):
        new_run(folder, text, "llama", *settings_of("muon"))
    shards[1].write_bytes(shards[1].read_bytes()[:-7])
    with pytest.raises(TrainingError, match="step-000012/training"):
        new_run(folder, text, "llama", *settings_of("muon"))


class Canary:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_foreign_checkpoints_are_refused_without_unpickling(tmp_path: Path, text: Path) -> None:
    import torch.distributed.checkpoint as dcp

    run = new_run(tmp_path / "run", text, "bigram")
    foreign = run.checkpoints / "step-000004"
    with pytest.warns(UserWarning, match="save in a single process"):
        dcp.save({"weights": torch.ones(3)}, checkpoint_id=foreign, no_dist=True)
    assert list(foreign.glob("*.distcp"))
    (foreign / "state.json").write_text("{}", encoding="utf-8")
    (foreign / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "opened")))
    for _ in range(2):  # with and without its metadata file
        with pytest.raises(TrainingError, match=r"checkpoint of torch\.distributed") as error:
            maybe_resume(run)
        assert "\n" not in str(error.value)
        (foreign / ".metadata").unlink(missing_ok=True)
    assert not (tmp_path / "opened").exists()


def test_batches_that_cannot_be_divided_among_ranks() -> None:
    with pytest.raises(ConfigError, match="6 rows cannot be shared by 4 ranks"):
        DistContext(rank=0, world=4).require_even(6, 1)


def test_every_row_is_evaluated_once() -> None:
    rows = np.arange(5)[:, None]
    batch = Batch(rows, np.full((5, 1), IGNORED), rows)
    sums = {}

    class OneOfThree(DistContext):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            sums[self.rank] = values
            return sum(sums.values())  # type: ignore[return-value]

    for rank in range(3):
        dist = OneOfThree(rank, 3)
        mine = torch.from_numpy(rows_of_rank(batch, dist).ids[:, 0])
        table = of_all_ranks(mine, dist)[:5]
    assert table.tolist() == [0, 1, 2, 3, 4]


# --- the command ----------------------------------------------------------------------------


def arguments(folder: Path, text: Path) -> list[str]:
    endless = ["schedule.steps=100000", "run.save_every=0", "run.eval_every=0"]
    changed = [*TINY["llama"], *SHORT, *endless]
    options = [part for change in changed for part in ("--set", change)]
    places = ["--data", str(text), "--out", str(folder), "--no-preflight"]
    return ["train", "llama-tinyshakespeare-cpu", *options, *places]


def await_lines(log: Path, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "no steps"
        time.sleep(0.1)


def test_stopped_resumed_and_killed(tmp_path: Path, text: Path) -> None:
    """SIGTERM to torchrun saves; two ranks resume; if one is killed, both end."""
    folder = tmp_path / "run"
    words = arguments(folder, text)
    first = subprocess.Popen(
        [*TORCHRUN, "-m", "glassllama", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    await_lines(folder / "log.jsonl", 5, first)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=PATIENCE)
    assert first.returncode != 0
    assert err.count("stopped and saved after step") == 1
    assert err.count("settings of ") == 1
    assert not out
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert len(list((checkpoint / "training").iterdir())) == 2

    given = [TWO_RANKS + ONE_IS_KILLED, str(folder / "log.jsonl"), str(step + 5), *words]
    ran = server(WITH_TORCH).run([*given, "--resume", "auto"])
    assert ran.returncode == 0, ran.stderr
    code, seconds = ran.stdout.split()
    assert code == "1"
    assert float(seconds) < ENDED_WITHIN
    assert f"going on after step {step:,}" in ran.stderr
    assert "error: rank 0 of 2: lost the others: one was killed" in ran.stderr
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [checkpoint.name]
