"""`glassllama train`: models that `generate` runs; errors, signals, resuming."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli.programs import COMMAND, PATIENCE, run
from forks import WITH_TORCH, server
from glassllama.cli.train import TrainView, curve
from glassllama.train.metrics import LoggedMetrics, RunInfo, read_log
from train.recipes import PRESET, changes, write_text

LONG = ["schedule.steps=150", "run.eval_every=50", "run.save_every=5"]


@pytest.fixture
def text(tmp_path: Path, romeo_and_juliet: Path) -> Path:
    return write_text(tmp_path, romeo_and_juliet)


def options(folder: Path, text: Path, kind: str = "llama", *more: str) -> list[str]:
    sets = [word for change in changes(kind, text, *more) for word in ("--set", change)]
    return ["train", PRESET[kind], *sets, "--out", str(folder)]


@pytest.mark.parametrize("kind", ["llama", "gpt", "bigram"])
def test_trained_models_generate(kind: str, verb: Any, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    samples = ["run.sample_every=6", "run.sample_tokens=60"]
    ran = verb(*options(folder, text, kind, *samples))
    assert ran.code == 0, ran.err
    assert len(ran.out) > 50  # only the sample
    for words in (
        "settings of ", "\nschedule.steps = 12\n", "checked targets: the inputs, shifted by one",
        "checked this machine:",
        "step 12: validation ", "bits per byte", "tok/s", "a sample:", "complete: try it with",
    ):  # fmt: skip
        assert words in ran.err, words
    for name in ("settings.toml", "log.jsonl", "log.csv", "loss.svg", "loss.png", "config.json"):
        assert (folder / name).is_file(), name
    assert verb("train", str(folder / "settings.toml"), "--out", tmp_path / "again").code == 0
    generated = verb("generate", "-m", folder, "To be", "-n", 5, "--backend", "torch", "--seed", 1)
    assert generated.code == 0, generated.err
    assert len(generated.out) > 1
    done = verb(*options(folder, text, kind), "--resume", "auto")
    assert done.code == 0
    assert "going on after step 12" in done.err


def test_presets_are_listed(verb: Any) -> None:
    names = verb("train").out.split()
    assert "llama-tinyshakespeare-cpu" in names
    assert len(names) == len(set(names)) >= 6


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["llama-tinyshakespear-cpu"], 1, "did you mean llama-tinyshakespeare-cpu"),
        (["nowhere.toml"], 1, "nowhere.toml: No such file"),
        (["bigram-tinyshakespeare", "--set", "schedule.step=5"], 1, "did you mean steps"),
        (["bigram-tinyshakespeare", "--data", "nowhere.txt"], 1, "nowhere.txt: no such file"),
        (["bigram-tinyshakespeare", "--resume", "always"], 2, "always"),
        (["bigram-tinyshakespeare", "--init-from", ""], 2, "--init-from: empty: name a model"),
        (["bigram-tinyshakespeare", "--set", "run.device=abacus"], 1, "run.device: 'abacus'"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], code: int, words: str, verb: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = verb("train", *arguments)
    assert ran.code == code
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_a_second_run_in_the_folder_is_refused(verb: Any, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    assert verb(*options(folder, text, "bigram"), "--no-preflight").code == 0
    again = verb(*options(folder, text, "bigram"))
    assert again.code == 1
    assert "there is a run already" in again.err
    (tmp_path / "file").write_text("")
    assert verb(*options(tmp_path / "file" / "run", text, "bigram")).code == 1


def test_without_torch_the_error_names_the_extra(verb: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("glassllama.cli.train.find_spec", lambda name: None)
    ran = verb("train", "bigram-tinyshakespeare")
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == (
        "error: training needs an extra: pip install 'glassllama[train]'"
    )


def test_without_matplotlib_a_run_succeeds(verb: Any, tmp_path: Path, text: Path) -> None:
    hidden = {name: sys.modules.get(name) for name in ("matplotlib", "matplotlib.figure")}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        ran = verb(*options(tmp_path / "run", text, "bigram"))
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    assert ran.code == 0
    assert "note: loss.svg needs an extra: pip install 'glassllama[train]'" in ran.err
    assert not (tmp_path / "run" / "loss.svg").exists()


# --- interrupted ----------------------------------------------------------------------------


INTERRUPTED = """
import os, signal, sys, time, torch
from pathlib import Path
from glassllama.__main__ import main
from glassllama.train.metrics import read_log
folder, step, *numbers = (sys.argv.pop(1) for _ in range(4))
torch.set_num_threads(1)
process = os.fork()
if process == 0:
    main()
    os._exit(0)
while not any(record.step >= int(step) for record in read_log(Path(folder))):
    assert os.waitpid(process, os.WNOHANG) == (0, 0), "it has ended"
    time.sleep(0.01)
for number in numbers:
    os.kill(process, int(number))
    time.sleep(0.1)
print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def interrupted(words: list[str], folder: Path, step: int, *numbers: int) -> tuple[int, str]:
    """Run the command on one thread and send two signals (0: none) after a step -> exit code and
    stderr.

    It prints nothing on stdout.
    """
    ran = server(WITH_TORCH).run([INTERRUPTED, str(folder), str(step), *map(str, numbers), *words])
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    return int(ran.stdout), ran.stderr


