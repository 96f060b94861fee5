"""Speculation: the lookup against its definition, and answers that stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import NewTokens
from glassllama.generation import Generation, GenerationSettings, TokenEvent, generate, make_sampler
from glassllama.generation.speculation import GRAMS, TIMES, Lookup, Speculation
from glassllama.native.engine.executor import Engine
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.pack import pack
from rows import Rows
from tiny_models import META_SHAPE, hf_model, write_gguf

WIDE = {
    **META_SHAPE, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 40, "intermediate_size": 160, "vocab_size": 203,
}  # fmt: skip


def plain_lookup(ids: Sequence[int]) -> tuple[int, int]:
    """(position, matched) by the definition: continue the previous match, else the latest earlier
    n-gram."""
    place = matched = 0
    for end in range(1, len(ids) + 1):
        if matched and ids[place] == ids[end - 1]:
            place, matched = place + 1, matched + 1
        else:
            place = matched = 0
        for size in GRAMS:
            earlier = [n for n in range(size, end) if ids[n - size : n] == ids[end - size : end]]
            if matched < size <= end and earlier:
                place, matched = earlier[-1], size
    return place, matched


@given(st.lists(st.integers(0, 3), max_size=40))
def test_the_lookup_follows_its_definition(ids: list[int]) -> None:
    lookup = Lookup(ids)
    assert (lookup.position, lookup.matched) == plain_lookup(ids)
    if lookup.matched:
        matched, place = lookup.matched, lookup.position
        assert ids[place - matched : place] == ids[len(ids) - matched :]


def test_a_guess_is_the_continuation_of_the_match_and_may_repeat_it() -> None:
    assert Lookup([1, 2, 3, 4, 5, 6, 2, 3]).following(3) == [4, 5, 6]
    assert Lookup([7, 1, 2, 1, 2]).following(5) == [1, 2, 1, 2, 1]
    assert Lookup([1, 2, 3]).matched == 0


def learned(ids: Sequence[int], chosen: Sequence[int]) -> Speculation:
    speculation = Speculation(Lookup(ids))
    for id in chosen:
        speculation.learn([id], 1, 0.001)
    return speculation


def test_guesses_become_longer_if_accepted_and_end_if_rejected() -> None:
    text = list(range(100, 160))
    quoting = learned(text, text[:30])
    assert quoting.guess(100) == text[30:41]
    assert len(quoting.guess(5)) <= 5
    assert quoting.guess(0) == []
    chance = np.random.default_rng(0)
    pairs = [int(id) for n in range(300) for id in (1, 2, chance.integers(100, 10_000))]
    assert learned(text, pairs[:-1]).guess(100) == []


def test_speculation_ends_if_passes_of_several_ids_are_too_slow() -> None:
    text = list(range(100, 160))
    quoting = learned(text, text[:30])
    for _ in range(40):
        for ids in TIMES:
            quoting.learn([], ids, 0.001 * ids)  # no faster than one by one
    assert quoting.guess(100) == []


def test_one_slow_step_does_not_end_speculation() -> None:
    quoting = learned(list(range(60)), range(30))
    quoting.learn([], 12, 100.0)
    assert len(quoting.guess(100)) == 11


class CountingEngine:
    """The engine, with a record of the number of ids in each call."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.config, self.read = engine, engine.config, list[int]()
        self.capabilities, self.new_cache = engine.capabilities, engine.new_cache
        self.nan_position: int | None = None  # the length of text after which logits are NaN

    def forward(self, batch: Sequence[NewTokens], cache: Any) -> Any:
        self.read.append(len(batch[0].ids))
        logits = self.engine.forward(batch, cache)
        first = cache.length(batch[0].sequence) - len(logits) + 1
        if self.nan_position is not None and 0 <= self.nan_position - first < len(logits):
            logits[self.nan_position - first] = np.nan
        return logits


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> CountingEngine:
    """A tiny random model, whose greedy answers soon repeat themselves."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return CountingEngine(
        pack(open_checkpoint(write_gguf(hf_model(**WIDE), path, gguf.GGMLQuantizationType.Q8_0)))
    )


@pytest.fixture
def ignore_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow steps, as on a busy machine, do not end the speculation."""
    monkeypatch.setattr("glassllama.generation.speculation.RISE", 1.0)


PROMPT = [int(id) for id in np.random.default_rng(1).integers(0, 203, 20)] * 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3, "top_p": 0.9},
    {"temperature": 0.2, "top_k": 5, "min_p": 0.1},
    {"temperature": 0.1, "repetition_penalty": 0.9},
    {"frequency_penalty": -0.5, "presence_penalty": 0.5},
]


def begin(engine: Any, speculation: bool, sampling: dict[str, Any], **more: Any) -> Generation:
    sampler = make_sampler(**sampling, seed=8)
    options = {"max_tokens": 150, **more}
    chosen = GenerationSettings(sampler=sampler, speculation=speculation, **options)
    return generate(engine, [PROMPT], chosen)


def both(
    engine: Any, sampling: dict[str, Any], **more: Any
) -> tuple[list[TokenEvent], list[TokenEvent]]:
    guessing = begin(engine, True, sampling, **more)
    return list(guessing), list(begin(engine, False, sampling, **more))


