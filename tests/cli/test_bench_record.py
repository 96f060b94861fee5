"""benchmarks/RECORD.md is what is made of the lines that are there; verdicts are right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_page", BENCHMARKS / "record_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["record_page"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_record_is_not_stale(record: ModuleType) -> None:
    assert (BENCHMARKS / "RECORD.md").read_text() == record.page(), "run benchmarks/record.py"


def test_every_line_is_there_once_and_none_is_left_over(record: ModuleType) -> None:
    names = [line.name for line in record.LINES]
    assert len(names) == len(set(names))
    assert {path.stem for path in record.RESULTS.glob("*.json")} <= set(names)


@pytest.mark.parametrize(
    ("ratio", "share", "either", "said"),
    [
        (2.1, 0.1, True, "met"),
        (1.9, 0.9, True, "met"),
        (1.9, 0.1, True, "**not met**"),
        (2.1, 0.9, False, "met"),
        (1.9, 0.1, False, "**not met**"),
        (2.1, 0.1, False, "ratio met, bound **not met**"),
        (None, None, False, "–"),
    ],
)
def test_verdicts(
    record: ModuleType, ratio: float | None, share: float | None, either: bool, said: str
) -> None:
    assert record.Target(2.0, 0.75, either=either).verdict(ratio, share) == said


def test_targets_are_for_the_rows_that_they_name(record: ModuleType) -> None:
    lines = {line.name: line for line in record.LINES}

    def ratio(name: str, **row: Any) -> float | None:
        whole = {"what": "decode", "tokens": 64, "context": 0, "batch": 1} | row
        found = record.target(lines[name], whole)
        return None if found is None else found.ratio

    assert ratio("smollm2-135m") == 3.0
    assert ratio("smollm2-135m", context=4096) == 1.5
    assert ratio("smollm2-135m", context=1024) is None
    assert ratio("smollm2-135m", batch=8) == ratio("1b-Q8_0", batch=8) == 2.0
    assert ratio("8b-Q4_K_M") == ratio("1b-Q4_0") == 1.4
    assert ratio("8b-Q4_0", what="prefill", tokens=512) == 2.0
    assert ratio("1b-BF16", what="prefill", tokens=512) == 1.2
    assert ratio("1b-BF16") is None
