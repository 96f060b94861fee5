"""Runs that are extended, and runs that start with the weights of another model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError, TokenizerError, TrainingError, WeightsError
from glassllama.llm import load
from glassllama.nn.rope import rope_table, rotate_half, rotate_interleaved
from glassllama.train import train
from glassllama.train.api import prepare
from glassllama.train.corpus import vocabulary_folder
from glassllama.train.loop import sample_text
from glassllama.train.metrics import LoggedMetrics, NullListener, RunInfo, read_log
from glassllama.train.model import in_layout_of
from glassllama.train.preflight import preflight
from glassllama.train.settings import changed_lines, load_settings
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import load_model
from train.recipes import PRESET, changes, make_steps, new_run, write_text
from train.test_resume import assert_same_run

EMA = "optimizer.ema=0.9"
HUGE = torch.tensor([[1000.0], [-1000.0]])


@pytest.fixture
def text(tmp_path: Path, romeo_and_juliet: Path) -> Path:
    return write_text(tmp_path, romeo_and_juliet)


def losses(records: list[LoggedMetrics]) -> list[float]:
    return [record.loss for record in records]


# --- longer runs ----------------------------------------------------------------------------


def test_a_run_extended_before_its_learning_rate_falls_equals_the_longer_run(
    tmp_path: Path, text: Path
) -> None:
    """The rate falls from the 8th of 12 steps, or from the 15th of 24: step 6 is before both."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    make_steps(new_run(straight, text, "llama", EMA, "schedule.steps=24"))
    make_steps(new_run(resumed, text, "llama", EMA), stop_after=6)
    run = new_run(resumed, text, "llama", EMA, "schedule.steps=24")
    assert run.extended == "schedule.steps was 12, is 24"
    make_steps(run)
    assert_same_run(straight, resumed, 24)


def test_a_complete_run_continues_with_the_longer_schedule(tmp_path: Path, text: Path) -> None:
    longer, folder = tmp_path / "longer", tmp_path / "run"
    whole = losses(make_steps(new_run(longer, text, "bigram", "schedule.steps=24")))
    first = losses(make_steps(new_run(folder, text, "bigram")))
    assert first[:3] == whole[:3]  # the same schedule: the warmup, and the first step at the peak
    assert first != whole[:12]
    duplicate = tmp_path / "duplicate"
    shutil.copytree(folder, duplicate)
    make_steps(new_run(folder, text, "bigram", "schedule.steps=24"))
    make_steps(new_run(duplicate, text, "bigram", "schedule.steps=24"), stop_after=17)
    again = new_run(duplicate, text, "bigram", "schedule.steps=24")
    assert (again.progress.step, again.extended) == (17, "")
    make_steps(again)
    assert_same_run(folder, duplicate, 24)


