"""The estimated memory of each way to run a checkpoint, compared with the measured peak."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest
import torch

from forks import run_script
from glassllama.base import machine
from glassllama.base.errors import MemoryShortError
from glassllama.weights import backend, load
from glassllama.weights.backend import MemoryEstimate, RunMode, estimate_memory
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import streamed_model
from tiny_models import hf_model, write_gguf, write_hf

# 75 M numbers: large enough that a layer, the model and the model in float32 differ clearly.
SHAPE = {
    "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "intermediate_size": 2816, "vocab_size": 4000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
TOKENS = 20
# The maximum of estimate - measured peak: the estimate includes imports and activations of a long
# prompt; here the prompt is short.
SLACK = 250e6


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    model = hf_model(**SHAPE).bfloat16()
    return {
        "bfloat16": write_hf(model, base / "hf"),
        "q8_0": write_gguf(model, base / "x.gguf", gguf.GGMLQuantizationType.Q8_0),
    }


@pytest.fixture(scope="module")
def checkpoint(paths: dict[str, Path]) -> Checkpoint:
    return open_checkpoint(paths["bfloat16"])


RUN = """
import sys
from glassllama.base.interfaces import NewTokens
from glassllama.weights.checkpoint import open_checkpoint
checkpoint, way = open_checkpoint(sys.argv[1]), sys.argv[2]
if way in ("engine", "q8_0", "q4_0"):
    from glassllama.weights.pack import pack
    executor = pack(checkpoint, quantize="none" if way == "engine" else way)
elif way == "streamed":
    from glassllama.weights.load import streamed_model
    from glassllama.weights.load import TorchExecutor
    executor = TorchExecutor(streamed_model(checkpoint))
else:
    import torch
    from glassllama.weights.load import load_model
    from glassllama.weights.load import TorchExecutor
    executor = TorchExecutor(load_model(checkpoint, dtype=getattr(torch, way)))
cache = executor.new_cache()
sequence = cache.add()
for _ in range(2):
    executor.forward([NewTokens(sequence, list(range(int(sys.argv[3]) // 2)))], cache)
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("bfloat16", "engine"),
        ("bfloat16", "q8_0"),
        ("bfloat16", "q4_0"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "streamed"),
        ("q8_0", "float32"),
        ("q8_0", "streamed"),
    ],
)
def test_the_measured_peak_equals_the_estimate(
    stored: str, name: RunMode, paths: dict[str, Path]
) -> None:
    expected = estimate_memory(open_checkpoint(paths[stored]), tokens=TOKENS).peaks[name]
    assert expected - SLACK <= int(run_script(RUN, paths[stored], name, TOKENS)) <= expected


def test_the_fastest_way_that_fits() -> None:
    peaks: dict[RunMode, int] = {"engine": 30, "bfloat16": 20, "float32": 40, "streamed": 10}
    best = [MemoryEstimate(free=n, peaks=peaks).best for n in (None, 30, 29, 20, 19, 10, 9)]
    assert best == ["engine", "engine", "bfloat16", "bfloat16", "streamed", "streamed", None]


def test_a_longer_context_takes_more(checkpoint: Checkpoint) -> None:
    short, long = (estimate_memory(checkpoint, tokens=n).peaks["bfloat16"] for n in (1, 1001))
    assert long - short == 1000 * 2 * 6 * 4 * 64 * 2  # keys and values, layers, heads, width, bytes


def test_advice_names_the_fastest_way_that_fits(checkpoint: Checkpoint) -> None:
    estimate = estimate_memory(checkpoint, tokens=TOKENS, memory=10**12)
    assert list(estimate.peaks)[:3] == ["engine", "q8_0", "q4_0"]
    assert estimate.advice().startswith("use backend engine: it takes")
    tight = estimate_memory(checkpoint, tokens=TOKENS, memory=estimate.peaks["q8_0"])
    assert tight.advice().startswith("use backend engine, quantize q8_0: it takes")
    assert estimate_memory(checkpoint, tokens=TOKENS, memory=1).advice().startswith("nothing fits")


def test_without_a_limit_the_fastest_way_is_advised(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "available_memory", lambda: None)
    assert estimate_memory(checkpoint, tokens=TOKENS).best == "engine"


def test_streaming_checks_memory_before_it_allocates(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 50_000_000)
    with pytest.raises(
        MemoryShortError, match=r"^one layer of hf in bfloat16 needs .* 50\.0 MB are"
    ):
        streamed_model(checkpoint)


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (399e6, r"use backend engine, quantize q4_0: it takes \d"),
        (100e6, r"nothing fits; the least is \d.*, backend engine, quantize q4_0"),
    ],
)
def test_errors_of_loading_contain_the_planners_advice(
    free: float, advice: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "available_memory", lambda: int(free))
    with pytest.raises(MemoryShortError, match=rf"^hf in float32 needs 0\.40 GB .*free; {advice}"):
        load.load_model(checkpoint, dtype=torch.float32)


def test_streaming_is_advised_if_only_a_layer_fits(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "ENGINE_ITSELF", 10**9)  # as if the packed weights were too large
    streamed = estimate_memory(checkpoint, tokens=1, memory=1).peaks["streamed"]
    monkeypatch.setattr(load, "available_memory", lambda: streamed)
    monkeypatch.setattr(load, "WORKING_MEMORY", streamed)
    with pytest.raises(MemoryShortError, match=r"use layer by layer .*stream_layers"):
        load.load_model(checkpoint, dtype=torch.float32)
