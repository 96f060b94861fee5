"""Beyond a full context, every backend equals a loop that computes each window from scratch.

Tests of the scheduler alone are in test_scheduler.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np
import pytest

from glassllama.base.interfaces import Executor
from glassllama.generation import GenerationSettings, TokenEvent, generate, make_sampler
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model
from glassllama.weights.pack import pack
from rows import Rows
from tiny_models import META_SHAPE, hf_model, write_gguf

CONTEXT, BOS = 24, 1
PROMPTS = [[BOS, *range(20, 30)], [7, 8, 9] * 7, [BOS]]
# Two float32 computations of the same logits differ by the rounding of sums of up to 140 products
# in each of 3 layers of about 10 products in a row, of numbers as large as the largest logit.
ROUNDINGS = 140 * 3 * 10


@pytest.fixture(scope="module")
def executors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Executor]:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    opened = open_checkpoint(
        write_gguf(hf_model(**META_SHAPE), path, gguf.GGMLQuantizationType.F32)
    )
    return {"engine": pack(opened, threads=1), "torch": TorchExecutor(load_model(opened))}


def from_scratch(executor: Executor, windows: list[list[int]]) -> np.ndarray:
    """(B, V) logits after every window, each computed in an empty cache."""
    return Rows(executor, len(windows)).next_logits(windows).copy()


def windows(prompt: Sequence[int], answer: Sequence[int]) -> list[list[int]]:
    """The tokens visible to the model before each id of the answer."""
    window, seen = list(prompt), []
    for id in answer:
        if len(window) == CONTEXT:
            start = int(window[0] == BOS)
            del window[start : start + (CONTEXT - start) // 2]
        seen.append([*window])
        window.append(id)
    return seen


def ids_of(steps: Sequence[TokenEvent], row: int = 0) -> list[int]:
    return [step.id for step in steps if step.row == row]


def past_it(**more: Any) -> GenerationSettings:
    fields = {"max_tokens": 2 * CONTEXT + 9, "on_overflow": "shift", "context": CONTEXT}
    return GenerationSettings(**{**fields, "bos": BOS, **more})


@pytest.mark.parametrize("prompt", PROMPTS, ids=["bos", "no bos", "short"])
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_every_id_is_the_most_likely_after_its_window(
    executors: dict[str, Executor], name: str, prompt: list[int]
) -> None:
    executor = executors[name]
    steps = list(generate(executor, [prompt], past_it(speculation=False)))
    answer = ids_of(steps)
    assert len(answer) == 2 * CONTEXT + 9
    logits = from_scratch(executor, windows(prompt, answer))  # (B, V)
    slack = 0.0  # the engine's logits are bit-identical for every division of the ids
    if name == "torch":
        slack = ROUNDINGS * np.finfo(np.float32).eps * float(np.abs(logits).max())
    assert (logits[range(len(answer)), answer] >= logits.max(axis=1) - slack).all()
    dropped = len(prompt) + len(answer) - 1 - len(windows(prompt, answer)[-1])
    assert steps[-1].dropped_tokens == dropped > CONTEXT / 2


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.2, "seed": 3}])
def test_the_engine_shifts_equally_alone_in_a_batch_and_with_speculation(
    executors: dict[str, Executor], sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine is sometimes slow, which must not end the speculation.
    monkeypatch.setattr("glassllama.generation.speculation.RISE", 1.0)
    sampler = make_sampler(**sampling)
    engine, chosen = executors["engine"], past_it(sampler=sampler, logprobs=2)
    together, drafted = list(generate(engine, PROMPTS, chosen)), 0
    for row, prompt in enumerate(PROMPTS):
        plain = list(generate(engine, [prompt], past_it(sampler=sampler, logprobs=2,
                                                        speculation=False)))  # fmt: skip
        guessing = generate(engine, [prompt], chosen)
        assert list(guessing) == plain
        assert ids_of(together, row) == ids_of(plain)
        drafted += guessing.timings.drafted
    assert drafted > 0
