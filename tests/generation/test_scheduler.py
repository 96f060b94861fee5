"""The scheduler with a small NumPy model whose logits depend on the ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import Capabilities, NewTokens
from glassllama.generation import (
    Generation,
    GenerationSettings,
    Request,
    Scheduler,
    TokenEvent,
    generate,
    make_sampler,
)
from interrupting import Interruption
from tolerances import unit

V, CONTEXT, CHUNK = 97, 2000, 512
CONFIG = LlamaConfig(
    dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=12, vocab_size=V,
    max_seq_len=CONTEXT, norm_eps=1e-5, rope_theta=10_000.0,
)  # fmt: skip
TABLES = np.random.default_rng(0).standard_normal((3, V, V)).astype(np.float32) * 2


def logits_after(ids: Sequence[int]) -> np.ndarray:
    """(V,) A trigram model with a decaying memory: the reference for the executor."""
    first, second = ids[-1], ids[-2] if len(ids) > 1 else 0
    return TABLES[0, first] + TABLES[1, second] + TABLES[2, sum(ids) % V]


class Words:
    """The executor's cache, which stores the ids."""

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}
        self.numbers = itertools.count()

    def add(self) -> int:
        number = next(self.numbers)
        self.texts[number] = []
        return number

    def rewind(self, sequence: int, length: int) -> None:
        del self.texts[sequence][length:]

    def remove(self, sequence: int) -> None:
        del self.texts[sequence]

    def length(self, sequence: int) -> int:
        return len(self.texts[sequence])

    def reused(self, sequence: int) -> int:
        return 0


class Trigrams:
    """An executor that counts its work, reuses one array for all results, and can be made to
    fail."""

    config = CONFIG
    capabilities = Capabilities(prefill_chunk=CHUNK, batch_invariant=True)

    def __init__(self, bad_logits: dict[int, float] | None = None) -> None:
        self.fed: list[list[int]] = []  # new ids of each sequence, call by call
        self.bad_logits = bad_logits or {}  # length of the text -> value put into its logits
        self.answer = np.empty((100, V), dtype=np.float32)
        self.cache = Words()

    def new_cache(self) -> Words:
        return self.cache

    def forward(self, batch: Sequence[NewTokens], cache: Any) -> np.ndarray:
        self.fed.append([len(tokens.ids) for tokens in batch])
        assert batch, "a call without new ids"
        self.answer[:] = np.nan
        row = 0
        for tokens in batch:
            text = cache.texts[tokens.sequence]
            assert tokens.ids
            for n, id in enumerate(tokens.ids, start=1):
                text.append(id)
                if tokens.output == "all" or (tokens.output == "last" and n == len(tokens.ids)):
                    self.answer[row] = logits_after(text)
                    if len(text) in self.bad_logits:
                        self.answer[row, 5] = self.bad_logits[len(text)]
                    row += 1
            assert len(text) <= self.config.max_seq_len or self.config.unbounded
        return self.answer[:row]


def ids_of(steps: Sequence[TokenEvent], row: int = 0) -> list[int]:
    return [step.id for step in steps if step.row == row]