def test_a_run_is_neither_shortened_nor_otherwise_changed(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    make_steps(new_run(folder, text, "bigram"), stop_after=4)
    with pytest.raises(TrainingError, match=r"schedule\.steps was 12, is 6; a run can be extended"):
        new_run(folder, text, "bigram", "schedule.steps=6")
    with pytest.raises(TrainingError, match=r"another run: optimizer\.lr was .*, is 0\.5; begin"):
        new_run(folder, text, "bigram", "schedule.steps=24", "optimizer.lr=0.5")
    with pytest.raises(TrainingError, match=r"schedule\.min_lr_ratio was 0\.0, is 0\.5; begin"):
        new_run(folder, text, "bigram", "schedule.min_lr_ratio=0.5")
    run = new_run(folder, text, "bigram", "schedule.steps=24", "schedule.min_lr_ratio=0.5")
    assert run.extended == "schedule.min_lr_ratio was 0.0, is 0.5; schedule.steps was 12, is 24"


def test_fewer_steps_than_the_presets_warmup_shorten_it() -> None:
    name = "llama-tinyshakespeare-cpu"
    change = ["schedule.steps=10"]
    settings = load_settings(name, change)
    assert (settings.schedule.steps, settings.schedule.warmup) == (10, 1)
    assert changed_lines(name, settings, change) == ["schedule.steps = 10", "schedule.warmup = 1"]
    plain = load_settings(name, ["schedule.steps=400"])
    assert plain.schedule.warmup == load_settings(name).schedule.warmup
    assert changed_lines(name, plain, ["schedule.steps=400"]) == ["schedule.steps = 400"]
    with pytest.raises(ConfigError, match=r"12 steps of warmup do not fit .* schedule\.warmup=1$"):
        load_settings(name, ["schedule.steps=10", "schedule.warmup=12"])


# --- from other weights ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt", "bigram"])
def test_a_run_starts_with_the_weights_and_tokenizer_of_a_model(
    kind: str, tmp_path: Path, text: Path
) -> None:
    first = new_run(tmp_path / "first", text, kind)
    make_steps(first)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[1000:3000].lower())
    run = new_run(tmp_path / "second", other, kind, f"model.init_from={first.folder}")
    saved = load_model(open_checkpoint(first.folder)).named_parameters()  # the best of `first`
    assert all(torch.equal(run.optimizers.named[name], weight) for name, weight in saved)
    assert run.settings.data.tokenizer == str(first.folder)
    assert run.data.tokenizer.vocab_size == first.data.tokenizer.vocab_size
    report = list(preflight(run))
    assert any("begins with the weights of another model" in line for line in report)
    make_steps(run)
    assert (run.folder / "tokenizer.json").is_file()


def test_a_run_from_other_weights_is_resumed_exactly(tmp_path: Path, text: Path) -> None:
    first = new_run(tmp_path / "first", text, "llama")
    make_steps(first, stop_after=4)
    begun = f"model.init_from={first.folder}"
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    make_steps(new_run(straight, text, "llama", EMA, begun))
    make_steps(new_run(resumed, text, "llama", EMA, begun), stop_after=7)
    (first.folder / "model.safetensors").unlink()  # only needed for the first step
    make_steps(new_run(resumed, text, "llama", EMA, begun))
    assert_same_run(straight, resumed, 12)
    with pytest.raises(TrainingError, match=r"model\.init_from was '.*', is not set"):
        new_run(resumed, text, "llama", EMA, f"data.tokenizer={first.folder}")


def test_errors_name_every_difference_from_the_other_model(tmp_path: Path, text: Path) -> None:
    first = new_run(tmp_path / "first", text, "llama")
    make_steps(first, stop_after=1)
    begun = f"model.init_from={first.folder}"
    with pytest.raises(WeightsError) as error:
        new_run(tmp_path / "a", text, "llama", begun, "model.ffn_dim=48", "model.n_kv_heads=4")
    assert "n_kv_heads is 2 there and 4 here; ffn_dim is 40 there and 48 here" in str(error.value)
    with pytest.raises(WeightsError, match="it is a Llama, this run trains a GPT"):
        new_run(tmp_path / "b", text, "gpt", begun)
    with pytest.raises(WeightsError, match="vocab_size is"):
        new_run(tmp_path / "c", text, "llama", begun, "data.tokenizer=bpe:300")
    small = tmp_path / "small.txt"
    small.write_text(text.read_text().replace("e", "\N{BULLET}"))
    with pytest.raises(WeightsError, match=r"token \d+ is b'.*' there and b'.*' here"):
        new_run(tmp_path / "d", small, "llama", begun, "data.tokenizer=characters")
    gpt = new_run(tmp_path / "gpt", text, "gpt")
    make_steps(gpt, stop_after=1)
    with pytest.raises(WeightsError, match="pos_embeddings"):
        new_run(tmp_path / "e", text, "gpt", f"model.init_from={gpt.folder}", "data.context=20")


