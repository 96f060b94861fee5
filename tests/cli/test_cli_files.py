"""Files that commands write and read: written completely or not at all, named in errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli.conftest import Verb
from cli.programs import files_of_at_most, is_clean_error, run
from glassllama.base.errors import GlassError
from glassllama.cli import console
from glassllama.cli.console import write_file
from glassllama.cli.repl import Conversation
from glassllama.native.jit import deferred_signals
from tiny_models import hf_model, write_hf

LIMIT = 4096  # bytes


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with files_of_at_most(LIMIT), pytest.raises(GlassError, match=r"page\.html: cannot be written"):
        write_file(page, "x" * 2 * LIMIT)
    assert list(tmp_path.iterdir()) == []
    write_file(page, "old")
    with files_of_at_most(LIMIT), pytest.raises(GlassError, match="too large"):
        write_file(page, "x" * 2 * LIMIT)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert page.read_text() == "old"


def test_writing_to_links_and_devices_does_not_replace_them(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("real")
    write_file(link, "é")
    assert link.is_symlink()
    assert (tmp_path / "real").read_text(encoding="utf-8") == "é"
    with pytest.raises(GlassError, match=r"/dev/full: cannot be written .No space left"):
        write_file(Path("/dev/full"), "x")
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("there", [False, True])
def test_a_tokenizer_that_does_not_fit_on_the_disk_leaves_no_file(
    there: bool, verb: Verb, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = tmp_path_factory.mktemp("first") / "fits"
    verb("train-tokenizer", __file__, "--vocab-size", 300, "--out", first)  # compiles first
    out = tmp_path / "mine"
    if there:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    with files_of_at_most(LIMIT):
        ran = verb("train-tokenizer", __file__, "--vocab-size", 300, "--out", out)
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith(f"error: {out}: cannot be written")
    assert [p.name for p in tmp_path.rglob("*")] == (["mine", "notes.txt"] if there else [])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_model_folder_is_an_error(name: str, tmp_path: Path) -> None:
    folder = write_hf(hf_model(), tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert is_clean_error(run("show", str(folder)), name, "is not a regular file")


def test_a_pipe_is_refused_as_a_conversation(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "talk.json")
    with pytest.raises(GlassError, match=r"talk\.json: is not a regular file"):
        Conversation.load(tmp_path / "talk.json")


def test_a_notice_is_printed_if_compiling_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compilations = deferred_signals.Compilations()
    monkeypatch.setattr(deferred_signals, "compilations", compilations)
    outputs: list[str] = []

    class EventAfterThreeChecks:
        """An event that is set after three checks; before the second check a compilation starts."""

        def __init__(self) -> None:
            self.count = 0

        def wait(self, _: float) -> bool:
            self.count += 1
            outputs.append(capsys.readouterr().err)
            compilations.begun += self.count == 2
            return self.count > 3

    console.watch_compiling(EventAfterThreeChecks(), 0)  # type: ignore[arg-type]
    assert outputs == ["", ""]  # a download, or PyTorch
    assert capsys.readouterr().err == f"{console.COMPILING}\n"
    console.watch_compiling(EventAfterThreeChecks(), 2)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    with console.compile_notice():
        pass