def greedy(prompt: Sequence[int], n: int) -> list[int]:
    """The plain loop without a cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(logits_after(ids).argmax()))
    return ids[len(prompt) :]


def settings(**fields: Any) -> GenerationSettings:
    return GenerationSettings(**{"max_tokens": 12, **fields})


def test_greedy_equals_the_plain_loop() -> None:
    steps = list(generate(Trigrams(), [[1, 2, 3]], settings()))
    assert ids_of(steps) == greedy([1, 2, 3], 12)
    assert [step.finish_reason for step in steps] == [None] * 11 + ["length"]
    assert all(step.row == 0 and step.logprob is None and step.top == () for step in steps)


def test_steps_are_delivered_while_they_are_computed() -> None:
    executor = Trigrams()
    steps = generate(executor, [[1, 2, 3], [4]], settings())
    assert [next(steps).row for _ in range(2)] == [0, 1]
    assert executor.fed == [[3, 1]], "nothing is computed before it is requested"
    assert [next(steps).row for _ in range(4)] == [0, 1, 0, 1]
    assert executor.fed == [[3, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11, "top_p": 0.9}])
def test_a_row_is_the_same_alone_and_in_a_batch(sampling: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, V, n).tolist() for n in (1, 7, 700, 30, CHUNK)]
    stop_ids = frozenset(range(0, 12))
    chosen = settings(sampler=make_sampler(**sampling), max_tokens=20, stop_ids=stop_ids)
    together = list(generate(Trigrams(), prompts, chosen))
    alone = [ids_of(list(generate(Trigrams(), [prompt], chosen))) for prompt in prompts]
    assert [ids_of(together, row) for row in range(len(prompts))] == alone
    assert len(set(map(len, alone))) > 2, "the rows end at different times"


def test_one_setting_for_each_row() -> None:
    each = [settings(max_tokens=2), settings(max_tokens=5), settings(logprobs=0)]
    steps = list(generate(Trigrams(), [[1], [2], [3]], each))
    assert [len(ids_of(steps, row)) for row in range(3)] == [2, 5, 12]
    assert all((step.logprob is not None) == (step.row == 2) for step in steps)
    ends = {step.row: step.finish_reason for step in steps if step.finish_reason}
    assert ends == {0: "length", 1: "length", 2: "length"}


def test_a_stop_id_ends_its_row_and_is_the_last_step() -> None:
    expected = greedy([1, 2, 3], 12)
    stop = expected[4]
    place = expected.index(stop)
    steps = list(generate(Trigrams(), [[1, 2, 3]], settings(stop_ids=frozenset([stop]))))
    assert ids_of(steps) == expected[: place + 1]
    assert steps[-1].finish_reason == "stop"
    assert all(step.finish_reason is None for step in steps[:-1])


def test_ignore_eos_continues_after_stop_ids() -> None:
    stop = frozenset(range(V))
    steps = list(generate(Trigrams(), [[1]], settings(stop_ids=stop, ignore_eos=True)))
    assert ids_of(steps) == greedy([1], 12)
    assert steps[-1].finish_reason == "length"
    assert len(list(generate(Trigrams(), [[1]], settings(stop_ids=stop)))) == 1


def test_a_finished_row_is_not_computed() -> None:
    executor = Trigrams()
    list(generate(executor, [[1], [2, 3]], [settings(max_tokens=1), settings(max_tokens=4)]))
    assert executor.fed == [[1, 2], [1], [1], [1]]


def test_a_cancelled_row_is_not_computed_and_has_no_events() -> None:
    executor = Trigrams()
    generation = generate(executor, [[1], [2], [3]], settings(max_tokens=4))
    steps = [next(generation)]
    generation.cancel(1)  # already sampled in this round, not yet delivered
    steps += list(generation)
    assert [len(ids_of(steps, row)) for row in range(3)] == [4, 0, 4]
    assert executor.fed == [[1, 1, 1], *[[1, 1]] * 3]
    assert generation.timings.new_tokens == 8


def test_a_row_cancelled_before_the_start_is_never_computed() -> None:
    executor = Trigrams()
    generation = generate(executor, [[1], [2, 3]], settings(max_tokens=2))
    generation.cancel(0)
    assert {step.row for step in generation} == {1}
    assert executor.fed == [[2], [1]]


@pytest.mark.parametrize("taken", [0, 3])
def test_close_ends_all_rows(taken: int) -> None:
    executor = Trigrams()
    generation = generate(executor, [[1], [2]], settings())
    for _ in range(taken):
        next(generation)
    calls = len(executor.fed)
    generation.close()
    assert list(generation) == []
    assert len(executor.fed) == calls


def test_cancelling_all_rows_ends_the_generation() -> None:
    executor = Trigrams()
    generation = generate(executor, [[1], [2]], settings())
    generation.cancel(0)
    generation.cancel(1)
    assert list(generation) == []
    assert executor.fed == []


def test_long_prompts_are_computed_in_chunks_with_progress() -> None:
    executor, progress_calls = Trigrams(), []
    prompts = [np.random.default_rng(1).integers(0, V, n).tolist() for n in (1300, 4)]
    steps = list(
        generate(
            executor,
            prompts,
            settings(max_tokens=3),
            progress=lambda done, total: progress_calls.append((done, total)),
        )
    )
    assert executor.fed == [[512], [512], [276, 4], [1, 1], [1, 1]]
    assert progress_calls == [(0, 1304), (512, 1304), (1024, 1304), (1304, 1304)]
    assert [ids_of(steps, row) for row in (0, 1)] == [greedy(prompt, 3) for prompt in prompts]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("length", "made"), [(3, 0), (6, 3)])
def test_nan_logits_are_an_error(value: float, length: int, made: int) -> None:
    generation = generate(Trigrams(bad_logits={length: value}), [[1], [1, 2, 3]], settings())
    steps: list[TokenEvent] = []
    with pytest.raises(GenerationError) as caught:
        steps.extend(generation)
    assert ids_of(steps, 1) == greedy([1, 2, 3], 12)[:made]
    assert str(caught.value).startswith(f"prompt 1: the logits after position {length - 1} hold ")
    assert f"{'1 NaN and 0' if np.isnan(value) else '0 NaN and 1'} Inf of {V}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(generation) == []


def test_minus_infinity_excludes_an_id_and_all_minus_infinity_is_an_error(monkeypatch) -> None:
    steps = list(generate(Trigrams(bad_logits={1: -np.inf, 2: -np.inf}), [[1]], settings()))
    assert len(steps) == 12
    monkeypatch.setattr(f"{__name__}.TABLES", np.full_like(TABLES, -np.inf))
    with pytest.raises(GenerationError, match="after position 0 hold -Inf alone"):
        list(generate(Trigrams(), [[1]], settings()))


def test_answers_end_at_the_end_of_the_context() -> None:
    steps = list(generate(Trigrams(), [[1] * 10], settings(max_tokens=50, context=16)))
    assert ids_of(steps) == greedy([1] * 10, 6)
    assert steps[-1].finish_reason == "length"
    to_the_end = GenerationSettings(context=16)
    assert ids_of(list(generate(Trigrams(), [[1] * 10], to_the_end))) == greedy([1] * 10, 6)


def test_the_context_of_the_model_is_the_default_limit() -> None:
    steps = list(generate(Trigrams(), [[1] * (CONTEXT - 3)], GenerationSettings()))
    assert len(steps) == 3
    assert steps[-1].finish_reason == "length"


def shifted(prompt: Sequence[int], n: int, context: int, bos: int | None) -> tuple[list[int], int]:
    """The plain loop beyond a full context, computing everything again for every id.

    -> (new ids, number of dropped tokens).
    """
    window, new, dropped = list(prompt), [], 0
    while len(new) < n:
        if len(window) == context:
            start = int(window[0] == bos)
            kept = window[start + (context - start) // 2 :]
            dropped += context - start - len(kept)
            window = window[:start] + kept
        new.append(int(logits_after(window).argmax()))
        window.append(new[-1])
    return new, dropped


@pytest.mark.parametrize("bos", [None, 1, 96])
@pytest.mark.parametrize("context", [6, 7, 64, 600])
def test_an_answer_continues_beyond_a_full_context(context: int, bos: int | None) -> None:
    past_it = {"context": context, "on_overflow": "shift", "max_tokens": 2 * context + 5}
    steps = list(generate(Trigrams(), [[1, 2, 3]], settings(**past_it, bos=bos)))
    new, dropped = shifted([1, 2, 3], 2 * context + 5, context, bos)
    assert ids_of(steps) == new
    assert steps[-1].finish_reason == "length"
    assert (steps[0].dropped_tokens, steps[-1].dropped_tokens) == (0, dropped)
    assert dropped > context / 2


def test_rows_of_a_batch_shift_at_different_times() -> None:
    prompts = [[1], [1, *range(20, 34)], [5] * 15]
    chosen = settings(context=16, on_overflow="shift", max_tokens=40, bos=1)
    steps = list(generate(Trigrams(), prompts, chosen))
    for row, prompt in enumerate(prompts):
        new, dropped = shifted(prompt, 40, 16, bos=1)
        assert ids_of(steps, row) == new
        assert [step for step in steps if step.row == row][-1].dropped_tokens == dropped


def test_a_stop_id_ends_an_answer_beyond_the_context() -> None:
    new, _ = shifted([1, 2, 3], 60, 16, bos=None)
    stop = next(id for n, id in enumerate(new) if n > 30 and id not in new[:n])
    chosen = settings(context=16, on_overflow="shift", max_tokens=60, stop_ids=frozenset([stop]))
    steps = list(generate(Trigrams(), [[1, 2, 3]], chosen))
    assert ids_of(steps) == new[: new.index(stop) + 1]
    assert steps[-1].finish_reason == "stop"


def test_without_max_tokens_an_answer_ends_with_the_context() -> None:
    """For every on_overflow: the answer of a model without a stop id would never end otherwise."""
    steps = list(
        generate(Trigrams(), [[1] * 10], GenerationSettings(context=16, on_overflow="shift"))
    )
    assert ids_of(steps) == greedy([1] * 10, 6)


@pytest.mark.parametrize("bos", [None, 1])
def test_the_smallest_contexts_are_shifted(bos: int | None) -> None:
    for context in (2, 3):
        past_it = {"context": context, "on_overflow": "shift", "max_tokens": 20, "bos": bos}
        steps = list(generate(Trigrams(), [[1]], settings(**past_it)))
        assert len(steps) == 20


def test_a_model_that_depends_on_the_last_id_only_has_no_context_limit() -> None:
    class Unbounded(Trigrams):
        config = SimpleNamespace(vocab_size=V, max_seq_len=16, unbounded=True)  # type: ignore

    steps = list(generate(Unbounded(), [[1] * 50], settings(max_tokens=40)))
    assert ids_of(steps) == greedy([1] * 50, 40)
    assert steps[-1].dropped_tokens == 0
    assert len(list(generate(Unbounded(), [[1]], GenerationSettings()))) == 16


@pytest.mark.parametrize(
    ("prompts", "fields", "message"),
    [
        ([], {}, "no prompts: expected at least one"),
        ([[1], []], {}, "prompt 1 is empty: expected at least one id"),
        ([[1] * 16], {"context": 16}, "prompt 0 has 16 ids and the context holds 16: no room"),
        ([[1] * 99], {"context": 16}, "prompt 0 has 99 ids and the context holds 16: no room"),
        ([[1] * 99], {"context": 16}, "shorten it to at most 15, or allow a context of up to 2000"),
        ([[1] * 99], {"context": 16, "on_overflow": "shift"}, "shorten it to at most 15"),
        ([[1]], {"on_overflow": "wrap"}, "on_overflow must be 'stop' or 'shift', got 'wrap'"),
        ([[1] * 2000], {}, "prompt 0 has 2000 ids and the context holds 2000: no room"),
        ([[1]], {"context": 2001}, "context 2001 is more than the model's 2000"),
        ([[1], [2, V]], {}, "prompt 1: id 97 at position 1 is outside the vocabulary 0 … 96"),
        ([[-1]], {}, "prompt 0: id -1 at position 0 is outside the vocabulary 0 … 96"),
        ([[1.5]], {}, "prompt 0: 1.5 at position 0 is no id"),
        (["hi"], {}, "prompt 0: 'h' at position 0 is no id"),
        ([[1]], {"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ([[1]], {"logprobs": -1}, "logprobs must be a whole number of at least 0, got -1"),
        ([[1]], {"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ([[1]], {"speculation": None}, "speculation must be True or False, got None"),
        ([[1]], {"context": 1}, "context must be a whole number of at least 2, got 1"),
    ],
)  # fmt: skip
def test_invalid_requests_are_errors_before_anything_is_computed(
    prompts: Any, fields: dict[str, Any], message: str
) -> None:
    executor = Trigrams()
    with pytest.raises(GenerationError) as caught:
        generate(executor, prompts, settings(**fields))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert executor.fed == []


def test_the_number_of_settings_must_equal_the_number_of_prompts() -> None:
    with pytest.raises(GenerationError, match="2 settings for 1 prompts"):
        generate(Trigrams(), [[1]], [settings(), settings()])


def test_ids_may_be_an_array() -> None:
    prompt = np.array([1, 2, 3], dtype=np.uint32)
    assert ids_of(list(generate(Trigrams(), [prompt], settings()))) == greedy([1, 2, 3], 12)


def test_logprobs_are_computed_before_penalties_and_filters() -> None:
    """Equal to torch's log_softmax of the raw logits, without temperature."""
    sampler = make_sampler(temperature=1.7, top_k=30, repetition_penalty=1.4, seed=2)
    steps = list(generate(Trigrams(), [[1, 2, 3]], settings(sampler=sampler, logprobs=4)))
    ids = [1, 2, 3]
    for step in steps:
        expected = torch.from_numpy(logits_after(ids)).double().log_softmax(-1)
        top = expected.topk(4)
        assert [one.id for one in step.top] == top.indices.tolist()
        bound = 2 * unit() * float(expected.abs().max())  # a difference of logits, rounded once
        np.testing.assert_allclose([one.logprob for one in step.top], top.values, 0, bound)
        assert abs(step.logprob - expected[step.id].item()) <= bound
        ids.append(step.id)


