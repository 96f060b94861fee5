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


@pytest.fixture(scope="module")
def checkpoint(default_model: Path) -> Iterator[Checkpoint]:
    opened = open_weights(default_model)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def oracle(default_model: Path) -> Any:
    """transformers' model and tokenizer, made from the same file in float32."""
    where = {"pretrained_model_name_or_path": default_model.parent, "gguf_file": default_model.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**where)


@torch.no_grad()
def would_write(model: Any, ids: list[int], start: int, never: set[int]) -> list[int]:
    """transformers' likeliest id after each prefix of `ids` from `start` on, in one pass.

    If all of them are the ids that follow, its greedy text is this text: by induction.
    """
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    logits[:, list(never)] = -torch.inf
    return logits.argmax(-1).tolist()


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


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_greedy_text_is_identical(
    backend: str, checkpoint: Checkpoint, oracle: Any, parity: Any
) -> None:
    executor: Executor
    if backend == "torch":
        executor = TorchExecutor(load_llama(checkpoint, dtype=torch.float32))
    else:
        executor = pack(checkpoint, exact=True)
    model, tokenizer = oracle
    ends = {int(checkpoint.file.metadata["tokenizer.ggml.eos_token_id"])}
    different = 0
    for prompt in PROMPTS:
        start = checkpoint.tokenizer.encode(prompt, specials=True)
        assert start == tokenizer(prompt, add_special_tokens=False).input_ids
        ids = greedy(executor, start, LENGTH, ends)
        different += would_write(model, ids, len(start), ends) != ids[len(start) :]
    parity(f"greedy text, 12 × {LENGTH} ids, {backend} exact", "transformers", 0, different)
    assert different == 0
