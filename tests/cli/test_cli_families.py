"""`show`, `validate`, `perplexity`, `bench` and `walkthrough` for all families, in both formats."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Verb
from glassllama import benchmark
from glassllama.native import roofline
from glassllama.weights.checkpoint import open_checkpoint
from parity.test_families import GGUF
from tiny_families import FAMILIES, SHOWN, family_model, write_model
from tokenizers import Tokenizer
from tolerances import logits_tolerance
from walkthrough.conftest import PROSE, byte_level_tokenizer

CASES = [(name, "hf") for name in FAMILIES] + [(name, "gguf") for name in GGUF]
TEXT = PROSE[:160]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


def model_of(name: str, file_format: str, tokenizer: Tokenizer) -> Any:
    changes = GGUF[name] if file_format == "gguf" else {}
    size = tokenizer.get_vocab_size()
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return family_model(name, vocab_size=size, **ends, **changes)


@pytest.mark.parametrize(("name", "file_format"), CASES)
def test_show_validate_and_perplexity(
    name: str, file_format: str, tokenizer: Tokenizer, verb: Verb, tmp_path: Path
) -> None:
    model = model_of(name, file_format, tokenizer)
    path = write_model(model, name, tmp_path, file_format, tokenizer)
    shown, facts = verb("show", path), json.loads(verb("show", path, "--json").out)
    assert (shown.code, shown.err) == (0, "")
    assert all(words in shown.out for words in SHOWN[name])
    assert facts["parameters"] == model.num_parameters()
    valid = json.loads(verb("validate", path, "--json").out)
    assert valid["problems"] == []
    assert "numbers: all finite, no tensor of zeros" in valid["checked"]

    config = open_checkpoint(path).config
    text, part = (
        tmp_path / "text.txt",
        TEXT[: config.max_seq_len],
    )  # a token has a character or more
    text.write_text(part)
    ids = tokenizer.encode(part).ids
    with torch.inference_mode():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = -float(sum(logs[n, id] for n, id in enumerate(ids[1:])))
    for options in (["--exact"], ["--backend", "torch"]):
        scored = json.loads(verb("perplexity", path, "-f", text, "--json", *options).out)
        assert scored["tokens"] == len(ids) - 1
        # A logit has at most a relative error of the tolerance; a loss the same of two.
        bar = 2 * logits_tolerance(config) * float(logs.abs().max())
        assert math.log(scored["perplexity"]) == pytest.approx(nats / (len(ids) - 1), abs=bar)


@pytest.mark.parametrize(("name", "file_format"), CASES)
def test_validate_finds_nan_and_zeroed_tensors(
    name: str, file_format: str, tokenizer: Tokenizer, verb: Verb, tmp_path: Path
) -> None:
    model = model_of(name, file_format, tokenizer)
    block = model.model.layers[2]
    width = model.config.num_attention_heads * model.config.head_dim
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
        block.mlp.down_proj.weight[1, 2] = torch.inf
        fused = getattr(block.self_attn, "qkv_proj", None)
        (block.self_attn.q_proj.weight if fused is None else fused.weight[:width]).zero_()
    ran = verb("validate", write_model(model, name, tmp_path, file_format, tokenizer), "--json")
    problems = json.loads(ran.out)["problems"]
    assert ran.code == 1
    assert [problem.partition(": ")[2] for problem in problems[:3]] == [
        "all zeros", "0 NaN and 1 infinite numbers", "1 NaN and 0 infinite numbers",
    ]  # fmt: skip
    assert len(problems) == 3
    assert ("(layers.2.attention.wq.weight)" in problems[0]) == (fused is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_validate_finds_swapped_and_missing_tensors(
    name: str, tokenizer: Tokenizer, verb: Verb, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    path = write_model(model_of(name, "hf", tokenizer), name, tmp_path, "hf", tokenizer)
    tensors = load_file(path / "model.safetensors")
    up = "gate_up_proj" if name.startswith("phi3") else "up_proj"
    one, other = (f"model.layers.1.mlp.{part}.weight" for part in (up, "down_proj"))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors")
    ran = verb("validate", path, "--json")
    [problem] = json.loads(ran.out)["problems"]
    assert ran.code == 1
    assert all(name in problem for name in (one, other, "model.norm.weight"))


# One of each architecture; `Roofline` reads the plan, so that the format of the file is no matter.
MEASURED = ["mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "smollm3", "phi3", "olmo2",
            "granite"]  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_bench(
    name: str, tokenizer: Tokenizer, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "MAX_BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "peaks", measured_once)
    model = model_of(name, "hf", tokenizer)
    path = write_model(model, name, tmp_path, "hf", tokenizer)
    options = ("--prompt", 12, "--new", 2, "--context", "0,9", "--runs", 1, "--json")
    measured = json.loads(verb("bench", path, *options).out)
    assert [(row["what"], row["tokens"], row["context"]) for row in measured["rows"]] == [
        ("prefill", 12, 0), ("decode", 2, 0), ("decode", 2, 9),
    ]  # fmt: skip
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    tables = model.get_input_embeddings().weight.numel()
    tied = model.config.tie_word_embeddings
    assert measured["ops_per_token"] == 2 * (matrices - (0 if tied else tables))
    # 10 tokens of context on average, but no layer reads more than its window from the cache.
    plan = open_checkpoint(path).layer_plan
    read = sum(min(10, b.attention.window or 10) * b.attention.kv_bytes(2, 4) for b in plan.blocks)
    last = measured["rows"][2]
    per_token = measured["bytes_per_token"] + read
    assert last["bytes_s"] == pytest.approx(last["tok_s"] * per_token)


measured_once = functools.cache(roofline.peaks)


@pytest.mark.parametrize(("name", "file_format"), [("gemma2", "hf"), ("phi3 longrope", "gguf")])
def test_walkthrough(
    name: str, file_format: str, tokenizer: Tokenizer, verb: Verb, tmp_path: Path
) -> None:
    path = write_model(
        model_of(name, file_format, tokenizer), name, tmp_path, file_format, tokenizer
    )
    text = verb("walkthrough", "lambda forms", "-m", path, "--layer", 2)
    assert (text.code, text.err) == (0, "")
    assert "✓ layers.0 … layers.3" in text.out
    wrong = verb("walkthrough", "lambda forms", "-m", path, "--rope-layout", "wrong")
    assert "RoPE rotates the wrong coordinates" in wrong.out
    page = tmp_path / "page.html"
    assert verb("walkthrough", "lambda", "-m", path, "--html", page).code == 0
    assert page.stat().st_size > 100_000