@pytest.mark.usefixtures("ignore_slow_steps")
@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_every_step_is_the_same_with_speculation(
    engine: CountingEngine, sampling: dict[str, Any]
) -> None:
    """Ids, logprobs and finish reasons are bit-identical, and some guesses are made."""
    generation = begin(engine, True, sampling, logprobs=3)
    guessed, plain = list(generation), list(begin(engine, False, sampling, logprobs=3))
    assert guessed == plain
    timings = generation.timings
    assert timings.new_tokens == timings.decode_tokens + 1 == len(plain)
    assert 0 < timings.accepted <= timings.drafted


@pytest.mark.usefixtures("ignore_slow_steps")
def test_speculation_takes_fewer_steps(engine: CountingEngine) -> None:
    engine.read.clear()
    generation = begin(engine, True, {"frequency_penalty": -2.0})  # repeats itself
    assert len(list(generation)) == 150
    assert len(engine.read) == 150 - generation.timings.accepted < 130
    assert set(engine.read[1:]) <= {1, *TIMES}


@pytest.mark.usefixtures("ignore_slow_steps")
def test_stop_ids_limits_and_context_end_answers_as_without_speculation(
    engine: CountingEngine,
) -> None:
    ids = [step.id for step in begin(engine, False, {})]
    for stop in sorted(set(ids)):
        guessed, plain = both(engine, {}, stop_ids=frozenset([stop]))
        assert guessed == plain
        assert guessed[-1].finish_reason == "stop"
    for limit in range(1, 40):
        guessed, plain = both(engine, {}, max_tokens=limit)
        assert guessed == plain
        assert len(guessed) == limit
    guessed, plain = both(engine, {}, max_tokens=None, context=len(PROMPT) + 33)
    assert guessed == plain
    assert len(guessed) == 33


@pytest.mark.usefixtures("ignore_slow_steps")
def test_a_cancelled_row_has_no_further_events(engine: CountingEngine) -> None:
    for count in range(1, 60, 7):
        generation = begin(engine, True, {})
        steps = [next(generation) for _ in range(count)]
        generation.close()
        assert list(generation) == []
        assert generation.timings.new_tokens == count == len(steps)


@pytest.mark.usefixtures("ignore_slow_steps")
def test_nan_logits_end_an_answer_after_the_same_ids(engine: CountingEngine) -> None:
    for made in range(1, 60):
        engine.nan_position, counts = len(PROMPT) + made, []
        for speculation in (True, False):
            steps: list[TokenEvent] = []
            with pytest.raises(GenerationError, match=f"after position {engine.nan_position - 1} "):
                steps.extend(begin(engine, speculation, {}))
            counts.append(steps)
        engine.nan_position = None
        assert counts[0] == counts[1]
        assert len(counts[0]) == made


def test_no_speculation_for_several_rows_and_other_executors(engine: CountingEngine) -> None:
    for executor, prompts in (
        (engine, [PROMPT, PROMPT]),
        (NotBatchInvariant(engine.engine), [PROMPT]),
    ):
        generation = generate(executor, prompts, GenerationSettings(max_tokens=60))
        assert len(list(generation)) == 60 * len(prompts)
        assert generation.timings.drafted == 0


class NotBatchInvariant(CountingEngine):
    """An executor that is not batch-invariant, such as PyTorch."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.capabilities = replace(self.capabilities, batch_invariant=False)


PROMPTS = [
    "Repeat this word for word: The quick brown fox jumps over the lazy dog, and the lazy dog "
    "jumps over the quick brown fox.",
    "Count from one to thirty in words.",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers, then one that multiplies two numbers.",
    "Rename x to y:\n\ndef f(x):\n    if x > 0:\n        return x * f(x - 1)\n    return 1",
    "Say hello ten times.",
]


@pytest.mark.usefixtures("ignore_slow_steps")
@pytest.mark.parametrize("exact", [False, True])
def test_answers_of_the_default_model_are_the_same(default_model: Path, exact: bool) -> None:
    from glassllama import load

    llm = load(default_model, exact=exact)
    drafted = 0
    for n, prompt in enumerate(PROMPTS[: 1 if exact else None]):
        options: dict[str, Any] = {"temperature": 0.7, "seed": n} if n % 2 else {}
        guessed = llm.chat(prompt, max_tokens=80, stop=["\n\n\n"], **options)
        plain = llm.chat(prompt, max_tokens=80, stop=["\n\n\n"], speculation=False, **options)
        assert (guessed.ids, guessed.text) == (plain.ids, plain.text)
        assert plain.timings.drafted == 0
        drafted += guessed.timings.drafted
    assert drafted > 0


def test_long_contexts_are_the_same_in_chunks(default_model: Path) -> None:
    """Attention over several spans, where a single id is computed differently."""
    engine = pack(open_checkpoint(default_model))
    ids = [int(id) for id in np.random.default_rng(2).integers(0, 49_152, 560)]
    cache = Rows(engine)
    cache.next_logits([ids[:520]])
    single = np.concatenate([cache.next_logits([[id]]) for id in ids[520:532]])
    for count in TIMES:
        cache.truncate(0, 520)
        assert (cache.all_logits(ids[520 : 520 + count]) == single[:count]).all()
