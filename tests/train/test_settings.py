"""Presets, TOML files and --set: errors name what is wrong; settings survive a round trip."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from glassllama.base.errors import ConfigError
from glassllama.train.model import count_parameters, make_model
from glassllama.train.optimizers import lr_factor
from glassllama.train.settings import ScheduleSettings, load_settings, preset_names, to_toml

NANOGPT_CPU_PARAMETERS = 804_096  # counted like nanoGPT's code, with positions: 4·196,608 + …


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    settings = load_settings(name)
    file = tmp_path / "again.toml"
    file.write_text(to_toml(settings), encoding="utf-8")
    assert replace(load_settings(str(file)), name=name) == settings
    here = replace(settings, run=replace(settings.run, device="cpu"))
    assert count_parameters(make_model(here, vocab_size=69)) > 0


def test_presets_have_the_stated_number_of_parameters() -> None:
    ours = count_parameters(make_model(load_settings("llama-tinyshakespeare-cpu"), vocab_size=69))
    gpt = count_parameters(make_model(load_settings("gpt-tinyshakespeare-cpu"), vocab_size=65))
    assert ours <= 810_000
    assert gpt == NANOGPT_CPU_PARAMETERS
    for name, size in (("llama-tinyshakespeare-10m", 10.8e6), ("llama-tinyshakespeare-25m", 25e6)):
        count = count_parameters(make_model(load_settings(name, ["run.device=cpu"]), vocab_size=69))
        assert abs(count - size) < 0.03 * size, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("schedule.stebs=5", "schedule.stebs: no such setting; did you mean steps"),
        ("shedule.steps=5", "unknown table [shedule]; did you mean schedule"),
        ("steps=5", "expected table.field=value"),
        (
            "schedule.steps=many",
            "schedule.steps must be a whole number in [1, 2147483647], got 'many'",
        ),
        ("schedule.steps=2.5", "steps must be a whole number in [1, 2147483647], got 2.5"),
        ("schedule.steps=0", "schedule.steps must be a whole number in [1, 2147483647], got 0"),
        ("data.val_fraction=1e-300", "data.val_fraction must be a finite number in [1e-6, 1), got"),
        ("data.val_fraction=1", "data.val_fraction must be a finite number in [1e-6, 1), got 1"),
        ("schedule.warmup=5000", "do not fit into 1000 steps in all; add --set schedule.warmup="),
        ("schedule.steps=1" + "0" * 400, "schedule.steps must be a whole number in [1, "),
        ("schedule.steps=2026-11-29", "got datetime.date(2026, 11, 29)"),
        ("run.seed=4294967296", "run.seed must be a whole number in [0, 4294967295]"),
        ("schedule.kind=linear", "schedule.kind must be one of cosine, wsd, got 'linear'"),
        ("optimizer.lr=nan", "optimizer.lr must be a finite number in (0, 1e6], got nan"),
        ("optimizer.lr=1e38", "optimizer.lr must be a finite number in (0, 1e6], got 1e+38"),
        ("optimizer.matrix_lr=3e38", "optimizer.matrix_lr must be a finite number in (0, 1e6]"),
        (
            "optimizer.weight_decay=3e38",
            "optimizer.weight_decay must be a finite number in [0, 1e6]",
        ),
        ("schedule.min_lr_ratio=3e38", "min_lr_ratio must be a finite number in [0, 1e6]"),
        ("schedule.steps=1\nwarmup=0", "schedule.steps must be a whole number in [1, "),
        ("optimizer.beta1=1", "optimizer.beta1 must be a finite number in [0, 1), got 1"),
        ("run.precision=float16", "run.precision must be one of float32, bfloat16"),
        ("run.accumulate=7", "run.accumulate: 32 rows (data.batch) cannot be cut into 7"),
        ("run.compile=yes", "run.compile must be true or false, got 'yes'"),
        ("run.prompt=", "run.prompt must be non-empty text in UTF-8"),
        ("model.kind=mamba", "model.kind must be one of bigram, gpt, llama"),
        ("data.tokenizer=bpe:many", "data.tokenizer must be bpe:N"),
    ],
)
def test_errors_name_an_invalid_setting(change: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings("llama-tinyshakespeare-cpu", ["data.batch=32", change])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.n_head=4", "model.n_head: a llama has no such setting; did you mean n_heads?"),
        ("model.vocab_size=60", "model.vocab_size: 60, but the tokenizer has 69 tokens"),
        ("model.max_seq_len=9", "model.max_seq_len: a llama has no such setting"),
        ("model.norm_eps=small", "model.norm_eps must be a finite number, got 'small'"),
        ("model.tie_embeddings=3", "model.tie_embeddings must be true or false, got 3"),
        ("model.dim=2.5", "model.dim must be a whole number in [1, 1048576], got 2.5"),
        ("model.n_kv_heads=3", "model.n_heads must be a multiple of n_kv_heads"),
        ("model.head_dim=7", "model.head_dim must be even"),
        ("run.device=abacus", "run.device: 'abacus' cannot be used here"),
        ("run.device=meta", "run.device: 'meta' cannot be used here"),
        ("run.device=cpu:1", "run.device must be cpu without a number, got 'cpu:1'"),
        ("model.n_layers=1001", "model.n_layers must be a whole number in [1, 1000]"),
        ("model.dim=1000000000", "model.dim must be a whole number in [1, 1048576]"),
    ],
)
def test_errors_name_an_invalid_size(change: str, words: str) -> None:
    settings = load_settings("llama-tinyshakespeare-cpu", ["model.n_heads=4", change])
    with pytest.raises(ConfigError) as error:
        make_model(settings, vocab_size=69)
    assert words in str(error.value)


def test_files_that_are_not_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    for text, words in (
        ("[model", "not valid TOML"),
        ("[modell]", "unknown table [modell]; did you mean model?"),
        ("model = 3", "model must be a table"),
        ("[model]\nkind = 'gpt'", "table [data] is missing"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as error:
            load_settings(str(file))
        assert words in str(error.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 0"):
        load_settings(str(file))
    with pytest.raises(ConfigError, match="did you mean llama-tinyshakespeare-cpu"):
        load_settings("lama-tinyshakespeare-cpu")


OLD_NAMES = """
[model]
kind = "bigram"
[data]
corpus = "tinyshakespeare"
held_out = 0.2
context = 8
batch = 4
[optimiser]
lr = 0.1
clip = 0.5
[schedule]
steps = 100
floor = 0.1
"""


def test_settings_files_of_older_versions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text(OLD_NAMES)
    settings = load_settings(str(file), ["optimiser.lr=0.2", "schedule.floor=0.3"])
    assert settings.data.val_fraction == 0.2
    assert (settings.optimizer.lr, settings.optimizer.grad_clip) == (0.2, 0.5)
    assert settings.schedule.min_lr_ratio == 0.3
    assert not re.search("optimiser|held_out|floor|^clip", to_toml(settings), re.MULTILINE)
    file.write_text(OLD_NAMES.replace("clip", "grad_clip = 1.0\nclip"))
    with pytest.raises(ConfigError, match=r"grad_clip is set twice, once by its old name"):
        load_settings(str(file))


def test_every_character_of_a_text_survives_a_round_trip(tmp_path: Path) -> None:
    settings = load_settings("bigram-tinyshakespeare")
    prompt = "".join(map(chr, range(0x100))) + '\u2028😀\\"'
    settings = replace(settings, run=replace(settings.run, prompt=prompt))
    file = tmp_path / "again.toml"
    file.write_text(to_toml(settings), encoding="utf-8")
    assert load_settings(str(file)).run.prompt == prompt


def test_schedules_warm_up_stay_and_decay() -> None:
    wsd = ScheduleSettings(kind="wsd", steps=100, warmup=10, decay=0.5, min_lr_ratio=0.1)
    factors = [lr_factor(step, wsd) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9] == factors[49] == 1.0
    assert factors[99] == pytest.approx(0.1 + 0.9 / 50)
    assert factors[49:] == sorted(factors[49:], reverse=True)
    cosine = ScheduleSettings(kind="cosine", steps=100, warmup=10, min_lr_ratio=0.1)
    assert lr_factor(10, cosine) == 1.0
    assert lr_factor(55, cosine) == pytest.approx(0.55)
    assert all(0.1 <= lr_factor(step, cosine) <= 1 for step in range(9, 100))
