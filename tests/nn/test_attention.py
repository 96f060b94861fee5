"""Attention: the formula and the fused kernel agree; masks hide the right positions."""

from __future__ import annotations

import pytest
import torch

from glassllama.nn.attention import (
    attention_scores,
    attention_weights,
    causal_mask,
    fused_attention,
    same_segment,
    weighted_sum,
)
from tolerances import sum_bound


def parts(queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(queries * 100 + keys)
    return torch.randn(2, 6, queries, 10), torch.randn(2, 2, keys, 10), torch.randn(2, 2, keys, 10)


def same(one: torch.Tensor, other: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Compare two computations of heads: averages of values, whose weights have the error of their
    scores.

    A score of D terms has the error `sum_bound`; its weight has that relative error, plus the
    rounding of the softmax and of the sum over S values. All values here are below 5.
    """
    score = sum_bound(q.shape[-1], q.norm(dim=-1).max() * k.norm(dim=-1).max())
    return bool(((one - other).abs() <= 2 * 5 * (score + sum_bound(2 * k.shape[2], 1.0))).all())


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return weighted_sum(attention_weights(attention_scores(q, k), mask), v)


@pytest.mark.parametrize(("new", "past"), [(1, 0), (7, 0), (1, 12), (5, 9)])
def test_formula_and_fused_kernel_agree(new: int, past: int) -> None:
    q, k, v = parts(new, past + new)
    mask = causal_mask(torch.arange(past, past + new)[None], past + new)
    assert same(formula(q, k, v, mask), fused_attention(q, k, v, mask), q, k)


def test_no_mask_means_causal() -> None:
    q, k, v = parts(9, 9)
    mask = causal_mask(torch.arange(9)[None], 9)
    assert same(fused_attention(q, k, v, None), formula(q, k, v, mask), q, k)


def test_each_query_head_uses_the_kv_head_of_its_group() -> None:
    q, k, v = parts(4, 4)
    mask = causal_mask(torch.arange(4)[None], 4)
    alone = [formula(q[:, h : h + 1], k[:, h // 3 : h // 3 + 1], v[:, h // 3 : h // 3 + 1], mask)
             for h in range(6)]  # fmt: skip
    assert same(formula(q, k, v, mask), torch.cat(alone, dim=1), q, k)


def test_weights_sum_to_one_and_are_zero_for_later_tokens() -> None:
    q, k, _ = parts(5, 5)
    weights = attention_weights(attention_scores(q, k), causal_mask(torch.arange(5)[None], 5))
    assert ((weights.sum(-1) - 1).abs() <= 2 * sum_bound(5, 1.0)).all()
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))


def test_causal_mask_uses_the_positions_of_each_row() -> None:
    mask = causal_mask(torch.tensor([[0, 1], [3, 4]]), 5)
    assert mask.int().tolist() == [
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]],
        [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]],
    ]


def test_segments_are_hidden_from_each_other() -> None:
    assert same_segment(torch.tensor([[0, 0, 1]])).int().tolist() == [
        [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]
    ]
