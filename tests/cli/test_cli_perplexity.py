"""Perplexity against transformers' logits, window by window."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from cli.conftest import Verb
from glassllama.base.errors import GenerationError
from glassllama.generation.perplexity import passes, score
from glassllama.llm import LLM
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model
from glassllama.weights.save import save_model
from tiny_models import META_SHAPE, hf_model, write_hf

IDS = np.random.default_rng(3).integers(2, META_SHAPE["vocab_size"], 83).tolist()
BOS = 1


@pytest.fixture(scope="module")
def oracle() -> LlamaForCausalLM:
    return hf_model(seed=5)


@pytest.fixture(scope="module")
def executor(oracle: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> TorchExecutor:
    folder = write_hf(oracle, tmp_path_factory.mktemp("model"))
    return TorchExecutor(load_model(open_checkpoint(folder)))


def expected(model: LlamaForCausalLM, window: int, stride: int, bos: int | None) -> float:
    """Negative log-likelihood of every id in the earliest window that contains it: one pass per
    window."""
    begin = [] if bos is None else [bos]
    capacity, nats, scored = window - len(begin), 0.0, 0 if begin else 1
    end = min(capacity, len(IDS))
    while scored < len(IDS):
        start = max(0, end - capacity)
        ids = torch.tensor([begin + IDS[start:end]])
        with torch.inference_mode():
            logs = model(ids).logits[0].double().log_softmax(-1)  # (T, V)
        for place in range(scored, end):
            position = len(begin) + place - start
            nats -= float(logs[position - 1, IDS[place]])
        scored, end = end, min(end + stride, len(IDS))
    return nats


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (10, 4), (83, 20), (500, 9)])
def test_the_negative_log_likelihood_of_every_id_equals_transformers(
    executor: TorchExecutor, oracle: LlamaForCausalLM, window: int, stride: int, bos: int | None
) -> None:
    came = score(executor, IDS, window=window, stride=stride, bos=bos)
    assert came.tokens == len(IDS) - (bos is None)
    assert math.isclose(came.nats, expected(oracle, window, stride, bos), rel_tol=1e-5)
    assert math.isclose(came.perplexity, math.exp(came.nats / came.tokens))
    assert math.isclose(came.bits_per_byte(100), came.nats / math.log(2) / 100)


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 30])
def test_windows_score_each_id_once_with_enough_context(length: int, has_bos: bool) -> None:
    window, stride = 8, 3
    seen = []
    for start, first, end in passes(length, window, stride, has_bos=has_bos):
        seen += range(first, end)
        assert end - start + has_bos <= window
        assert start == 0 or first - start + has_bos >= window - stride
    assert seen == list(range(0 if has_bos else 1, length))


@pytest.mark.parametrize(
    ("window", "stride", "ids"),
    [(1, 1, IDS), (131_073, 1, IDS), (8, 8, IDS), (8, 0, IDS), (8, 4, []), (8, 4, [5])],
)
def test_invalid_windows_and_texts_are_errors(
    executor: TorchExecutor, window: int, stride: int, ids: list[int]
) -> None:
    with pytest.raises(GenerationError):
        score(executor, ids, window=window, stride=stride)


def test_nan_weights_are_an_error(executor: TorchExecutor) -> None:
    weight = executor.model.norm.weight
    kept = weight.clone()
    weight.data[0] = torch.nan
    try:
        with pytest.raises(GenerationError, match="not finite"):
            score(executor, IDS, window=16, stride=8)
    finally:
        weight.data.copy_(kept)


def test_the_default_window_is_no_longer_than_the_context(verb: Verb, tmp_path: Path) -> None:
    text, folder, tokenizer = tmp_path / "text.txt", tmp_path / "m", CharTokenizer("\n abcdefghij")
    text.write_text("a bad cab " * 20)
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 32}
    model = GPT(GPTConfig(dim=12, n_layers=1, n_heads=3, ffn_dim=20, **shape))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(folder, model, tokenizer)
    ran = verb("perplexity", folder, "-f", text, "--json")
    assert ran.code == 0, ran.err
    assert [json.loads(ran.out)[key] for key in ("window", "stride")] == [32, 16]
    assert "got 33" in verb("perplexity", folder, "-f", text, "--window", "33").err
    assert "512, or the model's context" in " ".join(verb("perplexity", "-h").out.split())


def test_perplexity_of_english_is_lower_than_of_noise(
    verb: Verb, loaded: LLM, tmp_path: Path
) -> None:
    english, noise = tmp_path / "english.txt", tmp_path / "noise.txt"
    english.write_text("The sun rises in the east and sets in the west. " * 3)
    noise.write_text("east the in The and sun west rises sets. the in " * 3)
    small = ("--window", "64", "--json")
    read = {
        path: json.loads(verb("perplexity", "smollm2-135m", "--file", path, *small).out)
        for path in (english, noise)
    }
    assert read[english]["perplexity"] < read[noise]["perplexity"]
    first = len(loaded.tokenizer.token_bytes(loaded.encode(english.read_text())[0]))
    assert (
        read[english]["bytes"] == len(english.read_bytes()) - first
    )  # this model has no begin token
    nats = math.log(read[english]["perplexity"]) * read[english]["tokens"]
    bits = nats / math.log(2) / read[english]["bytes"]
    assert math.isclose(read[english]["bits_per_byte"], bits)
    assert "perplexity " in verb("perplexity", "smollm2-135m", "-f", english, "--tokens", "9").out
