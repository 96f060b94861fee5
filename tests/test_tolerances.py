"""The tolerances of tolerances.py: correct computations are within them, small faults are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from glassllama.base.config import LlamaConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.llama import Llama
from tolerances import (
    assert_same_greedy,
    count_near_ties,
    difference,
    eight_bit_error,
    eight_bit_tolerance,
    float64_logits,
    logits_tolerance,
    loss_tolerance,
    rms_difference,
    sum_bound,
    unit,
    wide,
)

SIZES: dict[str, Any] = {
    "dim": 48, "n_layers": 3, "n_heads": 6, "ffn_dim": 140, "vocab_size": 131, "max_seq_len": 64,
}  # fmt: skip
IDS = torch.arange(2 * 61).reshape(2, 61) * 37 % 131


def llama(seed: int = 0, **changes: Any) -> Llama:
    values = {**SIZES, "n_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-5, "rope_theta": 1e4}
    return filled(Llama(LlamaConfig(**{**values, **changes})), seed)


def gpt(seed: int = 0) -> GPT:
    return filled(GPT(GPTConfig(**SIZES)), seed)


def filled(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
        if parameter.ndim == 1:
            parameter.data += 1.0
    return model.requires_grad_(False)


@pytest.mark.parametrize("make", [llama, gpt, lambda seed: llama(seed, n_layers=12)])
@pytest.mark.parametrize("seed", range(3))
def test_float32_is_well_within_the_tolerance(make: Callable[[int], Any], seed: int) -> None:
    model = make(seed)
    used = difference(model(IDS), float64_logits(model)(IDS)) / logits_tolerance(model.config)
    assert 0.01 < used < 0.6


def test_bfloat16_is_within_its_tolerance() -> None:
    model = llama()
    exact, rounded = model(IDS), llama().bfloat16()(IDS)
    assert 0.02 < difference(rounded, exact) / logits_tolerance(model.config, torch.bfloat16) < 1


def swap(weight: torch.Tensor) -> None:
    weight[3, 5], weight[4, 5] = weight[4, 5].clone(), weight[3, 5].clone()


FAULTS: dict[str, Callable[[Llama], Any]] = {
    "norms with another eps": lambda m: [setattr(n, "eps", 2e-5) for n in norms(m)],
    "two weights swapped": lambda m: swap(m.layers[1].attention.wv.weight),
    "two weights of the last part swapped": lambda m: swap(m.layers[2].feed_forward.down.weight),
    "one layer off by 1e-3": lambda m: m.layers[1].attention.wq.weight.mul_(1.001),
    "the output off by 1e-4": lambda m: m.output.weight.mul_(1.0001),
    "rotation off by 1e-3": lambda m: m.frequencies.mul_(1.001),
}


def norms(model: Llama) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.split(".")[-1].endswith("norm")]


@pytest.mark.parametrize("fault", FAULTS)
def test_small_faults_exceed_the_tolerance(fault: str) -> None:
    right, wrong = llama(), llama()
    FAULTS[fault](wrong)
    assert difference(wrong(IDS), right(IDS)) > 3 * logits_tolerance(right.config)


@pytest.mark.parametrize("terms", [1, 2, 40, 3000])
def test_sums_in_any_order_stay_within_the_bound(terms: int) -> None:
    chance = np.random.default_rng(terms)
    for _ in range(50):
        a, b = chance.standard_normal((2, terms)).astype(np.float32)
        exact, bound = wide(a) @ wide(b), sum_bound(terms, np.abs(wide(a)) @ np.abs(wide(b)))
        forwards, total = chance.permutation(a * b), np.float32(0)
        for term in forwards:
            total += term
        assert abs(total - exact) <= bound
        assert abs(a @ b - exact) <= bound
    wrong = exact + 0.001 * np.abs(a * b).sum()
    assert abs(wrong - exact) > bound


def test_near_ties_are_counted_and_others_fail() -> None:
    row = np.array([1.0, 20.0, 20.0 - 1e-5, 19.0, -np.inf])
    assert count_near_ties(np.stack([row, row]), [1, 2], bar=1e-6) == 1
    with pytest.raises(AssertionError, match="id 3 at 0"):
        count_near_ties(row[None], [3], bar=1e-6)
    with pytest.raises(AssertionError):
        count_near_ties(row[None], [2], bar=1e-8)


def test_greedy_texts_may_differ_at_a_near_tie_only() -> None:
    asked = []

    def all_logits(ids: list[int]) -> np.ndarray:
        asked.append(ids)
        return np.tile([1.0, 20.0, 20.0 - 1e-5, 19.0], (len(ids), 1))

    assert_same_greedy([1, 1], [1, 1], [7], all_logits, bar=1e-6)
    assert not asked
    assert_same_greedy([1, 1, 3], [1, 2, 0], [7], all_logits, bar=1e-6)
    assert asked == [[7, 1]]
    with pytest.raises(AssertionError, match="id 3"):
        assert_same_greedy([1, 1], [1, 3], [7], all_logits, bar=1e-6)


def test_eight_bits() -> None:
    """Rounding inputs block by block has the stated error; rounding twice as coarsely has not."""
    chance = np.random.default_rng(1)
    x, w = chance.standard_normal((200, 512)), chance.standard_normal((512, 300))
    rounded = {}
    for steps in (127, 31):
        blocks = x.reshape(200, 16, 32)
        step = np.abs(blocks).max(-1, keepdims=True) / steps
        rounded[steps] = (np.rint(blocks / step) * step).reshape(200, 512) @ w
    one = eight_bit_tolerance(1) / 4  # of four products, and without the factor of two
    assert 0.8 * one < rms_difference(rounded[127], x @ w) < 1.3 * one
    assert rms_difference(rounded[31], x @ w) > 3 * one
    model = llama(dim=64, n_heads=8, ffn_dim=96)
    error = eight_bit_error(model.double(), IDS[:, :30])
    assert eight_bit_tolerance(3) / 4 < error < 2 * eight_bit_tolerance(3)
    right = model(IDS)
    model.layers[1].feed_forward.up.weight *= 1.1
    assert rms_difference(model(IDS), right) > 1.5 * error


def test_tolerances_of_losses() -> None:
    config = llama().config
    assert loss_tolerance(config, steps=1) == logits_tolerance(config)
    assert loss_tolerance(config, steps=16, tokens=4) == pytest.approx(2 * logits_tolerance(config))
    assert unit() == 2**-24
    assert unit(torch.bfloat16) == 2**-8
