"""Traces: the places of a running model against the formulas, edits, lens, entropy, NaN."""

from __future__ import annotations

import math
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from glassllama.base.errors import GenerationError, GlassError
from glassllama.models.llama import Llama
from glassllama.walkthrough import (
    Edit,
    Trace,
    ablate_head,
    attention_entropy,
    first_non_finite,
    logit_lens,
    patch,
    predictions,
    residual_norms,
    run_with_trace,
)
from glassllama.walkthrough.interventions import MISTAKES, mistaken
from tolerances import assert_logits, difference, logits_bar, sum_bound
from walkthrough.conftest import random_llama

IDS, OTHER = [5, 9, 1, 33, 9, 0], [5, 9, 7, 33, 9, 12]


def loops(model: Llama, ids: list[int]) -> dict[str, np.ndarray]:
    """Layer 0 in float64, number by number: nothing of this package but the weights."""
    c = model.config
    w = {name: p.double().numpy() for name, p in model.named_parameters()}
    x = w["tok_embeddings.weight"][ids]  # (T, C)
    one = "layers.0."

    def norm(v: np.ndarray, name: str) -> np.ndarray:
        return np.array([row / math.sqrt((row**2).mean() + c.norm_eps) for row in v]) * w[name]

    def heads(name: str, n: int, turn: bool) -> np.ndarray:
        flat = normed @ w[f"{one}attention.{name}.weight"].T
        out = flat.reshape(len(ids), n, c.head_dim).copy()
        half = c.head_dim // 2
        for t in range(len(ids)):
            for pair in range(half if turn else 0):
                angle = t * c.rope_theta ** (-2 * pair / c.head_dim)
                number = out[t, :, pair] + 1j * out[t, :, pair + half]
                number = number * np.exp(1j * angle)
                out[t, :, pair], out[t, :, pair + half] = number.real, number.imag
        return out.transpose(1, 0, 2)  # (n, T, D)

    normed = norm(x, f"{one}attention_norm.weight")
    q, k = heads("wq", c.n_heads, True), heads("wk", c.n_kv_heads, True)
    v = heads("wv", c.n_kv_heads, False)
    weights = np.zeros((c.n_heads, len(ids), len(ids)))
    taken = np.zeros((c.n_heads, len(ids), c.head_dim))
    for h in range(c.n_heads):
        for t in range(len(ids)):
            scores = [q[h, t] @ k[h // 3, s] / math.sqrt(c.head_dim) for s in range(t + 1)]
            powers = np.exp(scores)
            weights[h, t, : t + 1] = powers / powers.sum()
            taken[h, t] = sum(weights[h, t, s] * v[h // 3, s] for s in range(t + 1))
    joined = taken.transpose(1, 0, 2).reshape(len(ids), -1)
    after = x + joined @ w[f"{one}attention.wo.weight"].T
    fed = norm(after, f"{one}ffn_norm.weight")
    gate = fed @ w[f"{one}feed_forward.gate.weight"].T
    gated = gate / (1 + np.exp(-gate)) * (fed @ w[f"{one}feed_forward.up.weight"].T)
    return {
        "tok_embeddings": x, "layers.0.attention_norm": normed, "layers.0.attention.q_rope": q,
        "layers.0.attention.k_rope": k, "layers.0.attention.v": v,
        "layers.0.attention.weights": weights, "layers.0.attention.heads": taken,
        "layers.0.after_attention": after, "layers.0.feed_forward.gated": gated,
        "layers.0": after + gated @ w[f"{one}feed_forward.down.weight"].T,
    }  # fmt: skip


def test_places_hold_what_the_formulas_say(llama: Llama) -> None:
    logits, trace = run_with_trace(llama, IDS)
    assert_logits(logits, llama(torch.tensor([IDS])), llama.config)
    for place, expected in loops(llama, IDS).items():
        assert trace[place].shape == (1, *expected.shape), place
        assert_logits(trace[place][0], expected, llama.config, layers=1)


def test_only_what_was_asked_is_kept(llama: Llama) -> None:
    _, trace = run_with_trace(llama, IDS, watch=["layers.*.attention.q", "norm"])
    assert list(trace) == [f"layers.{n}.attention.q" for n in range(3)] + ["norm"]
    assert trace.nbytes == 4 * len(IDS) * (3 * 60 + 48)
    _, last = run_with_trace(llama, IDS, watch=["layers.*.attention.q"], positions=[1, -1 % 6])
    assert last.nbytes == 4 * 2 * 3 * 60
    for place, tensor in last.items():
        assert torch.equal(tensor, trace[place][..., [1, 5], :])


def test_aliases_count_once_and_no_hook_stays(llama: Llama) -> None:
    _, trace = run_with_trace(llama, IDS, watch=["layers.0.attention", "layers.0.attention.wo"])
    assert len(trace) == 2
    assert trace.nbytes == 4 * len(IDS) * 48
    assert not any(module._forward_hooks for module in llama.modules())


def test_a_cache_is_filled_on_the_way(llama: Llama) -> None:
    cache = llama.new_cache(1, 8)
    run_with_trace(llama, IDS[:4], cache=cache)
    logits, trace = run_with_trace(llama, IDS[4:], cache=cache)
    assert cache.lengths == [6]
    assert trace["layers.2.attention.weights"].shape == (1, 6, 2, 6)
    assert_logits(logits, llama(torch.tensor([IDS]))[:, 4:], llama.config)


def test_batches_are_traced_too(llama: Llama) -> None:
    _, trace = run_with_trace(llama, torch.tensor([IDS, OTHER]), watch=["layers.*.ffn_norm"])
    assert trace["layers.1.ffn_norm"].shape == (2, 6, 48)
    _, alone = run_with_trace(llama, OTHER, watch=["layers.*.ffn_norm"])
    assert_logits(trace["layers.1.ffn_norm"][1:], alone["layers.1.ffn_norm"], llama.config)


def test_a_head_without_effect_is_a_head_without_columns_in_wo(llama: Llama) -> None:
    edited, trace = run_with_trace(llama, IDS, edits=[ablate_head(1, 4)])
    assert not trace["layers.1.attention.heads"][:, 4].any()
    other = random_llama()
    other.layers[1].attention.wo.weight[:, 40:50] = 0
    assert_logits(edited, other(torch.tensor([IDS])), llama.config)
    assert difference(edited, llama(torch.tensor([IDS]))) > 0.01


def test_a_whole_activation_from_another_run_makes_it_that_run(llama: Llama) -> None:
    logits, source = run_with_trace(llama, OTHER, watch=["layers.1"])
    patched, _ = run_with_trace(llama, IDS, watch=[], edits=[patch("layers.1", source)])
    assert_logits(patched, logits, llama.config)


def test_a_patch_of_one_position_leaves_the_ones_before(llama: Llama) -> None:
    right, own = run_with_trace(llama, IDS, watch=["layers.0"])
    _, source = run_with_trace(llama, OTHER, watch=["layers.0"])
    patched, trace = run_with_trace(
        llama, IDS, watch=["layers.0"], edits=[patch("layers.0", source, positions=[2])]
    )
    assert torch.equal(trace["layers.0"][:, 2], source["layers.0"][:, 2])
    assert torch.equal(trace["layers.0"][:, 3:], own["layers.0"][:, 3:])
    assert_logits(patched[:, :2], right[:, :2], llama.config)
    assert difference(patched[:, 2:], right[:, 2:]) > 0.01


def test_edits_come_one_after_the_other(llama: Llama) -> None:
    twice = [Edit("layers.0", lambda x: x + 1), Edit("layers.0", lambda x: 2 * x)]
    _, plain = run_with_trace(llama, IDS, watch=["layers.0"])
    _, edited = run_with_trace(llama, IDS, watch=["layers.0"], edits=twice)
    assert torch.equal(edited["layers.0"], 2 * (plain["layers.0"] + 1))


def test_faults_are_named(llama: Llama) -> None:
    with pytest.raises(GlassError, match="weigths"):
        run_with_trace(llama, IDS, watch=["layers.*.weigths"])
    with pytest.raises(GlassError, match="layrs"):
        run_with_trace(llama, IDS, edits=[Edit("layrs.0", lambda x: x)])
    with pytest.raises(GlassError, match=r"layers\.0.*\(1, 6, 48\).*\(1, 6, 47\)"):
        run_with_trace(llama, IDS, edits=[Edit("layers.0", lambda x: x[..., 1:])])
    with pytest.raises(GlassError, match=r"head 6 .*0 … 5"):
        run_with_trace(llama, IDS, edits=[ablate_head(0, 6)])
    _, trace = run_with_trace(llama, IDS, watch=["norm"])
    with pytest.raises(GlassError, match=r"trace: layers\.0 was not watched"):
        trace["layers.0"]
    assert "layers.0" not in trace
    for ids in ([], [37], [-1], [[[1]]]):
        with pytest.raises(GenerationError, match=r"ids must be|outside the vocabulary"):
            run_with_trace(llama, ids)
    assert not any(module._forward_hooks for module in llama.modules())


def test_entropy_of_known_rows() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0]])
    assert attention_entropy(rows[None, None]).tolist() == [[[0.0, 1.0, 2.0, 1.5]]]


def test_norms_of_a_model_that_adds_nothing(llama: Llama) -> None:
    for layer in llama.layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.down.weight.zero_()
    logits, trace = run_with_trace(llama, IDS)
    lengths = llama.tok_embeddings.weight[IDS].norm(dim=-1)
    assert difference(residual_norms(trace), lengths.expand(4, 1, 6)) <= sum_bound(48, 1.0)
    lens = logit_lens(llama, trace, k=3)
    assert lens.ids.shape == lens.probs.shape == (4, 1, 6, 3)
    for layer in range(4):  # the embedding says already what the last layer says
        assert torch.equal(lens.ids[layer, 0], logits[0].topk(3).indices)


def test_the_lens_ends_with_the_models_own_answer(llama: Llama) -> None:
    logits, trace = run_with_trace(llama, IDS)
    lens, own = logit_lens(llama, trace, k=4), predictions(logits, 4)
    assert torch.equal(lens.ids[-1], own.ids)
    # A probability moves by its own share of what the logits move.
    moved = logits_bar(llama.config) * float(logits.abs().max())
    assert ((lens.probs[-1] - own.probs).abs() <= 2 * moved * own.probs).all()
    by_hand = llama.norm(trace["layers.0"]) @ llama.output.weight.T
    assert torch.equal(lens.ids[1, 0, :, 0], by_hand[0].argmax(-1))
    some = logit_lens(llama, trace, k=4, positions=[2, 5])
    assert torch.equal(some.ids, lens.ids[:, :, [2, 5]])


def test_probabilities_sum_to_one(llama: Llama) -> None:
    logits, _ = run_with_trace(llama, IDS, watch=[])
    assert ((predictions(logits, 37).probs.sum(-1) - 1).abs() <= sum_bound(2 * 37, 1.0)).all()
    assert torch.equal(predictions(logits).ids[..., 0], logits.argmax(-1))


@pytest.mark.parametrize(
    "place", ["tok_embeddings", "layers.1.attention.wk", "layers.2.ffn_norm", "norm"]
)
def test_the_first_nan_is_found(llama: Llama, place: str) -> None:
    assert first_non_finite(run_with_trace(llama, IDS)[1]) is None
    weight = llama.get_submodule(place).weight
    weight.view(-1)[0] = math.nan if place != "norm" else math.inf
    trace = run_with_trace(llama, [0, *IDS])[1]
    assert first_non_finite(trace) == place


def test_first_is_in_the_order_of_computation() -> None:
    bad = torch.tensor([math.inf])
    assert first_non_finite(Trace({"a": torch.zeros(1), "c": bad, "b": bad})) == "c"


def test_mistakes_are_made_and_undone(llama: Llama) -> None:
    ids = torch.tensor([IDS])
    right, own = run_with_trace(llama, IDS)
    runs = {}
    for name, mistake in MISTAKES.items():
        with mistaken(llama, mistake):
            wrong, runs[name] = run_with_trace(llama, IDS)
            # Fused and formula alike; scores that are √10 as large enlarge errors as much.
            assert difference(wrong, llama(ids)) <= 4 * logits_bar(llama.config), name
        assert difference(wrong, right) > 1e-3, name
        assert torch.equal(run_with_trace(llama, IDS)[0], right), name
    place = "layers.0.attention.weights"
    assert not own[place].triu(1).any()
    assert (runs["no-mask"][place] > 0).all()
    scores = "layers.0.attention.scores"
    assert_logits(runs["scale"][scores], own[scores] * math.sqrt(10), llama.config, layers=1)
    other = random_llama(rope_layout="interleaved")
    rotated = run_with_trace(other, IDS)[0]
    assert_logits(runs["rope-layout"]["last_logits"], rotated, llama.config)


def test_mistakes_are_undone_after_an_error(llama: Llama) -> None:
    right = llama(torch.tensor([IDS]))
    with pytest.raises(KeyboardInterrupt), mistaken(llama, MISTAKES["no-mask"]):
        raise KeyboardInterrupt
    assert torch.equal(llama(torch.tensor([IDS])), right)


TWICE = """
import resource
import torch
from glassllama.walkthrough.trace import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(100, 1000) for _ in range(200)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_a_pass_freed_serves_the_next_one() -> None:
    """80 MB in pieces: new pages the first time, few the second."""
    said = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, encoding="utf-8", check=True
    ).stdout
    first, second = map(int, said.split())
    assert first > 10_000
    assert second < first / 4  # the system may have taken some back; all of them without the call
