"""Wrong usage: one line in one style, exit code 2, and a hint."""

from __future__ import annotations

import io
import os
import pty
import struct
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from cli.conftest import Verb
from glassllama.base.errors import ConfigError
from glassllama.cli.app import INSTEAD, app
from glassllama.cli.errors import print_error
from glassllama.cli.render import wrapped

VERBS = sorted(command.name or "" for command in app.registered_commands)


def usage_error(verb: Verb, *arguments: object) -> str:
    """The one line about wrong usage."""
    ran = verb(*arguments)
    assert (ran.code, ran.out) == (2, "")
    [line] = ran.err.splitlines()
    assert line.startswith("error: ")
    assert "glassllama" in line
    return line


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("pull", "use 'glassllama download'"), ("run", "use 'glassllama chat'"),
        ("ls", "use 'glassllama list'"), ("quantize", "--quantize q8_0"),
        ("finetune", "--init-from MODEL"), ("help", "glassllama --help"),
        ("genrate", "Did you mean 'generate'?"), ("xyzzy", "no such command 'xyzzy'"),
        ("x" * 500, "no such command"),
    ],
)  # fmt: skip
def test_an_unknown_command_gets_a_hint(verb: Verb, typed: str, words: str) -> None:
    line = usage_error(verb, typed, "smollm2-135m", "--port", "80")
    assert words in line
    assert len(line) < 300


def test_hints_name_existing_commands() -> None:
    for hint in INSTEAD.values():
        assert hint.split()[0].rstrip(":") in [*VERBS, "--help", "--version"]
    assert not set(INSTEAD) & set(VERBS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("chat", "--foo"), "no such option: --foo"),
        (("generate", "a", "b"), "unexpected extra argument"),
        (("download",), "missing argument 'MODEL'"),
        (("generate", "x", "-n", "0"), "max_tokens must be a whole number of at least 1, got 0"),
        (("next", "x", "-k", "0"), "'-k': expected a whole number of at least 1, got '0'"),
        (("generate", "x", "--on-overflow", "wrap"), "'wrap' is not one of 'stop', 'shift'"),
        (("generate", "x", "-n"), "requires an argument"),
        (("--frob",), "no such option: --frob"),
    ],
)  # fmt: skip
def test_wrong_usage_looks_like_every_other_error(
    verb: Verb, arguments: tuple[str, ...], words: str
) -> None:
    assert words in usage_error(verb, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--" + "x" * 50_000),
        ("show", "smollm2-135m", "x" * 50_000),
        ("show", "smollm2-135m", "two words " * 5_000),
        ("show", "smollm2-135m", *(["word"] * 5_000)),
        ("bench", "smollm2-135m", "--prompt", "x" * 50_000),
        ("x" * 50_000,),
        ("--" + "x" * 50_000,),
    ],
    ids=lambda arguments: f"{arguments[0][:10]} {arguments[-1][:10]}",
)
def test_long_arguments_are_shortened_in_errors(verb: Verb, arguments: tuple[str, ...]) -> None:
    line = usage_error(verb, *arguments)
    assert len(line) < 500
    assert line.endswith("-h')")


def test_names_too_long_for_a_file_are_shortened_in_errors(verb: Verb) -> None:
    ran = verb("perplexity", "smollm2-135m", "-f", "x" * 50_000)
    assert (ran.code, ran.out) == (1, "")
    assert len(ran.err) < 200
    assert ran.err.startswith("error: 'xxx")


def test_an_unavailable_device_is_an_error_of_one_line(verb: Verb, default_model: Path) -> None:
    from glassllama.weights.load import torch_device

    for name in ("xla", "cuda:99", "meta", "abacus", "hpu", ""):
        with pytest.raises(ConfigError, match="PyTorch has cpu") as error:
            torch_device(name)
        assert str(error.value).startswith(f"device: '{name}' cannot be used here; ")
        assert len(str(error.value)) < 160
    ran = verb("generate", "x", "--device", "vulkan")
    assert (ran.code, ran.out) == (1, "")
    [line] = ran.err.splitlines()
    assert line.startswith("error: device: 'vulkan' cannot be used here; ")


def test_errors_wrap_between_words_on_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 40, 0, 0))
    words = "a model that is neither here nor there and has a long description".split()
    with open(slave, "w") as terminal:
        lines = wrapped(" ".join(words), terminal).split("\n")
        assert len(lines) > 1
        assert max(map(len, lines)) <= 40
        assert [word for line in lines for word in line.split()] == words
    os.close(master)
    assert wrapped(" ".join(words), io.StringIO()) == " ".join(words)
    assert print_error(" ".join(words)) == 1
    assert capfd.readouterr().err == f"error: {' '.join(words)}\n"
