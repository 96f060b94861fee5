"""Checkpoint folders are complete or absent after kill -9, a full disk, no permission."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from glassllama.base.errors import TrainingError
from glassllama.train.checkpoint import complete_steps, prune, remove_unfinished, write_checkpoint
from train.recipes import make_steps, new_run, write_text

KILLS = 50
# A child saves, prunes and replaces checkpoints continuously; its parent kills it at random
# moments and checks the folder. Contents depend on the step, so a partial file is detected.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from glassllama.train.checkpoint import complete_steps, prune, remove_unfinished, write_checkpoint

home, kills = Path(sys.argv[1]), int(sys.argv[2])
NAMES = ("model.safetensors", "training.safetensors", "state.json")

def content(step, name):
    return (f"{step} {name} " * 30_000).encode()

def write_all(step):
    def write(folder):
        for name in NAMES:
            (folder / name).write_bytes(content(step, name))
    write_checkpoint(home, step, write)

def child(step):
    while True:
        write_all(step)
        prune(home, keep=2, best=1)
        write_all(step)  # the same step again: replaced atomically
        os.write(1, b"%d\\n" % step)
        step += 1

write_all(1)
random.seed(7)
orphans = 0
for kill in range(kills):
    before = max(complete_steps(home))
    pid = os.fork()
    if pid == 0:
        child(before + 1)
    time.sleep(random.uniform(0.0, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    steps = complete_steps(home)
    assert steps and max(steps) >= before and 1 in steps, (before, steps)
    for step, folder in steps.items():
        for name in NAMES:
            assert (folder / name).read_bytes() == content(step, name), (step, name)
    orphans += len(remove_unfinished(home))
    assert not [f for f in home.iterdir() if f.name.startswith(".")]
print("orphans", orphans, "last", max(complete_steps(home)))
"""


def test_kill_9_at_any_moment_leaves_complete_checkpoints_only(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.splitlines()[-1].split()
    assert int(words[1]) > 0, "no kill happened during a save"
    assert int(words[3]) > 1


@contextmanager
def disk_with_room_for(count: int) -> Iterator[None]:
    """No file can grow beyond `count` bytes: writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_clean_error_and_keeps_the_old_checkpoint(
    tmp_path: Path, romeo_and_juliet: Path
) -> None:
    text = write_text(tmp_path, romeo_and_juliet)
    run = new_run(tmp_path / "run", text)
    make_steps(run, stop_after=4)
    with disk_with_room_for(20_000), pytest.raises(TrainingError, match="cannot be saved") as error:
        make_steps(run)
    assert "\n" not in str(error.value)
    assert list(complete_steps(run.checkpoints)) == [4]
    assert not list(run.checkpoints.glob(".*"))
    again = new_run(tmp_path / "run", text)
    assert again.progress.step == 4
    assert make_steps(again)[-1].step == 12


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be saved"):
        write_checkpoint(tmp_path / "file" / "checkpoints", 3, lambda folder: None)


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step, lambda folder: None)
    prune(tmp_path, keep=2, best=10)
    assert list(complete_steps(tmp_path)) == [10, 30, 40]
    prune(tmp_path, keep=1, best=None)
    assert list(complete_steps(tmp_path)) == [40]
    assert complete_steps(tmp_path / "nowhere") == {}
    assert remove_unfinished(tmp_path / "nowhere") == []