def test_a_killed_and_interrupted_run_equals_an_uninterrupted_one(
    verb: Any, tmp_path: Path, text: Path, one_thread: None
) -> None:
    """kill -9, then SIGTERM: the final state is bit-identical to a run without them."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    more = [*LONG, "model.dropout=0.1", "run.precision=bfloat16", "optimizer.ema=0.9"]
    assert verb(*options(straight, text, "llama", *more), "--no-preflight").code == 0

    arguments = [*options(broken, text, "llama", *more), "--no-preflight", "--resume", "auto"]
    for step, number, ended in ((12, signal.SIGKILL, -9), (40, signal.SIGTERM, 143)):
        code, err = interrupted(arguments, broken, step, number, 0)
        assert code == ended, err
        assert ("stopped and saved after step" in err) == (number == signal.SIGTERM)
    assert verb(*arguments).code == 0

    last = Path("checkpoints") / "step-000150" / "training.safetensors"
    left, right = load_file(straight / last), load_file(broken / last)
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    losses = [
        [(r.loss, r.grad_norm, r.val_loss) for r in read_log(folder)]
        for folder in (straight, broken)
    ]
    assert losses[0] == losses[1]


def test_the_second_ctrl_c_ends_the_run_immediately(tmp_path: Path, text: Path) -> None:
    """With steps of seconds the first Ctrl-C waits for the step, the second does not."""
    folder = tmp_path / "run"
    slow = ["data.context=256", "data.batch=16", "model.dim=240", "model.n_layers=4",
            "model.ffn_dim=800", "model.head_dim=60"]  # fmt: skip
    words = [*options(folder, text, "llama", *slow), "--no-preflight"]
    code, err = interrupted(words, folder, 1, signal.SIGINT, signal.SIGINT)
    assert code == 130, err


def test_a_closed_pipe_prints_no_traceback(tmp_path: Path, text: Path) -> None:
    words = " ".join(options(tmp_path / "run", text, "bigram"))
    shell = f"{' '.join(COMMAND)} {words} --no-preflight | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode in (0, 141), ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_does_not_import_torch() -> None:
    ran = run("train", "--help")
    assert ran.returncode == 0
    assert "--resume" in ran.stdout
    code = "import sys; import glassllama.cli.app; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "False"


# --- the display ----------------------------------------------------------------------------


def record(step: int, loss: float, **more: float) -> LoggedMetrics:
    return LoggedMetrics(step=step, loss=loss, lr=0.003, grad_norm=1.0, tokens=step * 100,
                         tok_s=5000.0, seconds=1.0, **more)  # fmt: skip


def info(steps: int, flops: float, peak: float) -> RunInfo:
    return RunInfo(folder=Path("run"), first_step=0, total_steps=steps, flops_per_token=flops,
                   peak_flops=peak)  # fmt: skip


def test_plain_lines_without_a_terminal(capsys: Any) -> None:
    with TrainView("settings of a run") as view:
        view.on_start(info(steps=4, flops=4e6, peak=1e11))
        for step, loss in enumerate((3.6, 3.4, 3.3, 3.2), start=1):
            view.on_step(record(step, loss))
        view.on_step(record(4, 2.0, val_loss=2.5, val_error=0.01, bits_per_byte=3.6))
        view.on_sample(4, "Thus spake")
    err = capsys.readouterr().err
    assert "step 1/4  loss 3.600  lr 3.0e-03  5,000 tok/s  MFU 20%" in err
    assert err.startswith("settings of a run\n")
    assert "step 4: validation 2.5000 ± 0.0100, 3.600 bits per byte" in err
    assert "Thus spake" in err


def test_speed_is_the_mean_of_all_steps_since_the_last_line(capsys: Any) -> None:
    """40 steps of 100 tokens: every second step takes 1 ms, the others 99 ms."""
    seconds = 0.0
    with TrainView() as view:
        view.on_start(info(steps=40, flops=1e6, peak=1e10))
        for step in range(1, 41):
            took = 0.001 if step % 2 else 0.099
            seconds += took
            made = replace(record(step, 3.0), seconds=seconds, tok_s=100 / took)
            view.on_step(made)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert all("2,000 tok/s  MFU 20%" in line for line in lines[1:])


def test_the_plotted_curve_follows_the_loss() -> None:
    assert curve([], 5) == ""
    assert curve([4.0], 5) == "▁"
    assert curve([4.0, 3.0, 2.0, 1.0], 4) == "█▆▃▁"
    assert len(curve([float(n) for n in range(1000)], 60)) == 60


def test_a_run_that_cannot_start_leaves_no_folder(verb: Any, tmp_path: Path) -> None:
    arguments = (PRESET["bigram"], "--data", tmp_path / "MISSING")
    ran = verb("train", *arguments, "--out", tmp_path / "runs" / "one")
    assert ran.code == 1
    assert "MISSING: no such file or folder" in ran.err
    assert not (tmp_path / "runs").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert verb("train", *arguments, "--out", mine / "one").code == 1
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