def test_timings_count_ids_and_seconds() -> None:
    generation = generate(Trigrams(), [[1, 2, 3], [4]], settings(max_tokens=5))
    assert generation.timings.decode_rate is None
    list(generation)
    timings = generation.timings
    assert (timings.prompt_tokens, timings.new_tokens, timings.decode_tokens) == (4, 10, 8)
    assert timings.prefill_s > 0
    assert timings.decode_s > 0
    assert timings.prefill_rate == 4 / timings.prefill_s
    assert timings.decode_rate == 8 / timings.decode_s


def run(scheduler: Scheduler) -> dict[int, list[TokenEvent]]:
    """Run steps until all requests have ended -> the events of each request."""
    events: dict[int, list[TokenEvent]] = {}
    while not scheduler.is_idle:
        for event in scheduler.step():
            events.setdefault(event.request, []).append(event)
    return events


def request(executor: Any, prompt: Sequence[int], **fields: Any) -> Request:
    return Request.new(executor, prompt, settings(**fields))


def test_a_long_prompt_is_computed_between_the_ids_of_other_requests() -> None:
    executor = Trigrams()
    scheduler = Scheduler(executor)
    short = scheduler.add(request(executor, [1, 2, 3], max_tokens=8))
    first = scheduler.step() + scheduler.step()
    prompt = np.random.default_rng(1).integers(0, V, 1300).tolist()
    long = scheduler.add(request(executor, prompt, max_tokens=3))
    events = run(scheduler)
    assert [event.id for event in first + events[short]] == greedy([1, 2, 3], 8)
    assert [event.id for event in events[long]] == greedy(prompt, 3)
    assert executor.fed == [[3], [1], [1, 512], [1, 512], [1, 276], *[[1, 1]] * 2, [1]]


