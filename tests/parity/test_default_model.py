"""The default model's text, id by id, against transformers with the same file in float32."""

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
from glassllama.weights.load import TorchExecutor, load_model
from glassllama.weights.pack import pack
from long_mode import LONG
from rows import Rows
from tolerances import count_near_ties, difference, float64_logits, logits_tolerance

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
TIES = (
    2  # of 576 ids: two float32 computations may differ if the two most likely ids are that close
)


@pytest.fixture(scope="module")
def checkpoint(default_model: Path) -> Iterator[Checkpoint]:
    opened = open_checkpoint(default_model)
    yield opened
    opened.close()


def near_ties(logits: np.ndarray, start: int, ids: list[int], never: int, bar: float) -> int:
    """Count the ids from `start` on that are not the most likely after those before them, but
    nearly tie with it, by one pass over the whole text; fails if the difference is larger than
    rounding.

    If there are none, the greedy text equals this text, by induction.
    """
    before = logits[start - 1 : -1].copy()
    before[:, never] = -np.inf
    return count_near_ties(before, ids[start:], bar)


def greedy(executor: Executor, prompts: list[list[int]], count: int, never: int) -> list[list[int]]:
    """The most likely id, repeatedly; `never` is the end token that transformers suppresses."""
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
    """The output of the exact engine: the start of the answer and all ids, for each prompt."""
    prompts = [checkpoint.tokenizer.encode(prompt, specials=True) for prompt in PROMPTS]
    written = greedy(pack(checkpoint, exact=True), prompts, LENGTH, end_of(checkpoint))
    return [(len(prompt), ids) for prompt, ids in zip(prompts, written, strict=True)]


def end_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.file.metadata["tokenizer.ggml.eos_token_id"])


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache metadata: transformers would read it three times and build a table for each tensor."""
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))


@pytest.mark.usefixtures("read_once")
def test_greedy_text_equals_that_of_transformers(
    checkpoint: Checkpoint, texts: list[tuple[int, list[int]]], default_model: Path, parity: Any
) -> None:
    where = {"pretrained_model_name_or_path": default_model.parent, "gguf_file": default_model.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**where)
    bar, tied = logits_tolerance(checkpoint.config), 0
    for prompt, (start, ids) in zip(PROMPTS, texts, strict=True):
        assert ids[:start] == tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        tied += near_ties(logits, start, ids, end_of(checkpoint), bar)
    parity(GREEDY, "transformers", TIES, tied)
    assert tied <= TIES


def test_the_reference_model_gives_the_same_text(
    checkpoint: Checkpoint, texts: list[tuple[int, list[int]]], parity: Any
) -> None:
    """The logits of both are within rounding of float64, for every third text."""
    model = load_model(checkpoint, dtype=torch.float32)
    reference, engine = TorchExecutor(model), pack(checkpoint, exact=True)
    double = float64_logits(model)
    bar, tied, errors = logits_tolerance(checkpoint.config), 0, {"engine": 0.0, "reference": 0.0}
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
