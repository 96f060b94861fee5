"""Preflight checks, each with its bug; errors while training; reference runs."""

from __future__ import annotations

import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forks import run_script
from glassllama.base.errors import (
    DownloadError,
    GlassError,
    MemoryShortError,
    PreflightError,
    TrainingError,
)
from glassllama.native.training import blocks
from glassllama.nn import attention
from glassllama.train import loop
from glassllama.train import preflight as preflight_module
from glassllama.train.api import prepare
from glassllama.train.checkpoint import Run, complete_steps
from glassllama.train.corpus import find_text, open_data
from glassllama.train.metrics import (
    REFERENCE_RUNS,
    LoggedMetrics,
    LossMonitor,
    MetricsLog,
    ReferenceRuns,
    plot_loss,
    read_log,
    reference_for,
)
from glassllama.train.optimizers import AdamW
from glassllama.train.preflight import check_targets, preflight
from glassllama.train.settings import DataSettings, load_settings
from glassllama.train.tokens import Batch, Batches, bytes_of_batch
from train.recipes import make_steps, new_run, write_text

STORED = sorted(
    entry.name.removesuffix(".json")
    for entry in REFERENCE_RUNS.iterdir()
    if entry.name.endswith(".json")
)
KINDS = ("llama", "gpt", "bigram")


@pytest.fixture
def text(tmp_path: Path, romeo_and_juliet: Path) -> Path:
    return write_text(tmp_path, romeo_and_juliet)


@pytest.fixture
def run(tmp_path: Path, text: Path) -> Run:
    return new_run(tmp_path / "run", text)


