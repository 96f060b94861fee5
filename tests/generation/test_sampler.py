"""Samplers: against transformers' processors, by formula, and by frequencies of samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glassllama.base.errors import GenerationError
from glassllama.generation.sampler import (
    History,
    Logits,
    MinP,
    Repetition,
    Sampler,
    Temperature,
    TopK,
    TopP,
    draw,
    exponential,
    likeliest,
    logprobs_of,
    make_sampler,
    weights_of,
)
from tolerances import unit

V = 1009  # a prime, so no multiple of any block size
PROMPT = [3, 5, 5, 900]
HUGE = float(np.finfo(np.float32).max)

STEPS = [
    (Repetition(1.3), RepetitionPenaltyLogitsProcessor(1.3)),
    (Repetition(0.8), RepetitionPenaltyLogitsProcessor(0.8)),
    (Temperature(0.7), TemperatureLogitsWarper(0.7)),
    (Temperature(1.9), TemperatureLogitsWarper(1.9)),
    (TopK(1), TopKLogitsWarper(1)),
    (TopK(40), TopKLogitsWarper(40)),
    (TopK(5000), TopKLogitsWarper(5000)),
    (TopP(0.05), TopPLogitsWarper(0.05)),
    (TopP(0.9), TopPLogitsWarper(0.9)),
    (TopP(0.999), TopPLogitsWarper(0.999)),
    (MinP(0.05), MinPLogitsWarper(0.05)),
    (MinP(0.6), MinPLogitsWarper(0.6)),
]


def random_logits(seed: int, spread: float = 3.0, size: int = V) -> Logits:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def theirs(processor: Any, logits: Logits) -> np.ndarray:
    """Probabilities after transformers' processor."""
    scores = processor(torch.tensor([PROMPT]), torch.from_numpy(logits.copy())[None])
    return scores[0].double().softmax(-1).numpy()


def rounding(logits: np.ndarray) -> float:
    """The relative error of a probability: float32 steps change each logit by a few u."""
    return 6 * unit() * float(np.abs(logits[np.isfinite(logits)]).max())


def probs(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits.copy()).double().softmax(-1).numpy()


@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
@pytest.mark.parametrize(("ours", "oracle"), STEPS, ids=[str(ours) for ours, _ in STEPS])
def test_each_step_equals_the_processor_of_transformers(
    ours: Any, oracle: Any, spread: float
) -> None:
    for seed in range(5):
        logits = random_logits(seed, spread)
        before = logits.copy()
        out = ours(logits, History(PROMPT, V))
        expected = theirs(oracle, logits)
        np.testing.assert_array_equal(np.isfinite(out), expected > 0)
        np.testing.assert_allclose(probs(out), expected, rtol=rounding(out))
        np.testing.assert_array_equal(logits, before, "the input is left alone")
        assert out.dtype == np.float32


def test_the_order_of_the_steps_is_transformers_order() -> None:
    sampler = make_sampler(
        temperature=0.8, top_k=60, top_p=0.85, min_p=0.02, repetition_penalty=1.2, seed=0
    )
    oracle = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(60),
            TopPLogitsWarper(0.85),
            MinPLogitsWarper(0.02),
        ]
    )
    for seed in range(10):
        logits = random_logits(seed)
        out, history = logits, History(PROMPT, V)
        for step in sampler.steps:
            out = step(out, history)
        expected = theirs(oracle, logits)
        np.testing.assert_array_equal(np.isfinite(out), expected > 0)
        np.testing.assert_allclose(probs(out), expected, rtol=rounding(out))


def test_presence_and_frequency_follow_the_published_formula() -> None:
    """logit[j] - count[j]·frequency - [count[j] > 0]·presence, with counts of the answer only."""
    sampler = make_sampler(presence_penalty=0.5, frequency_penalty=0.25)
    logits, history = random_logits(1), History(PROMPT, V)
    for id in (7, 7, 8, 7):
        history.add(id)
    out = logits
    for step in sampler.steps:
        out = step(out, history)
    expected = logits.astype(np.float64)
    expected[7] -= 3 * 0.25 + 0.5
    expected[8] -= 1 * 0.25 + 0.5
    np.testing.assert_allclose(out, expected, rtol=0, atol=3 * unit() * np.abs(logits).max())