def test_requests_come_and_go_in_any_order() -> None:
    """Each request gets the same ids as alone; its sequence is removed from the cache at the
    end."""
    chance = np.random.default_rng(4)
    executor = Trigrams()
    scheduler, wanted, made = Scheduler(executor), dict[int, list[int]](), dict[int, list[int]]()
    while len(wanted) < 30 or not scheduler.is_idle:
        if len(wanted) < 30 and chance.random() < 0.5:
            prompt = chance.integers(0, V, int(chance.integers(1, 900))).tolist()
            count = int(chance.integers(1, 20))
            number = scheduler.add(request(executor, prompt, max_tokens=count))
            wanted[number], made[number] = greedy(prompt, count), []
        for event in scheduler.step():
            made[event.request].append(event.id)
    assert made == wanted
    assert executor.cache.texts == {}


def test_a_cancelled_request_has_no_further_events() -> None:
    executor = Trigrams()
    scheduler = Scheduler(executor)
    requests = [request(executor, [n + 1]) for n in range(2)]
    for one in requests:
        scheduler.add(one)
    scheduler.step()
    scheduler.cancel(requests[0])
    assert list(executor.cache.texts) == [requests[1].sequence]
    assert list(run(scheduler)) == [1]
    scheduler.cancel(requests[0])  # without effect


