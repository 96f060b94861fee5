"""The compiled sampler against generation's: the same ids for all logits and settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glassllama.base.errors import GenerationError
from glassllama.generation.sampler import Presence, Repetition, Sampler, SamplerState, make_sampler
from glassllama.native.engine.sampling import BLOCK, NativeSampler, SamplerParams
from rows import Rows

HUGE = float(np.finfo(np.float32).max)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.7, "top_p": 0.999},
    {"temperature": 0.8, "top_p": 1e-9},
    {"temperature": 0.6, "top_k": 40},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 3.0, "top_k": 700},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": 0.4},
    {"temperature": 0.9, "repetition_penalty": 0.8, "presence_penalty": -1.0, "top_p": 0.8},
    {"temperature": 1e-6, "top_p": 0.9},
    {"temperature": 100.0},
    {"temperature": 1e6, "top_p": 0.9, "top_k": 30},
    {"temperature": 1e-6, "min_p": 5e-324},
    {"temperature": 1.0, "top_p": 5e-324},
    {"temperature": 0.7, "repetition_penalty": 1e-3, "top_p": 0.9},
    {"repetition_penalty": 1e3},
]


def native(vocab_size: int, **settings: float) -> NativeSampler:
    return NativeSampler(vocab_size, SamplerParams(**settings))


def both(options: dict[str, Any], size: int, seed: int = 3) -> tuple[SamplerState, SamplerState]:
    sampler, prompt = make_sampler(**options, seed=seed), [0, size // 2]
    compiled = sampler.start(prompt, size, native)
    assert compiled.native is not None
    return compiled, sampler.start(prompt, size)


def kinds_of_logits(rng: np.random.Generator, size: int) -> list[np.ndarray]:
    """Flat, spread out, peaked, with many ties, with excluded ids."""
    normal = rng.standard_normal(size).astype(np.float32)
    peaked = 2 * normal
    peaked[rng.integers(0, size, 5)] += np.float32(18)
    masked = np.where(rng.random(size) < 0.9, -np.inf, 4 * normal).astype(np.float32)
    masked[rng.integers(0, size)] = 1
    ties = np.round(normal * 2).astype(np.float32)
    return [normal, 8 * normal, peaked, ties, masked, np.zeros(size, np.float32)]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [1, 7, BLOCK, 3 * BLOCK + 1, 4321])
def test_the_same_ids_as_numpy(options: dict[str, Any], size: int) -> None:
    rng = np.random.default_rng(size)
    compiled, plain = both(options, size)
    for _ in range(15):
        for logits in kinds_of_logits(rng, size):
            assert compiled.choose(logits) == plain.choose(logits)
    assert (compiled.history.counts == plain.history.counts).all()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_the_same_ids_for_a_large_vocabulary(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    compiled, plain = both(options, 128_256)
    for logits in kinds_of_logits(rng, 128_256):
        assert compiled.choose(logits) == plain.choose(logits)


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 200),
        elements=st.floats(-HUGE, HUGE, width=32)
        | st.sampled_from([-math.inf, 0.0, -0.0, 1.0, 1 + 2**-23]),
    ).filter(lambda x: np.isfinite(x.max())),
    st.sampled_from([0.0, 1e-6, 0.7, 1.0, 100.0]),
    st.sampled_from([None, 1, 3, 150]),
    st.sampled_from([1e-3, 0.3, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(deadline=None)
def test_the_same_ids_at_the_limits_of_floats(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    compiled, plain = both(options, len(logits))
    for _ in range(4):
        id = compiled.choose(logits)
        assert id == plain.choose(logits)
        assert np.isfinite(logits[id])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("options", SETTINGS[:4], ids=str)
def test_nan_logits_select_no_id(bad: float, options: dict[str, Any]) -> None:
    for size in (1, BLOCK + 1, 1000):
        for place in {0, size // 2, size - 1}:
            logits = np.random.default_rng(0).standard_normal(size).astype(np.float32)
            logits[place] = bad
            compiled, _ = both(options, size)
            with pytest.raises(GenerationError, match=rf"1 Inf of {size}|1 NaN and 0 Inf"):
                compiled.choose(logits)
            assert not compiled.history.counts.any()
    compiled, _ = both(options, 9)
    with pytest.raises(GenerationError, match="-Inf alone"):
        compiled.choose(np.full(9, -np.inf, np.float32))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_no_id_if_penalties_overflow(temperature: float) -> None:
    """The largest finite logits divided by a penalty below 1 are infinite."""
    for sampling in both({"temperature": temperature, "repetition_penalty": 0.5}, 100):
        logits = np.zeros(100, np.float32)
        logits[50] = HUGE
        with pytest.raises(GenerationError, match="too large for the penalties"):
            sampling.choose(logits)


class Double:
    """A custom step."""

    def __call__(self, logits: np.ndarray, history: Any) -> np.ndarray:
        return logits * 2


@pytest.mark.parametrize("steps", [(Double(),), (Presence(1.0), Repetition(1.1))])
def test_custom_steps_and_orders_run_in_numpy(steps: Any) -> None:
    sampling = Sampler(steps=steps).start([0], 5, native)
    assert sampling.native is None
    assert sampling.choose(np.arange(5, dtype=np.float32)) == 4


def test_a_model_samples_the_same_ids_natively(default_model: Path) -> None:
    """Complete answers of the default model, sampled by compiled code and by NumPy."""
    from glassllama import load

    llm = load(default_model)
    for options in ({"temperature": 0.8, "top_p": 0.95}, {"repetition_penalty": 1.2}):
        ids = llm.chat("Name three fruits.", max_tokens=24, seed=5, **options).ids
        sampling = make_sampler(**options, seed=5).start(
            prompt := llm.encode_chat("Name three fruits."), llm.tokenizer.vocab_size
        )
        cache, fed, plain = Rows(llm.executor), prompt, []
        while len(plain) < len(ids):
            plain.append(sampling.choose(cache.next_logits([fed])[0]))
            fed = plain[-1:]
        assert plain == ids
