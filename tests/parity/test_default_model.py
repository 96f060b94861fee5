"""The real model's text, id for id, against transformers reading the same file in float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glassllama.base.interfaces import Executor
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import load_model
from glassllama.weights.pack import pack
from glassllama.weights.torch_executor import TorchExecutor
from long_mode import LONG
from rows import Rows
from tolerances import difference, logits_bar, ties, widened

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
][:: 1 if LONG else 2]
LENGTH = 48
GREEDY = f"greedy text, {len(PROMPTS)} × {LENGTH} ids, engine exact: near ties"
TIES = 2  # of 576 ids: two float32 computations part where the two likeliest ids are that close


@pytest.fixture(scope="module")
def checkpoint(default_model: Path) -> Iterator[Checkpoint]:
    opened = open_checkpoint(default_model)
    yield opened
    opened.close()


def near_ties(logits: np.ndarray, start: int, ids: list[int], never: int, bar: float) -> int:
    """How many ids from `start` on are not the likeliest after those before them, by one pass over
    the whole text, but a near tie with it; fails where one is further away than rounding explains.

    If there is none, the greedy text is this text: by induction.
    """
    before = logits[start - 1 : -1].copy()
    before[:, never] = -np.inf
    return ties(before, ids[start:], bar)


def greedy(executor: Executor, prompts: list[list[int]], count: int, never: int) -> list[list[int]]:
    """The likeliest id, again and again; `never` is the end that transformers holds back."""
    cache = Rows(executor, len(prompts))
    texts, new = [list(prompt) for prompt in prompts], prompts
    for _ in range(count):
        logits = cache.next_logits(new).copy()
        logits[:, never] = -np.inf
        new = [[int(row.argmax())] for row in logits]
        texts = [text + ids for text, ids in zip(texts, new, strict=True)]
    return texts


@pytest.fixture(scope="module")
def texts(checkpoint: Checkpoint) -> list[tuple[int, list[int]]]:
    """What the exact engine writes: where the answer starts, and all ids, for each prompt."""
    prompts = [checkpoint.tokenizer.encode(prompt, specials=True) for prompt in PROMPTS]
    written = greedy(pack(checkpoint, exact=True), prompts, LENGTH, end_of(checkpoint))
    return [(len(prompt), ids) for prompt, ids in zip(prompts, written, strict=True)]


def end_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.file.metadata["tokenizer.ggml.eos_token_id"])


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has the file's metadata read three times, and a table made for each tensor."""
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))


@pytest.mark.usefixtures("read_once")
def test_greedy_text_is_what_transformers_writes(
    checkpoint: Checkpoint, texts: list[tuple[int, list[int]]], default_model: Path, parity: Any
) -> None:
    where = {"pretrained_model_name_or_path": default_model.parent, "gguf_file": default_model.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**where)
    bar, tied = logits_bar(checkpoint.config), 0
    for prompt, (start, ids) in zip(PROMPTS, texts, strict=True):
        assert ids[:start] == tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        tied += near_ties(logits, start, ids, end_of(checkpoint), bar)
    parity(GREEDY, "transformers", TIES, tied)
    assert tied <= TIES


def test_the_reference_model_writes_it_too(
    checkpoint: Checkpoint, texts: list[tuple[int, list[int]]], parity: Any
) -> None:
    """And the logits of both are within rounding of the same in float64, for every third text."""
    model = load_model(checkpoint, dtype=torch.float32)
    reference, engine = TorchExecutor(model), pack(checkpoint, exact=True)
    double = widened(model)
    bar, tied, errors = logits_bar(checkpoint.config), 0, {"engine": 0.0, "reference": 0.0}
    for n, (start, ids) in enumerate(texts):
        logits = {"reference": Rows(reference).all_logits(ids)}
        tied += near_ties(logits["reference"], start, ids, end_of(checkpoint), bar)
        if n % 3 == 0:
            logits["engine"] = Rows(engine).all_logits(ids)
            truth = double(torch.tensor([ids]))[0]
            for name in logits:
                errors[name] = max(errors[name], difference(logits[name], truth))
    parity(GREEDY, "models/llama.py", TIES, tied)
    for name, error in errors.items():
        parity(f"logits, {name} in float32, of the largest", "the same in float64", bar, error)
    assert tied <= TIES
    assert max(errors.values()) <= bar
