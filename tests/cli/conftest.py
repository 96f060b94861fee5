"""Runs the command line in this process, with the default model loaded once."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from glassllama.cli.app import app
from glassllama.cli.errors import exit_code_of
from glassllama.llm import LLM, load


@dataclass(frozen=True)
class CommandResult:
    """The output and the exit code of a command."""

    code: int
    out: str
    err: str


Verb = Callable[..., CommandResult]


@pytest.fixture(autouse=True)
def in_an_empty_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run each test in an empty folder: files of the user, such as `runs/`, have no effect."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="session")
def llm(default_model: Path) -> LLM:
    return load("smollm2-135m")


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Verb:
    """Run a command in this process; `stdin` is a pipe with that text."""

    def run(*arguments: object, stdin: str = "") -> CommandResult:
        pipe = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", pipe)
        capsys.readouterr()
        words = [str(argument) for argument in arguments]
        code = exit_code_of(lambda: app(words, prog_name="glassllama"), debug=True)
        return CommandResult(code, *capsys.readouterr())

    return run


@pytest.fixture
def loaded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Use the loaded default model instead of loading it in every command."""

    def ready(name: str, **_: Any) -> LLM:
        assert name == "smollm2-135m"
        return llm

    monkeypatch.setattr("glassllama.llm.load", ready)
    return llm