def test_greedy_selects_the_first_of_the_largest_logits() -> None:
    logits = np.array([0.0, 2.0, 2.0, 1.0], dtype=np.float32)
    assert make_sampler().start([0], 4).choose(logits) == 1
    assert make_sampler(top_p=0.1, min_p=0.5, top_k=2).start([0], 4).choose(logits) == 1


def test_penalties_apply_to_greedy_answers() -> None:
    sampling = make_sampler(frequency_penalty=1.0).start([3], 4)
    logits = np.array([1.2, 1.0, 0.5, 0.0], dtype=np.float32)
    assert [sampling.choose(logits) for _ in range(5)] == [0, 1, 2, 0, 1]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_frequencies_of_ids_equal_their_probabilities() -> None:
    """Chi-square with 19 degrees of freedom: above 43.8 with probability 0.001."""
    logits, draws = random_logits(2, spread=1.0, size=20), 20_000
    sampler = make_sampler(temperature=0.9, seed=1234)
    generator = np.random.default_rng(sampler.seed)
    out = sampler.steps[0](logits, History([0], 20))
    counts = np.bincount([draw(out, generator) for _ in range(draws)], minlength=20)
    assert chi_square(counts, draws * probs(logits / np.float32(0.9))) < 43.8


def test_draws_of_a_large_vocabulary_reach_every_part() -> None:
    """The same over 64 groups of ids: 63 degrees of freedom, 103.4."""
    size, draws = 2577, 20_000
    logits, generator = random_logits(3, 1.0, size), np.random.default_rng(5)
    group = np.arange(size) % 64
    counts = np.bincount([group[draw(logits, generator)] for _ in range(draws)], minlength=64)
    assert chi_square(counts, draws * np.bincount(group, weights=probs(logits))) < 103.4


@pytest.mark.parametrize("size", [1, 2, 511, 4321])
def test_the_id_is_found_in_the_cumulative_probabilities(size: int) -> None:
    logits = random_logits(4, 2.0, size)
    logits[1::3] = -np.inf
    cumulative = np.cumsum(probs(logits))
    fast, plain = np.random.default_rng(6), np.random.default_rng(6)
    for _ in range(300):
        expected = np.searchsorted(cumulative, plain.random() * cumulative[-1], side="right")
        assert draw(logits, fast) == expected


class LastNumber(np.random.Generator):
    """A generator that gives the largest number below one."""

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return math.nextafter(1.0, 0.0)


