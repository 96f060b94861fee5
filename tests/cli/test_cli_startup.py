"""Help is fast because it imports no large packages."""

from __future__ import annotations

import json
import subprocess
import sys

from cli.programs import PATIENCE, run

HEAVY = ("torch", "numba", "numpy", "huggingface_hub", "jinja2", "regex")
LOOK = """
import json, sys
from glassllama.cli.app import app
from glassllama.__main__ import main

imported = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, arguments
    imported[" ".join(arguments)] = [name for name in sys.modules if "." not in name]
print("\\n" + json.dumps(imported))
"""


def modules_after(*lines: list[str]) -> dict[str, list[str]]:
    """The modules imported after each of these command lines, run one after the other."""
    process = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(lines)],
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr
    imported: dict[str, list[str]] = json.loads(process.stdout.splitlines()[-1])
    return imported


def test_help_of_every_command_imports_no_large_packages() -> None:
    from glassllama.cli.app import app

    verbs = [str(command.name) for command in app.registered_commands]
    lines = [["--version"], ["--help"], [], *([verb, "--help"] for verb in verbs)]
    for line, modules in modules_after(*lines).items():
        assert not set(modules) & set(HEAVY), line


def test_commands_that_run_no_model_import_neither_torch_nor_numba() -> None:
    lines = [["list"], ["tokenize", "hello"], ["download", "smollm2-135m"]]
    for line, modules in modules_after(*lines).items():
        assert not {"torch", "numba"} & set(modules), line


def test_the_output_of_help_and_version() -> None:
    from glassllama import __version__

    assert run("--version").stdout == f"glassllama {__version__}\n"
    page = run("--help").stdout
    assert run().stdout == page  # no command: the help page
    assert page.split()[:2] == ["Usage:", "glassllama"]
    assert all(len(line) <= 80 for line in page.splitlines())
    for group in ("Use a model", "Train", "Inspect a model"):
        assert f"─ {group} ─" in page
    assert "│ chat " in page
    assert "--temperature" in run("chat", "-h").stdout


def test_shell_completion_offers_commands_and_models() -> None:
    def offered(words: str) -> list[str]:
        process = run(
            env={
                "_GLASSLLAMA_COMPLETE": "complete_zsh",
                "_TYPER_COMPLETE_ARGS": f"glassllama {words}",
            }
        )
        return process.stdout.split()

    assert any("tokenize" in word for word in offered("tok"))
    assert any("smollm2-135m" in word for word in offered("show smol"))
