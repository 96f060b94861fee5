"""Traces: recorded tensors against the formulas, interventions, logit lens, entropy, NaN."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from glassllama import load
from glassllama.base.errors import GenerationError, GlassError, MissingExtraError
from glassllama.models.llama import Llama
from glassllama.walkthrough import (
    Intervention,
    Trace,
    ablate_head,
    attention_entropy,
    logit_lens,
    patch,
    predictions,
    residual_norms,
    trace,
)
from glassllama.walkthrough.mistakes import MISTAKES, with_mistake
from tolerances import assert_logits, difference, logits_tolerance, sum_bound
from walkthrough.conftest import random_llama

IDS, OTHER = [5, 9, 1, 33, 9, 0], [5, 9, 7, 33, 9, 12]


def loops(model: Llama, ids: list[int]) -> dict[str, np.ndarray]:
    """Layer 0 in float64 in plain loops, using nothing of this package but the weights."""
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


def test_recorded_tensors_equal_the_formulas(llama: Llama) -> None:
    recorded = trace(llama, IDS)
    assert_logits(recorded.logits, llama(torch.tensor([IDS])), llama.config)
    assert recorded.ids.tolist() == [IDS]
    for name, expected in loops(llama, IDS).items():
        assert recorded[name].shape == (1, *expected.shape), name
        assert_logits(recorded[name][0], expected, llama.config, layers=1)


def nbytes(recorded: Trace) -> int:
    """Memory of the tensors; what several names share counts once."""
    storages = [tensor.untyped_storage() for tensor in recorded.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_only_the_named_hooks_are_recorded(llama: Llama) -> None:
    recorded = trace(llama, IDS, hooks=["layers.*.attention.q", "norm"])
    assert list(recorded) == [f"layers.{n}.attention.q" for n in range(3)] + ["norm"]
    assert nbytes(recorded) == 4 * len(IDS) * (3 * 60 + 48)
    last = trace(llama, IDS, hooks=["layers.*.attention.q"], positions=[1, -1 % 6])
    assert nbytes(last) == 4 * 2 * 3 * 60
    for name, tensor in last.items():
        assert torch.equal(tensor, recorded[name][..., [1, 5], :])


def test_shared_memory_counts_once_and_all_hooks_are_removed(llama: Llama) -> None:
    recorded = trace(llama, IDS, hooks=["layers.0.attention", "layers.0.attention.wo"])
    assert len(recorded) == 2
    assert nbytes(recorded) == 4 * len(IDS) * 48
    assert not any(module._forward_hooks for module in llama.modules())


def test_a_traced_run_fills_a_cache(llama: Llama) -> None:
    cache = llama.new_cache(1, 8)
    trace(llama, IDS[:4], cache=cache)
    recorded = trace(llama, IDS[4:], cache=cache)
    assert cache.lengths == [6]
    assert recorded["layers.2.attention.weights"].shape == (1, 6, 2, 6)
    assert_logits(recorded.logits, llama(torch.tensor([IDS]))[:, 4:], llama.config)


def test_batches_are_traced(llama: Llama) -> None:
    recorded = trace(llama, torch.tensor([IDS, OTHER]), hooks=["layers.*.ffn_norm"])
    assert recorded["layers.1.ffn_norm"].shape == (2, 6, 48)
    alone = trace(llama, OTHER, hooks=["layers.*.ffn_norm"])
    assert_logits(recorded["layers.1.ffn_norm"][1:], alone["layers.1.ffn_norm"], llama.config)


def test_ablating_a_head_equals_zero_columns_in_wo(llama: Llama) -> None:
    ablated = trace(llama, IDS, interventions=[ablate_head(1, 4)])
    assert not ablated["layers.1.attention.heads"][:, 4].any()
    other = random_llama()
    other.layers[1].attention.wo.weight[:, 40:50] = 0
    assert_logits(ablated.logits, other(torch.tensor([IDS])), llama.config)
    assert difference(ablated.logits, llama(torch.tensor([IDS]))) > 0.01


def test_patching_all_positions_gives_the_logits_of_the_other_run(llama: Llama) -> None:
    source = trace(llama, OTHER, hooks=["layers.1"])
    patched = trace(llama, IDS, hooks=[], interventions=[patch("layers.1", source)])
    assert_logits(patched.logits, source.logits, llama.config)


def test_patching_one_position_does_not_change_earlier_positions(llama: Llama) -> None:
    own = trace(llama, IDS, hooks=["layers.0"])
    source = trace(llama, OTHER, hooks=["layers.0"])
    patched = trace(
        llama, IDS, hooks=["layers.0"], interventions=[patch("layers.0", source, positions=[2])]
    )
    assert torch.equal(patched["layers.0"][:, 2], source["layers.0"][:, 2])
    assert torch.equal(patched["layers.0"][:, 3:], own["layers.0"][:, 3:])
    assert_logits(patched.logits[:, :2], own.logits[:, :2], llama.config)
    assert difference(patched.logits[:, 2:], own.logits[:, 2:]) > 0.01


def test_interventions_are_applied_in_their_order(llama: Llama) -> None:
    both = [Intervention("layers.0", lambda x: x + 1), Intervention("layers.0", lambda x: 2 * x)]
    plain = trace(llama, IDS, hooks=["layers.0"])
    changed = trace(llama, IDS, hooks=["layers.0"], interventions=both)
    assert torch.equal(changed["layers.0"], 2 * (plain["layers.0"] + 1))


def test_errors_name_the_hook(llama: Llama) -> None:
    with pytest.raises(GlassError, match="weigths"):
        trace(llama, IDS, hooks=["layers.*.weigths"])
    with pytest.raises(GlassError, match="layrs"):
        trace(llama, IDS, interventions=[Intervention("layrs.0", lambda x: x)])
    with pytest.raises(GlassError, match=r"layers\.0.*\(1, 6, 48\).*\(1, 6, 47\)"):
        trace(llama, IDS, interventions=[Intervention("layers.0", lambda x: x[..., 1:])])
    with pytest.raises(GlassError, match=r"head 6 .*0 … 5"):
        trace(llama, IDS, interventions=[ablate_head(0, 6)])
    recorded = trace(llama, IDS, hooks=["norm"])
    with pytest.raises(GlassError, match=r"layers\.0 was not recorded"):
        recorded["layers.0"]
    assert "layers.0" not in recorded
    for ids in ([], [37], [-1], [[[1]]]):
        with pytest.raises(GenerationError, match=r"ids must be|outside the vocabulary"):
            trace(llama, ids)
    assert not any(module._forward_hooks for module in llama.modules())


def test_entropy_of_known_rows() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0]])
    assert attention_entropy(rows[None, None]).tolist() == [[[0.0, 1.0, 2.0, 1.5]]]


def test_residual_norms_and_lens_of_layers_that_add_nothing(llama: Llama) -> None:
    for layer in llama.layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.down.weight.zero_()
    recorded = trace(llama, IDS)
    lengths = llama.tok_embeddings.weight[IDS].norm(dim=-1)
    assert difference(residual_norms(recorded), lengths.expand(4, 1, 6)) <= sum_bound(48, 1.0)
    lens = logit_lens(llama, recorded, k=3)
    assert lens.ids.shape == lens.probs.shape == (4, 1, 6, 3)
    for layer in range(4):  # the lens of the embedding is that of the last layer
        assert torch.equal(lens.ids[layer, 0], recorded.logits[0].topk(3).indices)


def test_the_last_lens_is_the_prediction_of_the_model(llama: Llama) -> None:
    recorded = trace(llama, IDS)
    logits = recorded.logits
    lens, own = logit_lens(llama, recorded, k=4), predictions(logits, 4)
    assert torch.equal(lens.ids[-1], own.ids)
    # The relative change of a probability is the change of the logits.
    moved = logits_tolerance(llama.config) * float(logits.abs().max())
    assert ((lens.probs[-1] - own.probs).abs() <= 2 * moved * own.probs).all()
    by_hand = llama.norm(recorded["layers.0"]) @ llama.output.weight.T
    assert torch.equal(lens.ids[1, 0, :, 0], by_hand[0].argmax(-1))
    some = logit_lens(llama, recorded, k=4, positions=[2, 5])
    assert torch.equal(some.ids, lens.ids[:, :, [2, 5]])


def test_probabilities_sum_to_one(llama: Llama) -> None:
    logits = trace(llama, IDS, hooks=[]).logits
    assert ((predictions(logits, 37).probs.sum(-1) - 1).abs() <= sum_bound(2 * 37, 1.0)).all()
    assert torch.equal(predictions(logits).ids[..., 0], logits.argmax(-1))


@pytest.mark.parametrize(
    "hook", ["tok_embeddings", "layers.1.attention.wk", "layers.2.ffn_norm", "norm"]
)
def test_the_first_nan_is_found(llama: Llama, hook: str) -> None:
    assert trace(llama, IDS).first_non_finite() is None
    weight = llama.get_submodule(hook).weight
    weight.view(-1)[0] = math.nan if hook != "norm" else math.inf
    assert trace(llama, [0, *IDS]).first_non_finite() == hook


def test_the_first_nan_is_first_in_the_order_of_computation() -> None:
    bad = torch.tensor([math.inf])
    tensors = {"a": torch.zeros(1), "c": bad, "b": bad}
    assert Trace(tensors, ids=bad, logits=bad).first_non_finite() == "c"


def test_mistakes_are_applied_and_undone(llama: Llama) -> None:
    ids = torch.tensor([IDS])
    own = trace(llama, IDS)
    right = own.logits
    runs = {}
    for name, mistake in MISTAKES.items():
        with with_mistake(llama, mistake):
            runs[name] = trace(llama, IDS)
            wrong = runs[name].logits
            # Both fused and formula; scores that are √10 times as large enlarge errors as much.
            assert difference(wrong, llama(ids)) <= 4 * logits_tolerance(llama.config), name
        assert difference(wrong, right) > 1e-3, name
        assert torch.equal(trace(llama, IDS).logits, right), name
    weights = "layers.0.attention.weights"
    assert not own[weights].triu(1).any()
    assert (runs["no-mask"][weights] > 0).all()
    scores = "layers.0.attention.scores"
    assert_logits(runs["scale"][scores], own[scores] * math.sqrt(10), llama.config, layers=1)
    other = random_llama(rope_layout="interleaved")
    rotated = trace(other, IDS).logits
    assert_logits(runs["rope-layout"]["last_logits"], rotated, llama.config)


def test_mistakes_are_undone_after_an_error(llama: Llama) -> None:
    right = llama(torch.tensor([IDS]))
    with pytest.raises(KeyboardInterrupt), with_mistake(llama, MISTAKES["no-mask"]):
        raise KeyboardInterrupt
    assert torch.equal(llama(torch.tensor([IDS])), right)


TWICE = """
import resource
import torch
from glassllama.walkthrough.tracing import retain_freed_memory
retain_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(100, 1000) for _ in range(200)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is part of glibc")
def test_freed_memory_is_reused_by_the_next_pass() -> None:
    """80 MB in pieces: new pages the first time, few new pages the second time."""
    printed = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, encoding="utf-8", check=True
    ).stdout
    first, second = map(int, printed.split())
    assert first > 10_000
    assert (
        second < first / 4
    )  # the system may have reclaimed some pages; without the call all are new