@pytest.mark.parametrize("tail", [-np.inf, -200.0])
def test_the_largest_random_number_selects_no_id_of_probability_zero(tail: float) -> None:
    for size in (10, 1536):
        logits = np.full(size, tail, dtype=np.float32)
        logits[:4] = 0.1, 0.7, -3.0, 0.2
        assert draw(logits, LastNumber(np.random.PCG64(0))) == 3


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32)),
    st.floats(0.01, 1.0),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits: Logits, p: float) -> None:
    kept = np.isfinite(TopP(p)(logits, History([0], len(logits))))
    share = probs(logits)
    assert share[kept].sum() >= p - 1e-6
    assert (logits[~kept] < logits[kept].min()).all(), "no id that is more likely is left out"
    surely_likelier = share > share[kept].min() + 1e-6  # equal ones stay together
    assert share[surely_likelier].sum() < p + 1e-6, "without the last one the sum is below p"


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.floats(-HUGE, HUGE, width=32) | st.just(-math.inf),
    ).filter(lambda x: np.isfinite(x.max())),
    st.sampled_from([1e-6, 0.7, 1.0, 100.0]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@pytest.mark.filterwarnings("error")
def test_only_allowed_ids_are_sampled_for_any_logits(
    logits: Logits, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    sampler = make_sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)
    assert np.isfinite(logits[sampler.start([0], len(logits)).choose(logits)])


def test_answers_repeat_with_a_seed_only() -> None:
    def ids(seed: int | None) -> list[int]:
        sampling = make_sampler(temperature=1.0, seed=seed).start([0], V)
        return [sampling.choose(random_logits(n, 1.0)) for n in range(20)]

    assert ids(7) == ids(7)
    assert ids(7) != ids(8)
    assert ids(None) != ids(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 (greedy) or from 1e-06 to 1e+06, got -1.0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0"),
        ({"temperature": 1e-46}, "0 (greedy) or from 1e-06 to 1e+06, got 1e-46"),
        ({"temperature": 1e39}, "temperature must be 0"),
        ({"temperature": "0"}, "temperature must be a number, got '0'"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 1, got 2.5"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": math.nan}, "top_p must be above 0"),
        ({"min_p": -0.1}, "min_p must be at least 0 and at most 1, got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 0.001 to 1000, got 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be from"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty must be from"),
        ({"presence_penalty": 2.5}, "presence_penalty must be between -2 and 2, got 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty must be between -2 and 2, got -3"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": True}, "seed must be a whole number of at least 0, got True"),
    ],
)  # fmt: skip
def test_errors_of_settings_name_field_value_and_range(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError) as caught:
        make_sampler(**settings)
    assert message in str(caught.value)
    with pytest.raises(GenerationError):
        make_sampler(**{"temperature": 0.5, **settings})


def test_defaults_cost_nothing() -> None:
    assert make_sampler() == Sampler()
    assert make_sampler(temperature=1.0).steps == ()


@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0])
def test_logprobs_equal_torch_log_softmax(spread: float) -> None:
    logits = random_logits(9, spread, 128_256)
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    top = expected.topk(20)
    assert likeliest(logits, 20) == top.indices.tolist()
    ids = [*top.indices.tolist(), 0, 128_255]
    bound = 2 * unit() * float(expected.abs().max())  # a difference of two logits, rounded once
    np.testing.assert_allclose(logprobs_of(logits, ids), expected[ids].numpy(), rtol=0, atol=bound)


def test_top_logprobs_break_ties_by_id() -> None:
    logits = np.array([1, 3, 2, 3, 3, 0], dtype=np.float32)
    assert likeliest(logits, 2) == [1, 3]
    assert likeliest(logits, 4) == [1, 3, 4, 2]
    assert likeliest(logits, 99) == [1, 3, 4, 2, 0, 5]
    assert likeliest(logits, 0) == []


def test_the_exponential_differs_from_numpy_by_at_most_two_units_in_the_last_place() -> None:
    x = -np.abs(random_logits(11, 30.0, 100_000))
    x = np.concatenate([x[x > -87], np.zeros(1, np.float32)])
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exponential(x) - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
    assert exponential(np.zeros(1, np.float32)) == 1


def test_weights_are_integers_with_exact_sums() -> None:
    """In any order of summation, for half a million equally likely ids."""
    weights = weights_of(random_logits(12, 0.1, 1 << 19))
    assert (weights == np.rint(weights)).all()
    assert weights.sum() == weights[::-1].cumsum()[-1] == sum(map(int, weights))
    assert weights_of(np.zeros(1 << 19, np.float32)).sum() == 2.0**53


@pytest.mark.parametrize("bad", [[np.nan, 0, 1], [np.inf, 0, 1], [-np.inf] * 3])
def test_nan_logits_select_no_id(bad: list[float]) -> None:
    for settings in ({}, {"temperature": 1.0}):
        sampling = make_sampler(**settings, seed=1).start([0], 3)
        with pytest.raises(GenerationError, match="the logits hold"):
            sampling.choose(np.array(bad, np.float32))
        assert not sampling.history.counts.any()