def test_a_generation_without_references_is_not_continued() -> None:
    executor = Trigrams()
    scheduler = Scheduler(executor)
    kept, dropped = (Generation(scheduler, [request(executor, [n])]) for n in range(2))
    assert [next(dropped).id, next(kept).id] == [greedy([1], 1)[0], greedy([0], 1)[0]]
    del dropped
    assert [event.id for event in kept] == greedy([0], 12)[1:]
    assert executor.fed[2:] == [[1]] * 11


def test_a_failed_request_does_not_end_the_others() -> None:
    executor = Trigrams(bad_logits={5: np.nan})
    scheduler = Scheduler(executor)
    scheduler.add(request(executor, [1, 2, 3]))
    scheduler.add(request(executor, range(10)))
    events = run(scheduler)
    assert [event.error is not None for event in events[0]] == [False, False, True]
    assert [event.id for event in events[1]] == greedy(range(10), 12)


@pytest.mark.parametrize("invariant", [True, False])
def test_no_id_is_lost_by_an_interrupt_at_any_moment(invariant: bool) -> None:
    """The interrupted generation ends; another one of the same scheduler continues."""
    for at in itertools.count(1, 3):
        executor = Trigrams()
        executor.capabilities = Capabilities(prefill_chunk=CHUNK, batch_invariant=invariant)
        scheduler = Scheduler(executor)
        mine = Generation(scheduler, [request(executor, [1, 2, 3])])
        other = Generation(scheduler, [request(executor, [4, 5], max_tokens=5)])
        ids = [next(other).id]
        interruption = Interruption(at)
        with suppress(KeyboardInterrupt):
            interruption.run(lambda mine=mine: [next(mine) for _ in range(3)])
        ended = False
        with suppress(GenerationError):  # INTERRUPTED while its own next id was sampled
            ids += [event.id for event in other]
            ended = True
        assert ids == greedy([4, 5], 5 if ended else len(ids)), at
        if not interruption.came:
            assert at > 100
            break


def test_threads_share_the_steps() -> None:
    executor = Trigrams()
    scheduler = Scheduler(executor)
    prompts = [[n, 7 * n % V] for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(
            lambda prompt: [e.id for e in Generation(scheduler, [request(executor, prompt)])],
            prompts,
        )
    assert list(made) == [greedy(prompt, 12) for prompt in prompts]