def test_a_trace_of_an_llm_has_the_tensors_of_its_model(with_text: Path) -> None:
    llm = load(with_text, backend="torch")
    recorded = llm.trace("lambda forms", hooks=["layers.*"])
    assert recorded.ids.tolist() == [llm.encode("lambda forms")]
    layer = llm.model.layers[1]
    expected = layer.attention.wq(layer.attention_norm(recorded["layers.0"]))
    assert_logits(recorded["layers.1.attention.wq"], expected, llm.model.config, layers=1)
    assert_logits(recorded.logits[0], llm.logits(llm.encode("lambda forms")), llm.model.config)
    some = llm.trace(recorded.ids[0].tolist(), hooks=["norm"], positions=[0])
    assert some["norm"].shape == (1, 1, llm.model.config.dim)


def test_an_intervention_in_an_llm_changes_its_logits(with_text: Path) -> None:
    llm = load(with_text, backend="torch")
    plain = llm.trace("lambda forms", hooks=["norm"])
    doubled = [Intervention("norm", lambda x: 2 * x)]
    changed = llm.trace("lambda forms", hooks=["last_logits"], interventions=doubled)
    by_hand = 2 * plain["norm"] @ llm.model.get_parameter("output.weight").T
    assert_logits(changed["last_logits"], by_hand, llm.model.config, layers=1)
    assert torch.equal(changed.logits, changed["last_logits"])


def test_the_reference_model_of_an_engine_is_loaded_once(with_text: Path) -> None:
    llm = load(with_text, backend="engine", exact=True)
    assert isinstance(llm.model, Llama)
    assert llm.model is llm.model


def test_tracing_without_pytorch_names_the_extra(
    with_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(with_text, backend="torch")
    monkeypatch.setitem(sys.modules, "glassllama.weights.load", None)
    with pytest.raises(MissingExtraError, match=r"PyTorch reference model.*torch"):
        llm.trace("lambda")
