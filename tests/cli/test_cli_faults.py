"""Every error is one line with the right exit code. Real processes and pipes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.programs import COMMAND, PATIENCE, error_lines, is_clean_error, run, run_many
from glassllama.base.errors import GlassError
from glassllama.cli.errors import user_message
from tiny_models import hf_model, write_hf

# Every command, with arguments that would work if the model existed.
VERBS = {
    "chat": ["hello", "--model", "{model}"],
    "generate": ["hello", "--model", "{model}"],
    "describe": ["{text}", "--model", "{model}"],
    "classify": ["{text}", "a llama", "--model", "{model}"],
    "next": ["hello", "--model", "{model}"],
    "tokenize": ["hello", "--model", "{model}"],
    "download": ["{model}"],
    "list": [],
    "walkthrough": ["hello", "--model", "{model}"],
    "show": ["{model}"],
    "validate": ["{model}"],
    "perplexity": ["{model}", "--file", "{text}"],
    "bench": ["{model}"],
    "train": ["bigram-tinyshakespeare", "--data", "{model}", "--out", "{model}.run"],
    "train-tokenizer": ["{model}", "--vocab-size", "300", "--out", "{model}.out"],
}
WITH_MODEL = [name for name in VERBS if name not in ("list", "train")]  # train: its settings first


def arguments(name: str, model: object, text: object = __file__) -> list[str]:
    return [name, *(part.format(model=model, text=text) for part in VERBS[name])]


def test_every_command_is_listed() -> None:
    from glassllama.cli.app import app

    names = {command.name for command in app.registered_commands}
    assert names == set(VERBS)


def test_a_missing_model_is_an_error_of_one_line() -> None:
    for process in run_many([arguments(name, "./nowhere.gguf") for name in WITH_MODEL]):
        assert is_clean_error(process, "nowhere.gguf", "no such file")


def test_an_unknown_option_is_wrong_usage() -> None:
    for process in run_many([[name, "--colour-of-the-llama"] for name in VERBS]):
        assert process.returncode == 2
        assert process.stdout == ""
        assert "--colour-of-the-llama" in process.stderr
        assert f"glassllama {process.args[0]} -h" in process.stderr


def test_wrong_values_are_wrong_usage() -> None:
    wrong = [
        ["--temperature", "hot"],
        ["--top-p", "2"],
        ["--backend", "gpu"],
        ["--max-tokens", "0"],
    ]
    for process in run_many([["generate", "x", *pair] for pair in wrong]):
        assert process.returncode == 2
        assert process.args[2] in process.stderr
    [unknown] = run_many([["sing"]])
    assert unknown.returncode == 2
    assert "sing" in unknown.stderr


def test_missing_files_of_other_kinds(tmp_path: Path, default_model: Path) -> None:
    texts = [tmp_path / "text.txt", tmp_path / "latin.txt"]
    texts[1].write_bytes("Straße".encode("latin-1"))
    lines = [arguments("perplexity", "smollm2-135m", text) for text in texts]
    missing, latin = run_many(lines)
    assert is_clean_error(missing, "text.txt", "No such file")
    assert is_clean_error(latin, "latin.txt", "not UTF-8 at byte 4")


def test_a_closed_output_pipe_is_exit_code_141(default_model: Path) -> None:
    """Forks, and one new process."""
    names = ["list", "show", "tokenize", "download", "next", "generate"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as broken:
        own = subprocess.run(
            [*COMMAND, *arguments("tokenize", "smollm2-135m")],
            stdin=subprocess.DEVNULL,
            stdout=broken,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=PATIENCE,
        )
    for process in [own, *run_many([arguments(n, "smollm2-135m") for n in names], out="unread")]:
        assert process.returncode == 141
        assert "Traceback" not in process.stderr
        assert "rror" not in process.stderr


ANSWERS = [["--help"], ["--version"], ["list"], ["show", "-h"], ["train", "--help"], []]
ERRORS = [["show", "./nowhere.gguf"], ["--debug", "show", "./nowhere.gguf"]]


def test_a_closed_output_pipe_prints_no_error() -> None:
    for process in run_many(ANSWERS, out="unread"):
        assert (process.returncode, process.stderr.count("rror")) == (141, 0)
    for err in ("unread", "full"):
        assert {process.returncode for process in run_many(ANSWERS, out="unread", err=err)} == {141}
    for process in run_many(ERRORS, out="unread"):
        assert is_clean_error(process, "nowhere.gguf")


def test_output_to_a_full_device_is_an_error_of_one_line() -> None:
    for process in run_many(ANSWERS, out="full"):
        assert is_clean_error(process, "No space left")


@pytest.mark.parametrize("err", ["unread", "full"])
def test_an_error_that_cannot_be_printed_has_its_exit_code(err: str) -> None:
    for out in ("file", "unread", "full"):
        assert {process.returncode for process in run_many(ERRORS, out=out, err=err)} == {1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v: Linux")
@pytest.mark.parametrize("words", ["chat hi", "generate hi --backend torch", "walkthrough hi"])
def test_too_little_memory_is_an_error_of_one_line(words: str, default_model: Path) -> None:
    process = subprocess.run(
        ["sh", "-c", f"ulimit -v 400000; exec {' '.join(COMMAND)} {words}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert is_clean_error(process, "out of memory: ", "'ulimit -v'")


def test_out_of_memory_errors_of_libraries() -> None:
    inner = OSError("libx.so: failed to map segment from shared object")
    hidden = OSError("Could not find/load shared object file")
    hidden.__context__ = inner
    for error in (
        hidden, MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ):  # fmt: skip
        assert str(user_message(error)).startswith("out of memory")
    unread = GlassError("x.gguf: cannot be read: Cannot allocate memory")
    unread.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert str(user_message(unread)).startswith("out of memory")
    assert user_message(RuntimeError("something else")) is None
    assert user_message(GlassError("needs not enough memory")) == "needs not enough memory"


def test_an_output_pipe_closed_during_an_answer_is_exit_code_141(default_model: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "generate", "Once upon a time", "--ignore-eos", "-t", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(PATIENCE) == 141
        assert error_lines(process.stderr.read().decode()) == []


@pytest.mark.parametrize("name", ["chat", "generate", "next", "tokenize"])
def test_closed_stdin_is_a_missing_text(name: str) -> None:
    line = f"exec {' '.join(COMMAND)} {name} <&-"
    process = subprocess.run(
        ["sh", "-c", line], capture_output=True, encoding="utf-8", timeout=PATIENCE
    )
    assert is_clean_error(process, "is missing")
    [empty] = run_many([[name]])
    assert is_clean_error(empty, "is missing")  # empty stdin is the same


def test_closed_stderr_is_no_error() -> None:
    line = f"exec {' '.join(COMMAND)} list 2>&-"
    process = subprocess.run(["sh", "-c", line], capture_output=True, timeout=PATIENCE)
    assert process.returncode == 0
    assert b"Traceback" not in process.stderr


@pytest.mark.parametrize("closing", [">&-", ">&- <&-", ">&- 2>&-"])
@pytest.mark.parametrize("words", ["tokenize hi --json", "--help"])
def test_an_answer_that_cannot_be_written_is_an_error(
    words: str, closing: str, default_model: Path
) -> None:
    line = f"exec {' '.join(COMMAND)} {words} {closing}"
    process = subprocess.run(
        ["sh", "-c", line], capture_output=True, encoding="utf-8", timeout=PATIENCE
    )
    assert process.returncode == 1
    if "2>&-" not in closing:
        assert is_clean_error(process, "stdout: closed")


def test_a_full_disk_is_an_error_of_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [*COMMAND, "list"], stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE
        )
    assert process.returncode == 1
    assert process.stderr.startswith(b"error: ")
    assert b"No space left" in process.stderr
    assert process.stderr.count(b"\n") == 1


def test_stdin_that_is_not_text_is_an_error_of_one_line() -> None:
    process = subprocess.run(
        [*COMMAND, "tokenize"], input=b"abc\xff", capture_output=True, timeout=PATIENCE
    )
    assert process.returncode == 1
    assert process.stderr == b"error: standard input: not UTF-8 at byte 3\n"


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_locale_without_utf8_prints_what_it_can(
    locale: dict[str, str], default_model: Path
) -> None:
    text = "wörld 🙂"
    shown = run("next", "The capital of France is", env=locale).stdout.splitlines()[2]
    assert "%" in shown
    assert "######" in shown
    assert run("tokenize", input=text, env=locale).returncode == 0
    process = run("tokenize", "--json", input=text, env=locale)
    assert process.stdout.isascii()
    assert "".join(json.loads(process.stdout)["pieces"]) == text


def test_pipes_and_no_color_get_no_escapes(default_model: Path) -> None:
    for environment in ({"FORCE_COLOR": ""}, {"NO_COLOR": "1", "TERM": "xterm-256color"}):
        for verb in (["--help"], ["list"], ["show", "smollm2-135m"]):
            process = run(*verb, env=environment)
            assert "\x1b" not in process.stdout + process.stderr


def test_a_read_only_home_works(default_model: Path) -> None:
    unset = {"XDG_CACHE_HOME": "", "GLASSLLAMA_HOME": ""}
    environment = {"HOME": "/dev/null/nobody", "HF_HOME": "/dev/null/nobody", **unset}
    model = ("-m", str(default_model), "--backend", "torch")  # the engine would compile again
    process = run("chat", "Hi", "-t", "0", "-n", "4", *model, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip()
    assert "Traceback" not in process.stderr
    assert is_clean_error(run("download", "smollm2-135m", env=environment), "GLASSLLAMA_HOME")


def test_a_missing_extra_is_an_error_with_the_install_command(default_model: Path) -> None:
    without_torch = (
        "import sys; sys.modules['torch'] = None; from glassllama.__main__ import main; "
        "sys.argv[1:] = ['generate', 'x', '--backend', 'torch']; main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", without_torch],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert is_clean_error(process, "pip install 'glassllama[torch]'")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_program_immediately(
    sent: signal.Signals, code: int, default_model: Path
) -> None:
    with subprocess.Popen(
        [*COMMAND, "generate", "Once upon a time", "--ignore-eos", "-t", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        begun = process.stdout.read(5)  # the answer has started
        process.send_signal(sent)
        rest, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert error_lines(errors.decode().strip()) == []
    assert (begun + rest).endswith(b"\n")  # the text so far is printed completely


def test_an_unexpected_error_is_one_line_and_debug_prints_the_traceback() -> None:
    broken = (
        "import sys, glassllama.hub as hub; hub.cached_models = lambda: 1 / 0; "
        "from glassllama.__main__ import main; sys.argv[1:] = {}; main()"
    )
    for arguments, words in ((["list"], "please report"), (["--debug", "list"], "Traceback")):
        process = subprocess.run(
            [sys.executable, "-c", broken.format(arguments)],
            capture_output=True,
            encoding="utf-8",
            timeout=PATIENCE,
        )
        assert process.returncode == 1
        assert words in process.stderr
        assert "ZeroDivisionError" in process.stderr
        assert (len(process.stderr.splitlines()) == 1) == (arguments == ["list"])


def test_damaged_models_are_an_error_of_one_line(tmp_path: Path) -> None:
    folder = write_hf(hf_model(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for process in run_many([arguments(name, folder) for name in ("show", "tokenize", "generate")]):
        assert is_clean_error(process, "model.safetensors")
