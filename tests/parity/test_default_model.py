"""The real model's text, id for id, against transformers reading the same file in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glassllama.base.interfaces import Executor
from glassllama.models.llama import Llama
from glassllama.weights.load import TorchExecutor, load_llama
from glassllama.weights.open import Checkpoint, open_weights
from glassllama.weights.pack import pack

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are:\n1.",
    "Question: Why is the sky blue?\nAnswer:",
    "Die Hauptstadt von Deutschland heißt",
    "1, 1, 2, 3, 5, 8, 13,",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name FROM users WHERE",
    "In 1969, Neil Armstrong",
    "日本の首都は",
]
LENGTH = 48
# Largest error of a logit against float64. The bar was 1e-4 against the float32 reference, which
# cannot be: its own rounding on this model reaches 1.8e-4, on logits of up to 45 (the engine's
# reaches 1.0e-4). So both are held against float64, and the engine to be the closer one.
EXACT_BAR = 2e-4


@pytest.fixture(scope="module")
def checkpoint(default_model: Path) -> Iterator[Checkpoint]:
    opened = open_weights(default_model)
    yield opened
    opened.close()


def would_write(logits: np.ndarray, start: int, never: int) -> list[int]:
    """The likeliest id after each prefix from `start` on, by one pass over a whole text.

    If all of them are the ids that follow, the greedy text is this text: by induction.
    """
    logits = logits[start - 1 : -1].copy()
    logits[:, never] = -np.inf
    return [int(i) for i in logits.argmax(-1)]


def greedy(executor: Executor, prompt: list[int], count: int, never: set[int]) -> list[int]:
    """The likeliest id, again and again; `never` are the ends that transformers holds back."""
    cache = executor.new_cache(1, len(prompt) + count)
    ids, new = list(prompt), list(prompt)
    for _ in range(count):
        logits = executor.next_logits([new], cache)[0].copy()
        logits[list(never)] = -np.inf
        new = [int(logits.argmax())]
        ids += new
    return ids


@pytest.fixture(scope="module")
def texts(checkpoint: Checkpoint) -> list[tuple[int, list[int]]]:
    """What the exact engine writes: where the answer starts, and all ids, for each prompt."""
    executor = pack(checkpoint, exact=True)
    prompts = [checkpoint.tokenizer.encode(prompt, specials=True) for prompt in PROMPTS]
    ends = {end_of(checkpoint)}
    return [(len(prompt), greedy(executor, prompt, LENGTH, ends)) for prompt in prompts]


def end_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.file.metadata["tokenizer.ggml.eos_token_id"])


def test_greedy_text_is_what_transformers_writes(
    checkpoint: Checkpoint, texts: list[tuple[int, list[int]]], default_model: Path, parity: Any
) -> None:
    where = {"pretrained_model_name_or_path": default_model.parent, "gguf_file": default_model.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**where)
    different = 0
    for prompt, (start, ids) in zip(PROMPTS, texts, strict=True):
        assert ids[:start] == tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        different += would_write(logits, start, end_of(checkpoint)) != ids[start:]
    parity(f"greedy text, 12 × {LENGTH} ids, engine exact", "transformers", 0, different)
    assert different == 0


def in_float64(model: Llama, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The reference's logits without rounding to speak of: its float32 islands widened as well."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model(torch.tensor([ids]))[0].numpy()


def test_the_reference_model_writes_it_too(
    checkpoint: Checkpoint,
    texts: list[tuple[int, list[int]]],
    parity: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = TorchExecutor(load_llama(checkpoint, dtype=torch.float32))
    wide = load_llama(checkpoint, dtype=torch.float32).double()
    engine = pack(checkpoint, exact=True)
    different, errors = 0, {"engine": 0.0, "reference": 0.0}
    for start, ids in texts:
        truth = in_float64(wide, ids, monkeypatch)
        by_torch = reference.all_logits(ids, reference.new_cache(1, len(ids)))
        by_engine = engine.all_logits(ids, engine.new_cache(1, len(ids)))
        different += would_write(by_torch, start, end_of(checkpoint)) != ids[start:]
        for name, logits in (("reference", by_torch), ("engine", by_engine)):
            errors[name] = max(errors[name], float(np.abs(logits - truth).max()))
    parity(f"greedy text, 12 × {LENGTH} ids, engine exact", "models/llama.py", 0, different)
    for name, error in errors.items():
        parity(f"logits of up to 45, {name} in float32", "the same in float64", EXACT_BAR, error)
    assert different == 0
    assert max(errors.values()) <= EXACT_BAR
    assert errors["engine"] <= errors["reference"]