def test_a_model_with_more_rows_than_tokens(tmp_path: Path, text: Path) -> None:
    """As in files with a padded vocabulary; rows without a token are never sampled."""
    with pytest.raises(ConfigError, match="vocab_size: 20, but the tokenizer has "):
        new_run(tmp_path / "few", text, "gpt", "model.vocab_size=20")
    padded = "model.vocab_size=90"
    first = new_run(tmp_path / "first", text, "llama", padded, "run.sample_tokens=40")
    make_steps(first, stop_after=2)
    with torch.no_grad():  # for any text one of two rows is by far the most likely
        first.model.tok_embeddings.weight[-2:] = torch.randn(first.model.config.dim) * HUGE
    ids = first.data.tokenizer.encode(sample_text(first))
    assert len(ids) >= 40
    opened = open_checkpoint(first.folder)
    assert opened.config.vocab_size == 90 > opened.tokenizer.vocab_size
    begun = f"model.init_from={first.folder}"
    with pytest.raises(WeightsError, match=r"vocab_size is 90 there and \d+ here"):
        new_run(tmp_path / "a", text, "llama", begun)
    run = new_run(tmp_path / "b", text, "llama", begun, padded)
    saved = load_model(open_checkpoint(first.folder)).named_parameters()
    assert all(torch.equal(run.optimizers.named[name], weight) for name, weight in saved)
    make_steps(run)


def test_a_llamas_context_may_be_another(tmp_path: Path, text: Path) -> None:
    first = new_run(tmp_path / "first", text, "llama")
    make_steps(first, stop_after=1)
    more = (f"model.init_from={first.folder}", "data.context=24")
    assert make_steps(new_run(tmp_path / "a", text, "llama", *more))[-1].step == 12


def test_interleaved_rows_are_reordered_to_halves() -> None:
    """With each layout's rotation, the same weights give the same scores of queries and keys."""
    config = LlamaConfig(dim=24, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=8,
                         vocab_size=5, max_seq_len=9, norm_eps=1e-5, rope_theta=1e4)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 9, 24, generator=generator)
    wq, wk = torch.randn(24, 24, generator=generator), torch.randn(12, 24, generator=generator)
    turn = rope_table(torch.arange(9.0)[:, None] * torch.rand(1, 3, generator=generator)[None])
    pairs = replace(config, rope_layout="interleaved")

    def heads(weight: torch.Tensor, rotate: Any) -> torch.Tensor:
        return rotate((x @ weight.T).unflatten(-1, (-1, 6)).transpose(1, 2), turn)

    expected = heads(wq, rotate_interleaved)[:, ::2] @ heads(wk, rotate_interleaved).mT
    names = ("layers.0.attention.wq.weight", "layers.0.attention.wk.weight")
    moved = [in_layout_of(config, pairs, n, w) for n, w in zip(names, (wq, wk), strict=True)]
    found = heads(moved[0], rotate_half)[:, ::2] @ heads(moved[1], rotate_half).mT
    assert not torch.equal(moved[0], wq)
    # Six products of sums of 24: each sum of terms of about one is rounded about 30 times.
    assert torch.allclose(found, expected, rtol=0, atol=float(expected.abs().max()) * 30 * 2**-23)


