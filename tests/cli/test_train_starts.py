"""Starts of `glassllama train` that fail, are interrupted or are refused leave no files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glassllama.train import loop
from glassllama.train.settings import SEED_LIMIT
from train.recipes import PRESET, changes, write_text

BIGRAM = PRESET["bigram"]
SHORT = ["--set", "schedule.steps=2", "--set", "data.batch=4", "--set", "run.eval_every=0"]
TEN_TO_THE_400 = "1" + "0" * 400


@pytest.fixture
def text(tmp_path: Path, romeo_and_juliet: Path) -> Path:
    return write_text(tmp_path, romeo_and_juliet)


def contents(folder: Path) -> dict[str, bytes | None]:
    """The name of every file and folder below the folder, with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def words(kind: str, text: Path, folder: Path, *more: str) -> list[str]:
    sets = [word for change in changes(kind, text, *more) for word in ("--set", change)]
    return ["train", PRESET[kind], *sets, "--out", str(folder)]


def one_error(ran: Any) -> str:
    """The error line: there is exactly one, and it is the last line."""
    assert ran.code == 1, ran.err
    assert ran.err.count("error: ") == 1
    line = str(ran.err.splitlines()[-1])
    assert line.startswith("error: ")
    assert "fault of glassllama's own" not in line
    return line


# --- failed starts --------------------------------------------------------------------------

BAD_TEXTS = {
    "short": "To be, or not to be, that is the question. " * 10,
    "one": "a",
    "nul": "\0" * 5000,
    "same": "To be, or not to be, that is the question.\n" * 500,
    "empty": "",
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_trained_on(
    name: str, there: bool, verb: Any, tmp_path: Path
) -> None:
    bad, folder = tmp_path / f"{name}.txt", tmp_path / "runs" / "one"
    bad.write_text(BAD_TEXTS[name])
    if there:
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "train.bin").write_bytes(b"mine")
        (folder / "settings.toml").write_text("# mine\n")
    before = contents(tmp_path)
    line = one_error(verb("train", BIGRAM, "--data", bad, "--out", folder))
    assert f"{name}.txt" in line
    assert contents(tmp_path) == before


def no_number(*_: Any) -> float:
    return float("inf")


