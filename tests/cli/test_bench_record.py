"""benchmarks/RECORD.md is generated from the stored results, and its verdicts are right."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from synthetic_models import BENCHMARKS, module


@pytest.fixture(scope="module")
def record() -> ModuleType:
    return module("record_page")


def test_the_record_is_up_to_date(record: ModuleType) -> None:
    assert (BENCHMARKS / "RECORD.md").read_text() == record.page(), "run benchmarks/record.py"


def test_every_result_belongs_to_one_measurement(record: ModuleType) -> None:
    names = [line.name for line in record.LINES]
    assert len(names) == len(set(names))
    assert {path.stem for path in record.RESULTS.glob("*.json")} <= set(names)


@pytest.mark.parametrize(
    ("ratio", "share", "either", "message"),
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
    record: ModuleType, ratio: float | None, share: float | None, either: bool, message: str
) -> None:
    assert record.Target(2.0, 0.75, either=either).verdict(ratio, share) == message


def test_targets_of_rows(record: ModuleType) -> None:
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


def test_targets_against_ik_llama_cpp(record: ModuleType) -> None:
    lines = {line.name: line for line in record.LINES}

    def least(name: str, what: str) -> float | None:
        found = record.fork_target(lines[f"ik-{name}"], what)
        return None if found is None else found.ratio

    assert least("smollm2-135m", "decode") == 2.0
    assert least("135m-Q4_0", "decode") == 1.5
    assert least("8b-Q4_K_M", "decode") == 1.4
    assert least("1b-Q8_0", "decode") is None
    assert [least(f"{shape}-BF16", "prefill") for shape in ("135m", "1b")] == [1.2, 1.2]
    assert [least(name, "prefill") for name in ("smollm2-135m", "8b-Q4_0")] == [1.7, 1.3]


@pytest.mark.parametrize(
    ("beyond", "different", "verdicts"), [(0, 0, 0), (1, 0, 1), (0, 3, 1), (2, 1, 2)]
)
def test_agreement(record: ModuleType, beyond: int, different: int, verdicts: int) -> None:
    line = next(line for line in record.LINES if line.name == "agreement")
    row = {"prompt": "a|b", "place": 4, "texts": ["x", "\n"], "gaps": 0.5,
           "ours": [2.0, 1.75], "llama.cpp": [1.5, 1.75]}  # fmt: skip
    found = {"ids": 48, "different": 1, "sigma": 0.1, "tie": 0.566, "no_ties": beyond}
    text = record.agreement_part(line, {
        "greedy": {"as stored": found | {"rows": [row]}},
        "perplexity": {"text": "a play", "tokens": 900, "window": 512,
                       "values": {"exact": 20.5}, "more": {"as stored": [-0.001, 0.002]}},
        "tokenizer": [{"corpus": "code", "specials": True, "texts": 7, "characters": 1000,
                       "different": different}],
    })  # fmt: skip
    assert text.count("**not met**") == verdicts
    assert '| `"a\\|b"` | 5 | `"x"`, `"\\n"` | 2.000, 1.750 | 1.500, 1.750 | 0.500 |' in text
    assert "exact 20.5000" in text
    assert "as stored -0.100% ± 0.200%" in text


STAND_IN = """#!{python}
import json, sys
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("a line that is not JSON")
print(json.dumps([
    {{"n_prompt": int(asked["-p"]), "n_gen": 0, "avg_ts": 200.0 + int(asked.get("-rtr", 0))}},
    {{"n_prompt": 0, "n_gen": int(asked["-n"]), "avg_ts": 20.0}},
]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="scripts are not executable on Windows")
def test_the_output_of_llama_bench_is_parsed(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    theirs = module("llama_bench").theirs
    assert theirs(str(program), tmp_path / "x.gguf", "") == (200.0, 20.0)
    assert theirs(str(program), tmp_path / "x.gguf", "-rtr 1") == (201.0, 20.0)
