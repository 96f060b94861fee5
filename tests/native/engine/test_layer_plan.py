"""Layer plans other than Llama's: the engine against the formulas in float64 PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.base.errors import ConfigError, WeightsError
from glassllama.base.layer_plan import AttentionPlan, BlockPlan, ModelPlan, RopePlan, llama_plan
from glassllama.native.engine.executor import Engine
from glassllama.native.engine.workspace import Weights, vector_shapes
from handmade_engines import SMALL, matrix
from native.engine.unpacked import read_rows
from rows import Rows
from tolerances import assert_logits, difference, rms_difference

PLAN = llama_plan(SMALL)
BLOCK = PLAN.blocks[0]
ROPE = BLOCK.attention.rope
assert ROPE is not None
EVERY_NORM = frozenset({"pre_attention", "post_attention", "pre_ffn", "post_ffn"})
IDS = [int(i) for i in np.random.default_rng(5).integers(0, SMALL.vocab_size, 290)]
LONG = [int(i) for i in np.random.default_rng(6).integers(0, SMALL.vocab_size, 700)]


def with_attention(**changes: Any) -> BlockPlan:
    return replace(BLOCK, attention=replace(BLOCK.attention, **changes))


def with_rope(**changes: Any) -> BlockPlan:
    return with_attention(rope=replace(ROPE, **changes))


def blocks(*each: BlockPlan, **changes: Any) -> ModelPlan:
    return replace(PLAN, blocks=each if len(each) > 1 else each * 2, **changes)


LOCAL = with_attention(window=37)
PLANS: dict[str, ModelPlan] = {
    "biases of q, k and v": blocks(with_attention(biases=frozenset("qkv"))),
    "bias of q alone": blocks(with_attention(biases=frozenset("q"))),
    "biases of all matrices": blocks(
        replace(
            with_attention(biases=frozenset("qkvo")),
            feed_forward=replace(BLOCK.feed_forward, bias=True),
        )
    ),
    "tanh-GELU": blocks(
        replace(BLOCK, feed_forward=replace(BLOCK.feed_forward, activation="gelu_tanh"))
    ),
    "score scale": blocks(with_attention(scale=0.31)),
    "soft cap of scores": blocks(with_attention(softcap=1.5)),
    "soft cap of logits": replace(PLAN, logit_softcap=2.0),
    "QK-norm per head before RoPE": blocks(
        with_attention(qk_norm="per_head", qk_norm_after_rope=False)
    ),
    "QK-norm per head after RoPE": blocks(
        with_attention(qk_norm="per_head", qk_norm_after_rope=True)
    ),
    "QK-norm over the full width": blocks(
        with_attention(qk_norm="full_width", qk_norm_after_rope=False)
    ),
    "QK-norm without weights": blocks(with_attention(qk_norm="unweighted")),
    "norms before and after": blocks(replace(BLOCK, norms=EVERY_NORM)),
    "norms after only": blocks(replace(BLOCK, norms=frozenset({"post_attention", "post_ffn"}))),
    "residual multiplier": blocks(replace(BLOCK, residual_multiplier=0.22)),
    "residual multiplier and norms after": blocks(
        replace(BLOCK, residual_multiplier=0.22, norms=EVERY_NORM)
    ),
    "multipliers of embeddings and logits": replace(
        PLAN, embedding_multiplier=9.8, logit_multiplier=0.37
    ),
    "sliding window": blocks(LOCAL),
    "window of one token": blocks(with_attention(window=1)),
    "window of a page": blocks(with_attention(window=64)),
    "window in one of two layers": blocks(LOCAL, BLOCK),
    "window and soft cap": blocks(with_attention(window=65, softcap=1.5)),
    "partial rotary width": blocks(with_rope(frequencies=ROPE.frequencies[:7])),
    "neighboring pairs, partial width": blocks(
        with_rope(frequencies=ROPE.frequencies[:7], layout="interleaved")
    ),
    "attention factor of RoPE": blocks(with_rope(attention_factor=1.3)),
    "different RoPE in each layer": blocks(
        BLOCK, with_rope(frequencies=tuple(f / 3 for f in ROPE.frequencies))
    ),
    "RoPE in one of two layers": blocks(BLOCK, with_attention(rope=None)),
    "no RoPE": blocks(with_attention(rope=None)),
}
PLANS["everything"] = blocks(
    replace(
        with_attention(
            biases=frozenset("qkvo"), softcap=2.5, window=50, qk_norm="per_head", scale=0.2,
            qk_norm_after_rope=False, rope=replace(ROPE, frequencies=ROPE.frequencies[:9]),
        ),
        norms=EVERY_NORM, residual_multiplier=0.7,
        feed_forward=replace(BLOCK.feed_forward, activation="gelu_tanh", bias=True),
    ),
    replace(with_attention(qk_norm="full_width", rope=None), norms=frozenset({"post_ffn"})),
    embedding_multiplier=3.0, logit_multiplier=0.5, logit_softcap=4.0,
)  # fmt: skip


def random_weights(plan: ModelPlan, kind: str = "F32") -> Weights:
    chance = np.random.default_rng(3)
    shapes = [shape for block in plan.blocks for shape in block.matrices(plan.dim).values()]
    matrices = [matrix(chance, kind, *shape) for shape in (*shapes, (plan.vocab_size, plan.dim))]
    vectors = {
        name: (chance.normal(0, 0.3, size) + name.endswith("weight")).astype(np.float32)
        for name, size in vector_shapes(plan).items()
    }
    return Weights(matrices, matrices[-1], vectors)


# --- the formulas ---------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Any, eps: float) -> Tensor:
    scaled = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return scaled if weight is None else scaled * torch.from_numpy(weight).double()


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def rotate(x: Tensor, rope: RopePlan) -> Tensor:
    """(T, heads, D), rotated by position."""
    frequencies = torch.tensor(rope.frequencies).double().float()
    angles = (torch.arange(len(x)).float()[:, None] * frequencies).double()  # (T, R/2)
    cos, sin = (f(angles)[:, None] * rope.attention_factor for f in (torch.cos, torch.sin))
    width, out = rope.rotary_dim, x.clone()
    if rope.layout == "interleaved":
        a, b = x[..., 0:width:2], x[..., 1:width:2]
        out[..., 0:width:2], out[..., 1:width:2] = a * cos - b * sin, a * sin + b * cos
    else:
        a, b = x[..., : width // 2], x[..., width // 2 : width]
        out[..., : width // 2], out[..., width // 2 : width] = a * cos - b * sin, a * sin + b * cos
    return out


class Formulas:
    """The forward pass of base/layer_plan.py in float64."""

    def __init__(self, plan: ModelPlan, weights: Weights) -> None:
        self.plan, self.vectors = plan, weights.vectors
        self.matrices = [torch.from_numpy(read_rows(m)).double() for m in weights.matrices]

    def linear(self, x: Tensor, layer: int, number: int, name: str) -> Tensor:
        bias = self.vectors.get(f"layers.{layer}.{name}.bias")
        out = x @ self.matrices[7 * layer + number].T
        return out if bias is None else out + torch.from_numpy(bias).double()

    def norm(self, x: Tensor, layer: int, name: str) -> Tensor:
        weight = self.vectors.get(f"layers.{layer}.{name}.weight")
        return x if weight is None else rms_norm(x, weight, self.plan.norm_eps)

    def qk_norm(self, x: Tensor, a: AttentionPlan, layer: int, name: str) -> Tensor:
        if a.qk_norm == "none":
            return x
        weight = self.vectors.get(f"layers.{layer}.attention.{name}_norm.weight")
        if a.qk_norm == "full_width":
            return rms_norm(x.flatten(1), weight, self.plan.norm_eps).view_as(x)
        return rms_norm(x, weight, self.plan.norm_eps)

    def attention(self, x: Tensor, a: AttentionPlan, layer: int) -> Tensor:
        count = len(x)
        q, k, v = (
            self.linear(x, layer, n, f"attention.w{n_}").view(count, -1, a.head_dim)
            for n, n_ in enumerate("qkv")
        )
        if not a.qk_norm_after_rope or a.qk_norm == "full_width":
            q, k = self.qk_norm(q, a, layer, "q"), self.qk_norm(k, a, layer, "k")
        if a.rope is not None:
            q, k = rotate(q, a.rope), rotate(k, a.rope)
        if a.qk_norm_after_rope and a.qk_norm != "full_width":
            q, k = self.qk_norm(q, a, layer, "q"), self.qk_norm(k, a, layer, "k")
        k, v = (t.repeat_interleave(a.group_size, 1) for t in (k, v))  # (T, H, D)
        scores = softcap(torch.einsum("thd,shd->hts", q, k) * a.scale, a.softcap)
        behind = torch.arange(count)[:, None] - torch.arange(count)
        hidden = (behind < 0) | (behind >= (a.window or count))
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = torch.einsum("hts,shd->thd", shares, v).flatten(1)
        return self.linear(out, layer, 3, "attention.wo")

    def feed_forward(self, x: Tensor, block: BlockPlan, layer: int) -> Tensor:
        gate, up = (self.linear(x, layer, 4 + n, f"feed_forward.{name}")
                    for n, name in enumerate(("gate", "up")))  # fmt: skip
        gelu = block.feed_forward.activation == "gelu_tanh"
        active = F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)
        return self.linear(active * up, layer, 6, "feed_forward.down")

    def logits(self, ids: list[int]) -> Tensor:
        plan = self.plan
        x = self.matrices[-1][ids] * plan.embedding_multiplier
        for n, block in enumerate(plan.blocks):
            out = self.attention(self.norm(x, n, "attention_norm"), block.attention, n)
            x = x + block.residual_multiplier * self.norm(out, n, "post_attention_norm")
            out = self.feed_forward(self.norm(x, n, "ffn_norm"), block, n)
            x = x + block.residual_multiplier * self.norm(out, n, "post_ffn_norm")
        x = rms_norm(x, self.vectors["norm.weight"], plan.norm_eps)
        return softcap(x @ self.matrices[-1].T * plan.logit_multiplier, plan.logit_softcap)


# --- tests ----------------------------------------------------------------------------------------


def logits(engine: Engine, ids: list[int]) -> Any:
    return Rows(engine).all_logits(ids)


@pytest.mark.parametrize("name", PLANS)
def test_plan_against_the_formulas(name: str) -> None:
    """Exact mode is within float32 rounding; prefill, decode and batches are bit-identical."""
    plan = PLANS[name]
    weights = random_weights(plan)
    reference = Formulas(plan, weights).logits(IDS)
    engine = Engine(SMALL, weights, exact=True, plan=plan)
    whole = logits(engine, IDS)
    assert_logits(whole, reference, SMALL)
    llama = {name: random_weights(plan).vectors[name] for name in vector_shapes(PLAN)
             if name in weights.vectors}  # fmt: skip
    if len(llama) == len(vector_shapes(PLAN)):  # the feature changes the logits
        without = Formulas(PLAN, Weights(weights.matrices, weights.embeddings, llama)).logits(IDS)
        assert difference(reference, without) > 1e-3
    row, parts, past = Rows(engine), [], 0
    for count in (7, 1, 1, 64, 1, 200, 1, 15):
        parts.append(row.all_logits(IDS[past : past + count]))
        past += count
    assert (np.concatenate(parts) == whole).all()
    rows = [IDS[:3], IDS, IDS[:90]]
    together = Rows(engine, 3).next_logits(rows)
    assert (together == whole[[len(ids) - 1 for ids in rows]]).all()


@pytest.mark.parametrize("name", ["sliding window", "window and soft cap", "everything"])
@pytest.mark.parametrize("cache", ["int16", "int8"])
def test_windows_and_caps_with_integer_caches(name: str, cache: Any) -> None:
    """Quantized keys and values have the same error as without windows and soft caps."""
    plan = PLANS[name]
    weights = random_weights(plan)
    reference = Formulas(plan, weights).logits(LONG)
    engine = Engine(SMALL, weights, cache=cache, plan=plan)
    whole = logits(engine, LONG)
    assert rms_difference(whole, reference) < (0.05 if cache == "int8" else 1e-3)
    row = Rows(engine)
    parts = [row.all_logits(LONG[:690])]
    parts += [row.all_logits([id]) for id in LONG[690:]]  # spans are divided among threads
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_weights_with_all_features(kind: str) -> None:
    plan = PLANS["everything"]
    weights = random_weights(plan, kind)
    reference = Formulas(plan, weights).logits(IDS)
    assert rms_difference(logits(Engine(SMALL, weights, plan=plan), IDS), reference) < 0.05


def test_blocks_of_different_sizes_are_refused() -> None:
    wide = replace(BLOCK, feed_forward=replace(BLOCK.feed_forward, ffn_dim=192))
    plan = replace(PLAN, blocks=(BLOCK, wide))
    with pytest.raises(ConfigError, match=r"block 1: ffn_dim is 192, in block 0 it is 160"):
        Engine(SMALL, random_weights(plan), plan=plan)


def test_missing_and_unexpected_biases_are_refused() -> None:
    plan = PLANS["biases of q, k and v"]
    weights = random_weights(plan)
    with pytest.raises(WeightsError, match=r"layers\.0\.attention\.wk\.bias"):
        Engine(SMALL, weights, plan=PLAN)
    with pytest.raises(WeightsError, match=r"layers\.0\.attention\.wk\.bias"):
        Engine(SMALL, random_weights(PLAN), plan=plan)