def ctrl_c(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[str, Callable[..., Any], int]] = {
    "ctrl-c in the checks": ("glassllama.train.preflight.check_learning", ctrl_c, 130),
    "ctrl-c in the first step": ("glassllama.train.loop.loss_and_gradients", ctrl_c, 130),
    "NaN in the first step": ("glassllama.train.loop.loss_and_gradients", no_number, 1),
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_start_without_a_first_step_leaves_no_files(
    failure: str, there: bool, verb: Any, tmp_path: Path, text: Path, monkeypatch: Any
) -> None:
    place, broken, code = FAILURES[failure]
    monkeypatch.setattr(place, broken)
    folder = tmp_path / "runs" / "one"
    if there:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    options = [] if "checks" in failure else ["--no-preflight"]
    assert verb(*words("bigram", text, folder), *options).code == code
    assert contents(tmp_path) == before


def test_a_signal_before_the_first_step(
    verb: Any, tmp_path: Path, text: Path, monkeypatch: Any
) -> None:
    def interrupted(*_: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 1e9

    monkeypatch.setattr("glassllama.train.api.peak_flops", interrupted)
    ran = verb(*words("bigram", text, tmp_path / "run"), "--no-preflight")
    assert ran.code == 130
    assert "stopped before step 1; nothing has changed" in ran.err
    assert not (tmp_path / "run").exists()


def test_without_tensorboard(verb: Any, tmp_path: Path, text: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("glassllama.train.metrics.find_spec", lambda name: None)
    ran = verb(*words("bigram", text, tmp_path / "run", "run.tensorboard=true"), "--no-preflight")
    assert "run.tensorboard needs an extra" in one_error(ran)
    assert not (tmp_path / "run").exists()


def test_leftovers_of_a_killed_start_are_removed(verb: Any, tmp_path: Path, text: Path) -> None:
    stage = tmp_path / "run" / ".start" / "tokenizer"
    stage.mkdir(parents=True)
    (stage / "tokenizer.json").write_text("{}")
    assert verb(*words("bigram", text, tmp_path / "run"), "--no-preflight").code == 0
    assert not (tmp_path / "run" / ".start").exists()


# --- vocabularies ---------------------------------------------------------------------------


def test_a_failed_start_does_not_affect_the_next(
    verb: Any, tmp_path: Path, text: Path, romeo_and_juliet: Path
) -> None:
    """Another text and another size are refused; the next vocabulary is of the requested text."""
    other, folder = tmp_path / "other.txt", tmp_path / "run"
    other.write_text(romeo_and_juliet.read_text()[50_000:80_000])
    asked = ["train", BIGRAM, *SHORT, "--out", folder]
    sizes = ("--set", "data.tokenizer=bpe:320", "--set", "data.context=50000")
    one_error(verb(*asked, "--data", other, *sizes))
    ran = verb(*asked, "--data", text, "--set", "data.tokenizer=bpe:300")
    assert ran.code == 0, ran.err
    assert "vocabulary 300" in ran.err
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 300
    made_of = json.loads((folder / "tokenizer" / "made_of.json").read_text())
    assert (made_of["kind"], made_of["size"]) == ("bpe", 300)


# --- a refused resumption -------------------------------------------------------------------


def test_a_refused_resumption_changes_no_file(
    verb: Any, tmp_path: Path, text: Path, romeo_and_juliet: Path
) -> None:
    other, folder = tmp_path / "other.txt", tmp_path / "run"
    other.write_text(romeo_and_juliet.read_text()[50_000:60_000])
    vocabulary = "data.tokenizer=bpe:300"
    assert verb(*words("llama", text, folder, vocabulary), "--no-preflight").code == 0
    before = contents(folder)
    for line, message in (
        (words("llama", other, folder, vocabulary), "training text was"),
        (words("llama", text, folder, vocabulary, "schedule.steps=11"), "extended, not shortened"),
        (words("llama", other, folder, "data.tokenizer=bpe:310"), "data.tokenizer was 'bpe:300'"),
        (words("gpt", text, folder), "model.kind was 'llama', is 'gpt'"),
        (words("llama", text, folder, vocabulary, "data.context=5000"), "data.context was 16"),
    ):
        ran = verb(*line, "--resume", "auto")
        assert message in one_error(ran)
        assert contents(folder) == before, message
    back = verb("train", folder / "settings.toml", "--resume", "auto", "--out", folder)
    assert back.code == 0, back.err
    assert "going on after step 12" in back.err


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--no-preflight"]])
@pytest.mark.parametrize("change", ["data.batch=1000000000", "model.dim=99999", "data.batch=40000"])
def test_memory_is_checked_before_it_is_allocated(
    change: str, more: list[str], verb: Any, tmp_path: Path, text: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("glassllama.base.machine.available_memory", lambda: 10_000_000)
    monkeypatch.setattr(loop, "train_step", lambda run: pytest.fail("a step was run"))
    line = one_error(verb(*words("gpt", text, tmp_path / "run", change), *more))
    assert "of memory, 10.0 MB are free; raise run.accumulate, or lower data.batch" in line
    assert not (tmp_path / "run").exists()


# --- errors are one line --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.compile=true", "run.compile: this model has no layers to compile"),
        (f"run.seed={SEED_LIMIT}", "run.seed must be a whole number in [0, 4294967295]"),
        (f"schedule.steps={TEN_TO_THE_400}", "schedule.steps must be a whole number in [1, "),
        ("schedule.steps=1" + "0" * 9000, "more than 4,096 characters"),
        ("data.batch=1000000000000", "data.batch must be a whole number in [1, 2147483647]"),
        (f"optimizer.lr={TEN_TO_THE_400}", "optimizer.lr must be a finite number"),
        ("data.tokenizer=bpe:1" + "0" * 3000, "data.tokenizer must be bpe:N"),
        ("run.prompt=\udcff", r"run.prompt must be non-empty text in UTF-8, got '\udcff'"),
        ("data.corpus=", "data.corpus must be non-empty text in UTF-8"),
        ("data.tokenizer=", "data.tokenizer must be non-empty text in UTF-8"),
        ("model.dim=3", "model.dim: a bigram has no such setting; have vocab_size"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(
    change: str, message: str, verb: Any, tmp_path: Path, text: Path
) -> None:
    line = one_error(verb(*words("bigram", text, tmp_path / "run", change)))
    assert message in line
    assert len(line) < 300
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_trains(verb: Any, tmp_path: Path, text: Path) -> None:
    line = words("bigram", text, tmp_path / "run", f"run.seed={SEED_LIMIT - 1}")
    assert verb(*line, "--no-preflight").code == 0


def test_a_missing_preset_argument_is_wrong_usage(verb: Any, tmp_path: Path, text: Path) -> None:
    for options in (
        ["--data", text],
        ["--set", "schedule.steps=2"],
        ["--out", tmp_path / "run"],
        ["--resume", "auto"],
        ["--no-preflight"],
    ):
        ran = verb("train", *options)
        assert ran.code == 2, options
        assert ran.out == ""
        assert "PRESET" in ran.err
        assert f"have {BIGRAM}" in ran.err


def test_the_text_is_read_before_anything_is_printed(verb: Any, tmp_path: Path) -> None:
    ran = verb("train", BIGRAM, "--data", tmp_path / "typo.txt", "--out", tmp_path / "run")
    assert ran.err.splitlines() == [f"error: {tmp_path / 'typo.txt'}: no such file or folder"]


def test_changed_settings_are_printed(verb: Any, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "run"
    line = ["train", BIGRAM, *SHORT, "--data", text, "--out", folder, "--no-preflight"]
    message = verb(*line).err.splitlines()
    assert message[:5] == [
        f"settings of {BIGRAM}; all are saved in {folder / 'settings.toml'}",
        "schedule.steps = 2",
        "data.batch = 4",
        "run.eval_every = 0",
        f'data.corpus = "{text}"',
    ]
    assert "lr = 0.1" in (folder / "settings.toml").read_text()


def test_the_error_for_a_short_text_contains_the_length_needed(verb: Any, tmp_path: Path) -> None:
    for count, tokens in ((1, 0), (300, 30)):
        (tmp_path / "mine.txt").write_text("ab c" * (count // 4) or "a")
        line = one_error(verb("train", BIGRAM, "--data", tmp_path / "mine.txt"))
        assert f"mine.txt: of its {count} characters {tokens} tokens are" in line
        assert "too few for a context of 64 and one more to predict" in line
        needed = int(line.partition("at least about ")[2].split()[0].replace(",", ""))
        assert needed in ((650,) if tokens else (73, 650))
    (tmp_path / "mine.txt").write_text("")
    line = one_error(verb("train", BIGRAM, "--data", tmp_path / "mine.txt"))
    assert line.endswith("mine.txt: no text in it; expected at least one character")


def test_a_path_that_is_not_a_file_is_not_reported_as_missing(verb: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    line = one_error(verb("train", BIGRAM, "--data", tmp_path / "pipe.txt"))
    assert "pipe.txt: neither a regular file nor a folder" in line


# --- the end of a run -----------------------------------------------------------------------


def test_the_suggested_command_is_shell_quoted(verb: Any, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "my run"
    ran = verb(*words("bigram", text, folder), "--no-preflight")
    assert f"complete: try it with: glassllama generate -m '{folder}' TEXT" in ran.err


def test_a_signal_during_the_last_save_has_no_effect(
    verb: Any, tmp_path: Path, text: Path, monkeypatch: Any
) -> None:
    original = loop.save

    def interrupted(run: Any) -> None:
        if run.complete:
            os.kill(os.getpid(), signal.SIGTERM)
        original(run)

    monkeypatch.setattr(loop, "save", interrupted)
    ran = verb(*words("bigram", text, tmp_path / "run"), "--no-preflight")
    assert ran.code == 0
    assert "complete: try it with" in ran.err
    assert "stopped and saved" not in ran.err
