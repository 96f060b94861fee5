"""A resumed run is bit-identical to an uninterrupted one: weights, optimizer, losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glassllama.base.errors import ConfigError, TrainingError
from glassllama.llm import load
from glassllama.train.api import lock_run_dir, require_free
from glassllama.train.checkpoint import complete_steps
from glassllama.train.metrics import MetricsLog, read_log
from glassllama.train.settings import load_settings
from tolerances import assert_logits, logits_tolerance, loss_tolerance, muon_tolerance
from train.recipes import PRESET, Listener, changes, make_steps, new_run, write_text

STEPS = 12
WAYS = {
    "llama": ("llama", "optimizer.ema=0.9", "model.dropout=0.2", "run.precision=bfloat16"),
    "llama in float32, in parts": (
        "llama",
        "run.precision=float32",
        "run.accumulate=3",
        "run.loss_chunk=10",
    ),
    "gpt": ("gpt", "model.dropout=0.1", "optimizer.weight_decay=0.1"),
    "bigram": ("bigram",),
}


@pytest.fixture
def text(tmp_path: Path, romeo_and_juliet: Path) -> Path:
    return write_text(tmp_path, romeo_and_juliet)


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "training.safetensors")


def assert_same_run(one: Path, other: Path, step: int) -> None:
    left, right = tensors(one, step), tensors(other, step)
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    timeless = [
        [dataclasses.replace(r, seconds=0.0, tok_s=0.0) for r in read_log(folder)]
        for folder in (one, other)
    ]
    assert timeless[0] == timeless[1]
    assert [record.step for record in timeless[0]] == list(range(1, step + 1))


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_an_uninterrupted_one(way: str, tmp_path: Path, text: Path) -> None:
    kind, *more = WAYS[way]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    make_steps(new_run(straight, text, kind, *more))
    make_steps(new_run(resumed, text, kind, *more), stop_after=7)
    second = new_run(resumed, text, kind, *more)
    assert second.progress.step == 7
    make_steps(second)
    assert_same_run(straight, resumed, STEPS)
    begin = load_file(straight / "checkpoints" / f"step-{STEPS:06d}" / "training.safetensors")
    moved = new_run(tmp_path / "fresh", text, kind, *more).optimizers.named
    assert not all(torch.equal(begin[f"weights.{n}"], p) for n, p in moved.items())


def test_steps_after_the_last_checkpoint_are_repeated(tmp_path: Path, text: Path) -> None:
    """After kill -9: the log is ahead of the checkpoint, its last line is incomplete."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    make_steps(new_run(straight, text))
    make_steps(new_run(killed, text), stop_after=6)
    log = killed / "log.jsonl"
    lines = (straight / "log.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:8]) + lines[8][:20])
    make_steps(new_run(killed, text))
    assert_same_run(straight, killed, STEPS)
    assert (killed / "log.csv").read_text().count("\n") == STEPS + 1


def test_microbatches_give_the_gradients_of_the_batch(tmp_path: Path, text: Path) -> None:
    one = new_run(tmp_path / "whole", text, "llama", "run.precision=float32")
    other = new_run(tmp_path / "parts", text, "llama", "run.precision=float32", "run.accumulate=3")
    whole, parts, config = make_steps(one), make_steps(other), one.model.config
    assert parts[0].loss == pytest.approx(whole[0].loss, rel=loss_tolerance(config, steps=1))
    assert parts[0].grad_norm == pytest.approx(
        whole[0].grad_norm, rel=logits_tolerance(config, layers=2 * config.n_layers)
    )
    later = muon_tolerance(config, steps=len(whole))
    assert [r.loss for r in parts] == pytest.approx([r.loss for r in whole], rel=later)


def test_another_seed_gives_other_results(tmp_path: Path, text: Path) -> None:
    one = make_steps(new_run(tmp_path / "one", text))
    two = make_steps(new_run(tmp_path / "two", text, "llama", "run.seed=2"))
    assert [r.loss for r in one] != [r.loss for r in two]


def test_long_names_are_shortened_in_errors(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    make_steps(new_run(folder, text), stop_after=4)
    (path,) = folder.rglob("state.json")
    state = json.loads(path.read_text())
    state["identity"]["x" * 5000] = 1
    path.write_text(json.dumps(state))
    with pytest.raises(TrainingError, match="another run: ") as refused:
        new_run(folder, text)
    assert len(str(refused.value)) < 1000


def test_another_run_is_not_resumed(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    make_steps(new_run(folder, text), stop_after=4)
    with pytest.raises(TrainingError, match=r"another run: optimizer\.lr was .*, is 0\.5"):
        new_run(folder, text, "llama", "optimizer.lr=0.5")
    text.write_text(text.read_text() + "More.")
    with pytest.raises(TrainingError, match="text was"):
        new_run(folder, text)


def test_reporting_settings_may_change(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    make_steps(new_run(folder, text), stop_after=4)
    run = new_run(folder, text, "llama", "run.eval_every=3", "run.sample_every=5", "run.keep=5")
    assert make_steps(run)[-1].step == STEPS


def test_a_folder_is_locked_for_one_run_and_one_process(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    make_steps(new_run(folder, text), stop_after=4)
    settings = load_settings(PRESET["llama"], changes("llama", text))
    with pytest.raises(TrainingError, match="there is a run already; resume it with --resume auto"):
        require_free(folder, settings, resuming=False)
    require_free(folder, settings, resuming=True)
    with (
        lock_run_dir(folder),
        pytest.raises(TrainingError, match="another process is training there"),
        lock_run_dir(folder),
    ):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="cannot be written"),
        lock_run_dir(tmp_path / "file" / "run"),
    ):
        pass


def test_errors_name_a_damaged_checkpoint(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    make_steps(new_run(folder, text), stop_after=4)
    checkpoint = folder / "checkpoints" / "step-000004"
    whole = (checkpoint / "training.safetensors").read_bytes()
    (checkpoint / "training.safetensors").write_bytes(whole[:500])
    with pytest.raises(TrainingError, match=r"training\.safetensors"):
        new_run(folder, text)
    (checkpoint / "training.safetensors").write_bytes(whole)
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"state\.json: format is None, expected"):
        new_run(folder, text)
    (checkpoint / "state.json").write_text('{"format": "glassllama training 1", "identity": {}}')
    with pytest.raises(TrainingError, match=r"state\.json: progress is missing"):
        new_run(folder, text)
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state\.json: not valid JSON"):
        new_run(folder, text)


# --- what a run leaves behind ---------------------------------------------------------------


def test_the_last_and_the_best_checkpoints_are_kept_and_the_best_is_the_model(
    tmp_path: Path, text: Path
) -> None:
    run = new_run(tmp_path / "run", text, "llama", "run.eval_every=1", "run.save_every=1")
    losses = {r.step: r.val_loss for r in make_steps(run)}
    best = min(losses, key=lambda step: losses[step] or 9.0)
    assert run.progress.best_step == best
    assert sorted({best, STEPS - 1, STEPS}) == list(complete_steps(run.checkpoints))
    model = run.checkpoints / f"step-{best:06d}" / "model.safetensors"
    assert (run.folder / "model.safetensors").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("kind", ["llama", "gpt", "bigram"])
def test_the_runs_folder_is_a_model_that_load_reads(kind: str, tmp_path: Path, text: Path) -> None:
    more = ("run.precision=float32", "optimizer.ema=0.5", "schedule.steps=4")
    run = new_run(tmp_path / "run", text, kind, *more)
    make_steps(run)
    llm = load(str(run.folder), backend="torch")
    ids = llm.tokenizer.encode("To be, or not")
    with torch.inference_mode(), run.ema.in_place():  # type: ignore[union-attr]
        expected = run.model(torch.tensor([ids]))[0].numpy()
    if kind == "bigram":  # a table that is read: no sums
        assert (llm.logits(ids) == expected).all()
    else:
        assert_logits(llm.logits(ids), expected, run.model.config)


def test_samples_and_tensorboard(tmp_path: Path, text: Path) -> None:
    run = new_run(tmp_path / "run", text, "gpt", "run.sample_every=6", "run.sample_tokens=40")
    listener = Listener()
    from glassllama.train.loop import StopRequest, train_steps

    journal = MetricsLog(run.folder, tensorboard=True)
    train_steps(run, journal, listener, StopRequest())
    journal.close()
    assert len(listener.samples) == 2
    assert all(sample.startswith("\n") and len(sample) > 40 for sample in listener.samples)
    assert any(run.folder.glob("events.out.tfevents*"))
