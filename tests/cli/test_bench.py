"""`glassllama bench`: it measures what was run, and the bounds are those of the model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Verb
from glassllama.benchmark import (
    Cell,
    Grid,
    LlamaCppRunner,
    LLMRunner,
    Roofline,
    prepare,
    random_ids,
    seconds_of,
)
from glassllama.llm import LLM, load

SMALL = ("--prompt", "6,3", "--new", "2", "--runs", "1", "--context", "0,5", "--batch", "1,2")


@pytest.fixture(autouse=True)
def measure_bandwidth_with_few_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the memory bandwidth with a few megabytes instead of the size of the weights."""
    monkeypatch.setattr("glassllama.benchmark.MAX_BANDWIDTH_BYTES", 1 << 22)


def test_bench_measures_the_grid_and_its_bounds(verb: Verb, loaded: LLM, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    measured = json.loads(verb("bench", "smollm2-135m", *SMALL, "--json", "--out", out).out)
    cells = [(row["what"], row["tokens"], row["context"], row["batch"]) for row in measured["rows"]]
    assert cells == [
        ("prefill", 6, 0, 1), ("prefill", 3, 0, 1),
        ("decode", 2, 0, 1), ("decode", 2, 5, 1), ("decode", 2, 0, 2),
    ]  # fmt: skip
    weights = sum(m.nbytes for m in loaded.executor.weights.matrices)  # type: ignore[attr-defined]
    assert measured["bytes_per_token"] == weights
    assert math.isclose(measured["bound_tok_s"], measured["bandwidth"] / weights)
    assert measured["peak"] in measured["peaks"]
    assert all(row["tok_s"] > 0 and row["peers"] == [] for row in measured["rows"])
    assert json.loads(out.read_text()) == measured
    assert measured["tier"]
    assert measured["machine"]["cores"] >= measured["threads"] >= 1


def test_bench_prints_one_line_per_measurement(verb: Verb, loaded: LLM) -> None:
    table = verb("bench", "smollm2-135m", *SMALL).out
    for words in (
        "prefill 6",
        "decode 2 after 5",
        "decode 2, 2 sequences",
        "limit of decode",
        "GOP/s",
    ):
        assert words in table


def test_measurements_beyond_the_context_are_left_out_and_an_empty_grid_is_an_error(
    verb: Verb, loaded: LLM
) -> None:
    grid = Grid(prompts=[8, 9], contexts=[0, 7], batches=[1, 4], new=2, runs=1)
    assert grid.cells(8) == [Cell("prefill", 8), Cell("decode", 2), Cell("decode", 2, 0, 4)]
    ran = verb("bench", "smollm2-135m", "--prompt", "9000", "--new", "9000")
    assert ran.code == 1
    assert "8192" in ran.err


@pytest.mark.parametrize("value", ["", "1,", "a", "-1"])
def test_list_options_accept_whole_numbers_only(verb: Verb, loaded: LLM, value: str) -> None:
    assert verb("bench", "smollm2-135m", "--prompt", value).code == 2


def test_bytes_and_operations_are_those_of_the_matrices(loaded: LLM) -> None:
    """SmolLM2-135M, computed manually: 30 layers of 576 × (576 + 2·192 + 576 + 3·1536), tied
    output."""
    layer = 576 * (576 + 2 * 192 + 576 + 3 * 1536)
    roofline = Roofline.of(loaded)
    assert roofline.ops == 2 * (30 * layer + 576 * 49_152)
    assert roofline.output_ops == 2 * 576 * 49_152
    assert roofline.cache_bytes(1) == 2 * 30 * 3 * (64 * 2 + 4)
    assert roofline.numbers == "int8"
    prefill = roofline.result(Cell("prefill", 10), 1.0, [])
    assert prefill.ops_s == pytest.approx(2 * 30 * layer + 2 * 576 * 49_152 / 10)
    decode = roofline.result(Cell("decode", 4, 100, batch=2), 6.0, [2.0, 3.0])
    assert decode.bytes_s == pytest.approx(6 * (roofline.bytes / 2 + roofline.cache_bytes(102)))
    assert decode.ratio == 2.0


def test_timed_tokens_are_computed(loaded: LLM) -> None:
    """No tokens of a measurement are reused from the prefix cache."""
    ours, words = LLMRunner(loaded), loaded.executor.config.vocab_size
    for cell in (Cell("prefill", 70), Cell("decode", 4, 66), Cell("decode", 66, 0, 3)):
        prepare(ours, cell, words)
        for run in range(2):
            seconds_of(ours, cell, random_ids(cell.tokens, words, run))
            assert len(ours._sequences) == cell.batch
            for sequence in ours._sequences:
                assert ours._cache.length(sequence) == cell.context + cell.tokens
                assert ours._cache.reused(sequence) == 0


def test_the_torch_backend_is_measured_too(default_model: Path) -> None:
    pytest.importorskip("torch")
    llm = load("smollm2-135m", backend="torch", dtype="float32")
    engine = load("smollm2-135m", exact=True)
    assert Roofline.of(llm).numbers == Roofline.of(engine).numbers == "float32"
    norms = 2 * (2 * 30 + 1) * 576  # the engine counts only matrices
    assert Roofline.of(llm).ops - norms == Roofline.of(engine).ops


def test_bench_without_llama_cpp_says_what_to_install(
    verb: Verb, loaded: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    ran = verb("bench", "smollm2-135m", "--vs", "llama.cpp")
    assert ran.code == 1
    assert "pip install 'glassllama[bench]'" in ran.err


def test_llama_cpp_computes_nearly_the_same_logits(loaded: LLM) -> None:
    """llama.cpp does the measured work: its most likely tokens are mostly the same as ours."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: the bench extra")
    peer: Any = LlamaCppRunner(loaded.path, 1)
    ours = loaded.executor
    ids = loaded.encode("The capital of France is")
    peer.reset(2, 16)
    peer.prefill(ids[:2])
    peer.rewind(0)
    for row in range(2):
        peer._decode([(id, row, False) for id in ids[:-1]])
    peer._decode([(ids[-1], row, True) for row in range(2)])
    likeliest = int(loaded.logits(ids)[-1].argmax())
    assert list(peer._likeliest()) == [likeliest, likeliest]
    assert ours.config.vocab_size == peer._vocab_size
