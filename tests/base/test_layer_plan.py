"""The layer plan: sizes that follow from it, and contradictory plans that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from glassllama.base.config import Llama3Scaling, LlamaConfig, rope_frequencies
from glassllama.base.errors import ConfigError
from glassllama.base.layer_plan import (
    AttentionPlan,
    BlockPlan,
    FeedForwardPlan,
    ModelPlan,
    RopePlan,
    llama_plan,
)
from glassllama.weights.architectures.llama import LLAMA as ARCHITECTURE

LLAMA = LlamaConfig(
    dim=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=40, vocab_size=70,
    max_seq_len=128, norm_eps=1e-5, rope_theta=500_000.0,
    rope_scaling=Llama3Scaling(factor=8.0, original_max_seq_len=32),
)  # fmt: skip
ROPE = RopePlan(frequencies=(1.0, 0.1), layout="half")
ATTENTION = AttentionPlan(n_heads=4, n_kv_heads=2, head_dim=6, scale=6**-0.5, rope=ROPE)
BLOCK = BlockPlan(attention=ATTENTION, feed_forward=FeedForwardPlan(ffn_dim=20))
MODEL = ModelPlan(
    dim=8, vocab_size=11, max_seq_len=64, norm_eps=1e-6, blocks=(BLOCK,) * 2, tie_embeddings=True
)


@pytest.mark.parametrize("tied", [False, True])
def test_llama_plan_has_the_sizes_of_the_configuration(tied: bool) -> None:
    config = replace(LLAMA, tie_embeddings=tied)
    plan, shapes = llama_plan(config), ARCHITECTURE.shapes(config)
    assert plan.n_layers == config.n_layers
    assert plan.matrices() == {name: s for name, s in shapes.items() if len(s) == 2}
    assert plan.norms() == [name for name, s in shapes.items() if len(s) == 1]
    assert list(plan.matrices())[-1] == ("tok_embeddings.weight" if tied else "output.weight")
    numbers = 2 * config.n_layers * config.n_kv_heads
    assert plan.kv_bytes(2, 4) == numbers * (config.head_dim * 2 + 4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_llama_plan_has_the_arithmetic_of_the_configuration(qk_norm: bool) -> None:
    attention = llama_plan(replace(LLAMA, qk_norm=qk_norm)).blocks[0].attention
    assert attention.rope is not None
    assert np.array_equal(np.float32(attention.rope.frequencies), rope_frequencies(LLAMA))
    assert (attention.rope.layout, attention.rope.rotary_dim) == ("half", LLAMA.head_dim)
    assert attention.scale == pytest.approx(LLAMA.head_dim**-0.5, rel=1e-7)
    assert attention.qk_norm == ("unweighted" if qk_norm else "none")
    assert attention.group_size == 3


def test_blocks_may_differ_in_window_rope_and_norms() -> None:
    """Five local blocks per global block, norms on both sides, and a block without RoPE."""
    local = replace(BLOCK, attention=replace(ATTENTION, window=4), norms=frozenset({"post_ffn"}))
    global_rope = RopePlan(frequencies=(1.0,), layout="interleaved", attention_factor=1.2)
    full = replace(BLOCK, attention=replace(ATTENTION, rope=global_rope))
    nope = replace(BLOCK, attention=replace(ATTENTION, rope=None, n_kv_heads=1))
    plan = replace(MODEL, blocks=(local, full, nope))
    assert [name for name in plan.norms() if ".0." in name] == ["layers.0.post_ffn_norm.weight"]
    assert plan.kv_bytes(2) == 2 * 6 * 2 * (2 + 2 + 1)
    assert plan.matrices()["layers.2.attention.wk.weight"] == (6, 8)


WRONG: list[tuple[Any, str, dict[str, Any]]] = [
    (ROPE, "frequencies", {"frequencies": ()}),
    (ROPE, "frequencies", {"frequencies": (1.0, float("nan"))}),
    (ROPE, "layout must be one of interleaved, half, got 'pairs'", {"layout": "pairs"}),
    (ROPE, "attention_factor", {"attention_factor": 0.0}),
    (ATTENTION, "n_heads must be a multiple of n_kv_heads, got 4 and 3", {"n_kv_heads": 3}),
    (ATTENTION, "4 rotary dimensions in heads of 2", {"head_dim": 2}),
    (ATTENTION, "n_heads must be a positive whole number, got True", {"n_heads": True}),
    (ATTENTION, "window must be a positive whole number, got 0", {"window": 0}),
    (ATTENTION, "softcap must be positive and finite, got 0", {"softcap": 0}),
    (ATTENTION, "softcap must be positive and finite, got nan", {"softcap": float("nan")}),
    (ATTENTION, "scale must be positive", {"scale": -1.0}),
    (ATTENTION, "qk_norm must be one of none, per_head", {"qk_norm": "both"}),
    (ATTENTION, "biases must be one of q, k, v, o, got 'x'", {"biases": frozenset("qx")}),
    (FeedForwardPlan(ffn_dim=4), "ffn_dim must be a positive", {"ffn_dim": 1.5}),
    (FeedForwardPlan(ffn_dim=4), "activation must be one of silu", {"activation": "relu"}),
    (BLOCK, "norms must be one of pre_attention", {"norms": frozenset({"before"})}),
    (BLOCK, "residual_multiplier must be positive", {"residual_multiplier": float("inf")}),
    (MODEL, "vocab_size must be a positive", {"vocab_size": 0}),
    (MODEL, "embedding_multiplier must be positive", {"embedding_multiplier": "4"}),
    (MODEL, "logit_softcap must be positive", {"logit_softcap": -30.0}),
    (MODEL, "blocks: a model has at least one", {"blocks": ()}),
]


@pytest.mark.parametrize(("plan", "message", "changes"), WRONG)
def test_contradictory_plans_are_refused(plan: Any, message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        replace(plan, **changes)
    assert message in str(error.value)