def test_a_model_that_is_one_file_has_no_tokenizer_to_copy(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(TokenizerError, match=r"add --set data\.tokenizer=FOLDER"):
        vocabulary_folder(str(tmp_path / "model.gguf"), offline=True)
    assert vocabulary_folder(str(tmp_path), offline=True) == tmp_path


# --- other readers --------------------------------------------------------------------------

PLAIN = ["llama-tinyshakespeare-cpu", "llama-shakespeare-bpe", "llama-tinyshakespeare-10m",
         "llama-tinyshakespeare-25m"]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_the_presets_are_llama_3_in_shape(name: str) -> None:
    sizes = load_settings(name).model.sizes
    assert sizes["n_kv_heads"] < sizes["n_heads"]
    assert not sizes.get("qk_norm", False)
    assert load_settings(name).run.precision == "auto"


def test_transformers_reads_the_folder_of_a_run(tmp_path: Path, text: Path) -> None:
    """The preset's model with fewer layers, trained for some steps."""
    from transformers import AutoModelForCausalLM

    more = ["model.n_layers=2", "data.context=64", "data.batch=4", "schedule.steps=4"]
    settings = load_settings(PRESET["llama"], [f"data.corpus={text}", *more])
    from glassllama.train.corpus import open_data

    run = prepare(settings, open_data(settings.data, tmp_path), tmp_path)
    make_steps(run)
    ids = run.data.tokenizer.encode(text.read_text()[:64])[:64]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    # Sums of 128 to 320 terms in other orders: each rounds within √320 ≈ 18 units in the last
    # place of the largest logit, and 2 layers have 7 such products each, before that of the output.
    bar = 15 * 18 * 2**-24 * max(1.0, float(np.abs(expected).max()))
    for backend in ("torch", "engine"):
        llm = load(tmp_path, backend=backend, exact=backend == "engine")
        assert float(np.abs(llm.logits(ids) - expected).max()) <= bar, backend


def test_old_runs_with_qk_norm_are_read_and_resumed(tmp_path: Path, text: Path) -> None:
    """A state.json of the previous version: no `model.init_from`, bfloat16, QK-norm."""
    more = ("model.qk_norm=true", "model.n_kv_heads=4", "run.precision=bfloat16")
    run = new_run(tmp_path / "run", text, "llama", *more)
    make_steps(run, stop_after=4)
    state = json.loads((run.checkpoints / "step-000004" / "state.json").read_text())
    assert "model.init_from" not in state["identity"]
    assert new_run(tmp_path / "run", text, "llama", *more).progress.step == 4
    assert json.loads((run.folder / "config.json").read_text())["model_type"] == "glass_llama"


def test_a_run_of_an_older_version_is_extended(tmp_path: Path, monkeypatch: Any) -> None:
    """tests/train/old_run is a complete run with the old names in its settings and state."""
    folder = shutil.copytree(Path(__file__).parent / "old_run", tmp_path / "run")
    monkeypatch.chdir(folder)  # its settings refer to text.txt
    settings = load_settings("settings.toml", ["schedule.steps=6"])
    train(settings, folder=folder, resume=True)
    assert [metrics.step for metrics in read_log(folder)] == [1, 2, 3, 4, 5, 6]
    state = json.loads((folder / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["identity"]["optimizer.grad_clip"] == 0.5
    assert not [name for name in state["identity"] if "optimiser" in name or "floor" in name]
    assert "grad_clip = 0.5" in (folder / "settings.toml").read_text()
    other = ["schedule.steps=8", "optimizer.grad_clip=0.25"]
    with pytest.raises(TrainingError, match=r"optimizer\.grad_clip was 0\.5, is 0\.25"):
        train(load_settings("settings.toml", other), folder=folder, resume=True)


def test_train_is_a_function_with_a_listener(tmp_path: Path, text: Path) -> None:
    settings = load_settings(PRESET["bigram"], changes("bigram", text, "run.sample_every=6"))
    listener = RecordCalls()
    folder = train(settings, folder=tmp_path / "run", listener=listener)
    assert load(folder).tokenizer.decode([1])
    calls = [name for name, _ in listener.calls]
    assert list(dict.fromkeys(calls)) == ["note", "start", "step", "sample", "end"]
    assert calls.count("step") == 12
    assert calls.count("sample") == 2
    notes = [text for name, text in listener.calls if name == "note"]
    assert any(note.startswith("checked targets") for note in notes)
    assert notes[-1] == "reference runs: none for these settings"
    assert listener.calls[-1][1]  # a sample


class RecordCalls(NullListener):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_note(self, text: str) -> None:
        self.calls.append(("note", text))

    def on_start(self, info: RunInfo) -> None:
        self.calls.append(("start", info))

    def on_step(self, metrics: LoggedMetrics) -> None:
        self.calls.append(("step", metrics))

    def on_sample(self, step: int, text: str) -> None:
        self.calls.append(("sample", text))

    def on_end(self, sample: str | None) -> None:
        self.calls.append(("end", sample))
