"""Complete answers against transformers' generate, on tiny random Llamas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glassllama.base.interfaces import Executor
from glassllama.generation import GenerationSettings, TokenEvent, generate, make_sampler
from glassllama.generation.sampler import History
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model
from tiny_models import hf_model, write_hf
from tolerances import assert_same_greedy, logits_tolerance

PROMPTS = [[5], [17, 3, 88, 120, 4, 4, 9], [99] * 23]
NEW = 24


@pytest.fixture(scope="module")
def oracle() -> LlamaForCausalLM:
    return hf_model(seed=4)


@pytest.fixture(scope="module")
def executor(oracle: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Executor:
    folder: Path = write_hf(oracle, tmp_path_factory.mktemp("oracle"))
    return TorchExecutor(load_model(open_checkpoint(folder)))


def theirs(oracle: LlamaForCausalLM, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        | options,
    )
    return out[0, len(prompt) :].tolist()


def rows_of(steps: list[TokenEvent]) -> list[list[int]]:
    return [[step.id for step in steps if step.row == row] for row in range(len(PROMPTS))]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@torch.no_grad()
def test_greedy_answers_are_transformers_answers(
    oracle: LlamaForCausalLM, executor: Executor, penalty: float, parity: Any
) -> None:
    settings = GenerationSettings(sampler=make_sampler(repetition_penalty=penalty), max_tokens=NEW)
    ours = rows_of(list(generate(executor, PROMPTS, settings)))
    expected = [theirs(oracle, prompt, repetition_penalty=penalty) for prompt in PROMPTS]
    processor = RepetitionPenaltyLogitsProcessor(penalty)

    def next_logits(ids: list[int]) -> np.ndarray:
        raw = oracle(torch.tensor([ids])).logits[:, -1]
        return processor(torch.tensor([ids]), raw).numpy()

    bar = logits_tolerance(executor.config)
    for prompt, mine, other in zip(PROMPTS, ours, expected, strict=True):
        assert_same_greedy(mine, other, prompt, next_logits, bar)
    claim = f"greedy answers with penalty {penalty}, different but for near ties"
    parity(claim, "transformers generate, one by one", 0, 0)


def test_stop_ids_end_where_transformers_ends(oracle: LlamaForCausalLM, executor: Executor) -> None:
    stop = theirs(oracle, PROMPTS[1])[6]
    settings = GenerationSettings(max_tokens=NEW, stop_ids=frozenset([stop]))
    ours = rows_of(list(generate(executor, PROMPTS, settings)))
    assert ours == [theirs(oracle, prompt, eos_token_id=stop) for prompt in PROMPTS]
    assert any(len(ids) < NEW for ids in ours)


@torch.no_grad()
@pytest.mark.identical("what the samplers keep", "transformers logits processors")
def test_sampling_uses_the_distribution_of_transformers(
    oracle: LlamaForCausalLM, executor: Executor
) -> None:
    """At each step of a sampled answer, transformers' processors allow the id."""
    sampler = make_sampler(temperature=0.8, top_k=20, top_p=0.8, repetition_penalty=1.2, seed=3)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.8),
        ]
    )
    settings = GenerationSettings(sampler=sampler, max_tokens=NEW, logprobs=0)
    ids, kept = list(PROMPTS[1]), []
    history = History(ids, executor.config.vocab_size)
    for step in generate(executor, [ids], settings):
        raw = oracle(torch.tensor([ids])).logits[:, -1]
        expected = processors(torch.tensor([ids]), raw)[0].softmax(-1).numpy()
        ours = raw[0].numpy()
        for one in sampler.steps:
            ours = one(ours, history)
        np.testing.assert_array_equal(np.isfinite(ours), expected > 0)
        assert expected[step.id] > 0
        bound = 2 * logits_tolerance(executor.config) * float(raw.abs().max())
        assert abs(step.logprob - raw[0].log_softmax(-1)[step.id].item()) <= bound
        kept.append(int((expected > 0).sum()))
        history.add(step.id)
        ids.append(step.id)
    assert min(kept) < max(kept) <= 20, "the filters had an effect"


@pytest.mark.parametrize("seed", [1, 2])
def test_same_seed_same_ids_alone_and_in_a_batch(executor: Executor, seed: int) -> None:
    sampler = make_sampler(temperature=1.0, top_p=0.95, seed=seed)
    settings = GenerationSettings(sampler=sampler, max_tokens=NEW)
    together = rows_of(list(generate(executor, PROMPTS, settings)))
    for prompt, ids in zip(PROMPTS, together, strict=True):
        assert [step.id for step in generate(executor, [prompt], settings)] == ids