def fails(run: Run, *words: str) -> None:
    with pytest.raises(PreflightError) as error:
        list(preflight(run))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_correct_run_passes_and_is_not_changed(
    kind: str, precision: str, tmp_path: Path, text: Path
) -> None:
    run = new_run(tmp_path / "run", text, kind, f"run.precision={precision}", "data.context=32")
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    lines = list(preflight(run))
    topics = [line.partition(":")[0] for line in lines]
    assert topics == ["data", "targets", "future", "beginning", "learning", "this machine"]
    after = dict(run.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert run.progress.step == 0
    assert not any(state["step"] for state in run.optimizers.adamw.state.values())


def test_a_text_of_repeated_characters_is_not_a_leak(tmp_path: Path, text: Path) -> None:
    """Tied embeddings predict the same token again, which is right for tables and indentation."""
    repeated = tmp_path / "repeated.txt"
    repeated.write_text("".join(8 * character for character in text.read_text()[:3000]))
    run = new_run(tmp_path / "run", repeated, "llama", "model.dim=120", "model.tie_embeddings=true")
    (line,) = (line for line in preflight(run) if line.startswith("beginning: loss "))
    loss, guessing = map(float, re.findall(r"\d+\.\d+", line))
    assert loss < guessing - 0.5


class ShiftedBatches(Batches):
    """Batches whose targets are shifted by `shift` instead of one."""

    shift = 2

    def at(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        wide = Batches(self.tokens, self.context + self.shift, self.batch, self.seed)
        ids = wide.at(step).ids
        stop = ids.shape[1] - self.shift
        return Batch(ids[:, :stop], ids[:, self.shift : self.shift + stop], None)


def test_targets_shifted_by_two(run: Run) -> None:
    """A bug of a published tutorial: its model learns to skip every other character."""
    wrong = ShiftedBatches(run.batches.tokens, 16, 6, 1)
    fails(replace(run, batches=wrong), "targets", "shifted by 2, not by 1", "skip 1 of 2 tokens")


def test_targets_not_shifted_or_of_other_rows(run: Run) -> None:
    batch = run.batches.at(0)
    with pytest.raises(PreflightError, match=r"shifted by 0, not by 1: .* copy its input"):
        check_targets(batch._replace(targets=batch.ids))
    with pytest.raises(PreflightError, match="not the inputs of any later position"):
        check_targets(batch._replace(targets=batch.targets[::-1]))


@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_no_causal_mask(kind: str, tmp_path: Path, text: Path, monkeypatch: Any) -> None:
    def seeing_all(q: Any, k: Any, v: Any, mask: Any, scale: Any = None) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    run = new_run(tmp_path / "run", text, kind)
    for module in (attention, blocks):
        monkeypatch.setattr(module, "fused_attention", seeing_all)
    fails(run, "future", "its causal mask is missing")


def test_no_mask_between_documents(
    tmp_path: Path, romeo_and_juliet: Path, monkeypatch: Any
) -> None:
    lines = romeo_and_juliet.read_text(encoding="utf-8").split("\n\n")[:300]
    import json

    file = tmp_path / "plays.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    run = new_run(tmp_path / "run", file, "llama")
    assert run.batches.at(0).segments is not None
    list(preflight(run))
    monkeypatch.setattr(attention, "same_segment", lambda segments: torch.tensor(True))
    fails(run, "documents", "mask of packed documents is missing")


def test_initial_weights_too_large(run: Run) -> None:
    with torch.no_grad():
        run.model.tok_embeddings.weight.mul_(50)  # type: ignore[attr-defined]
    fails(run, "beginning", "the initial weights are too large")


def test_an_initial_loss_that_is_too_low(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(preflight_module, "mean_loss", lambda *_: torch.tensor(0.5))
    fails(run, "beginning", "knows the answers already")


@pytest.mark.parametrize("name", ["layers.1.attention.wk.weight", "layers.0.ffn_norm.weight"])
def test_a_frozen_parameter(run: Run, name: str) -> None:
    run.model.get_parameter(name).requires_grad_(False)
    fails(run, "learning", name, "did not move: frozen")


def test_weights_that_do_not_change(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(AdamW, "step", lambda self: None)
    fails(run, "learning", "did not move")


def test_a_loss_that_does_not_fall(run: Run, monkeypatch: Any) -> None:
    """Gradient ascent, as with the wrong sign of the loss."""
    original = AdamW.step

    def uphill(self: Any) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.neg_()
        return original(self)

    monkeypatch.setattr(AdamW, "step", uphill)
    fails(run, "learning", "gradients do not reach the weights as they should")


def test_a_text_of_one_repeated_character(tmp_path: Path) -> None:
    path = tmp_path / "aaa.txt"
    path.write_text("a" * 3000)
    fails(new_run(tmp_path / "run", path), "data", "one token over and over")


def test_validation_text_in_the_training_text(tmp_path: Path, romeo_and_juliet: Path) -> None:
    path = tmp_path / "twice.txt"
    path.write_text(romeo_and_juliet.read_text(encoding="utf-8")[:700] * 10)
    fails(new_run(tmp_path / "run", path), "is in the training text too")


def test_a_run_that_does_not_fit_into_memory_is_refused_first(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr("glassllama.base.machine.available_memory", lambda: 100_000)
    monkeypatch.setattr(preflight_module, "train_step", lambda run: pytest.fail("a step was run"))
    with pytest.raises(MemoryShortError, match=r"raise run\.accumulate, or lower data\.batch"):
        list(preflight(run))


def test_the_memory_estimate_counts_stored_activations(tmp_path: Path, text: Path) -> None:
    """Twice as many rows store twice as much, except for weights; parts store a part."""
    sizes = {}
    for rows, parts in ((6, 1), (12, 1), (12, 2)):
        more = (f"data.batch={rows}", f"run.accumulate={parts}", "run.loss_chunk=1")
        run = new_run(tmp_path / f"{rows}-{parts}", text, "llama", *more)
        sizes[rows, parts] = preflight_module.require_step_fits(run)
    row = (sizes[12, 1] - sizes[6, 1]) / 6
    corpus = run.data.train
    assert sizes[12, 2] - sizes[6, 1] == bytes_of_batch(corpus, 6, 16)  # of the batch itself
    assert 16 * 24 * 4 * 10 < row < 16 * 24 * 4 * 200  # some tens of (T, C) tensors per layer


PEAK = """
import ctypes, re, sys
from pathlib import Path
from glassllama.train import loop, preflight
from train.recipes import new_run

def memory(kind):  # getrusage's peak includes that of the parent process
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", status)[1])

folder, text, kind, *sizes = sys.argv[1:]
large = ("data.context=64", "run.precision=float32", *sizes)
run = new_run(Path(folder) / "run", Path(text), kind, *large)
counted = preflight.require_step_fits(run)
in_pieces = "run.loss_chunk=10"  # like the large one: PyTorch imports more modules for it
loop.train_step(new_run(Path(folder) / "small", Path(text), kind, in_pieces))
ctypes.CDLL(None).mallopt(-3, 1_000_000)  # M_MMAP_THRESHOLD: freed memory is returned to the system
Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which may be of compiling
before = memory("VmRSS")
loop.train_step(run)
print(counted, memory("VmHWM") - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs its mallopt")
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("bigram", ["data.batch=6000"]),
        ("llama", ["data.batch=400", "model.n_layers=8"]),
        ("gpt", ["data.batch=500", "model.n_layers=8"]),
    ],
)
def test_the_memory_estimate_equals_the_peak_of_a_step(
    kind: str, sizes: list[str], tmp_path: Path, text: Path
) -> None:
    """Measured in a new process: the increase of the peak during a step.

    The estimate is not below it and at most a seventh (for the heap), an eighth (for a layer's
    gradients), which may not exist at the peak, and a tenth (for rounding up) above.
    """
    counted, taken = map(int, run_script(PEAK, tmp_path, text, kind, *sizes).split())
    assert taken > 1e8
    assert 1 < counted / taken < (1 + 1 / 7) * (1 + 1 / 8) * 1.1


# --- errors while training ------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_non_finite_numbers_stop_a_run_before_the_weights_change(
    where: str, kind: str, tmp_path: Path, text: Path, monkeypatch: Any
) -> None:
    run = new_run(tmp_path / "run", text, kind)
    make_steps(run, stop_after=5)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    original = loop.loss_and_gradients

    def broken(run: Run, batch: Batch) -> float:
        loss = original(run, batch)
        if run.progress.step < 6:
            return loss
        if where == "loss":
            return float("inf")
        next(iter(run.optimizers.named.values())).grad.view(-1)[3] = float("nan")  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(loop, "loss_and_gradients", broken)
    with pytest.raises(TrainingError) as error:
        make_steps(run)
    words = str(error.value)
    assert words.startswith("step 7: loss is ")
    assert "gradient norm" in words
    assert "at learning rate 0.0" in words
    assert list(complete_steps(run.checkpoints)) == [4, 5]
    after = dict(run.model.named_parameters())
    assert all(torch.isfinite(p).all() for p in after.values())
    assert [r.step for r in read_log(run.folder)] == list(range(1, 7))
    assert not all(torch.equal(after[n], before[n]) for n in before)  # step 6 was completed


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "no text"),
        ("short.txt", b"To be or not to be, that is the question." * 2, "too few for a context"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2"),
        ("latin.txt", b"caf\xe9 " * 1000, "byte 3 is not UTF-8"),
    ],
)
def test_errors_name_invalid_text(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(GlassError) as error:
        new_run(tmp_path / "run", file)
    assert words in str(error.value)
    assert name in str(error.value)


def test_without_a_network_the_error_suggests_what_to_do(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path / "empty"))
    settings = DataSettings(corpus="tinyshakespeare", context=8, batch=2)
    with pytest.raises(DownloadError) as error:
        open_data(settings, tmp_path, offline=True)
    assert "--data FILE" in str(error.value)
    assert "llama-shakespeare-bpe" in str(error.value)
    assert find_text("some/file.txt", offline=True) == Path("some/file.txt")


# --- reference runs -------------------------------------------------------------------------


def test_runs_outside_the_reference_get_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from train_reference_runs import make_reference

    chance = np.random.default_rng(4)
    falling = 4.0 * np.exp(-np.arange(100) / 40)

    def losses() -> list[float]:
        return list(falling + chance.normal(0, 0.02, 100))

    reference = make_reference([25, 50, 75, 100], [losses() for _ in range(3)])
    assert reference.seeds == 3

    def warnings_of(values: Any) -> list[str]:
        monitor = LossMonitor(reference)
        return [warnings for n, x in enumerate(values, 1) if (warnings := monitor.check_loss(n, x))]

    assert warnings_of(losses()) == []
    (slow,) = warnings_of(np.maximum(losses(), 3.5))
    assert slow.startswith("step 25: loss 3.5")
    assert "slow from the beginning" in slow
    (late,) = warnings_of([*falling[:60], *falling[60:] + 1])
    assert late.startswith("step 75")
    assert "fell behind" in late
    (good,) = warnings_of(falling * 0.8)
    assert "sees what it is to predict" in good
    resumed = LossMonitor(reference, first_step=40)
    assert resumed.check_loss(50, 9.0) is None  # half a block is not compared


def test_a_reference_is_for_the_presets_own_settings_only() -> None:
    assert reference_for(load_settings("llama-tinyshakespeare-cpu", ["optimizer.lr=0.5"])) is None
    assert (
        reference_for(load_settings("llama-tinyshakespeare-cpu", ["data.corpus=mine.txt"])) is None
    )


@pytest.mark.parametrize("name", STORED)
def test_stored_references_belong_to_the_presets(name: str) -> None:
    settings = load_settings(name)
    reference = reference_for(settings)
    assert reference is not None, "the preset was changed: run benchmarks/train_reference_runs.py"
    assert reference.seeds >= 3
    assert reference.steps[-1] == settings.schedule.steps
    assert len(reference.steps) == len(reference.low) == len(reference.high)
    assert all(low < high for low, high in zip(reference.low, reference.high, strict=True))
    assert reference_for(replace(settings, run=replace(settings.run, seed=99))) == reference


def test_a_run_is_inside_its_reference_and_a_slower_one_is_not(
    tmp_path: Path, tinyshakespeare: Path
) -> None:
    """The bigram preset unchanged, with a seed that is not in its reference."""
    warnings_of = {}
    for rate in (0.1, 0.02):
        settings = load_settings("bigram-tinyshakespeare", ["run.seed=7", "run.eval_every=0"])
        optimizer = replace(settings.optimizer, lr=rate)
        folder = tmp_path / str(rate)
        folder.mkdir()
        data = open_data(settings.data, folder)
        records = make_steps(prepare(replace(settings, optimizer=optimizer), data, folder))
        monitor = LossMonitor(reference_for(settings))  # type: ignore[arg-type]
        warnings = [monitor.check_loss(record.step, record.loss) for record in records]
        warnings_of[rate] = [line for line in warnings if line]
    assert warnings_of[0.1] == []
    assert len(warnings_of[0.02]) == 1
    assert "slow from the beginning" in warnings_of[0.02][0]


# --- plots ----------------------------------------------------------------------------------


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    journal = MetricsLog(tmp_path)
    for step in range(1, 30):
        val = {"val_loss": 3.0, "val_error": 0.1, "bits_per_byte": 4.3} if step % 10 == 0 else {}
        journal.write(
            LoggedMetrics(step=step, loss=4 - step / 30, lr=0.1, grad_norm=1.0, tokens=step * 8,
                   tok_s=100.0, seconds=step * 0.1, **val)
        )  # fmt: skip
    journal.close()
    records = read_log(tmp_path)
    assert len(records) == 29
    assert records[9].val_loss == 3.0
    paths = plot_loss(
        records, tmp_path, "a run", ReferenceRuns(seeds=3, steps=(15,), low=(3,), high=(4,))
    )
    assert [path.name for path in paths] == ["loss.svg", "loss.png"]
    assert b"<svg" in paths[0].read_bytes()[:1000]
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,lr,grad_norm,tokens,tok_s,seconds,val_loss")
    assert len(rows) == 30
