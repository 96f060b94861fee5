"""The parts of a step against other statements of the same: Muon, loss, means, fast layers."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from glassllama.base.config import LlamaConfig
from glassllama.models.llama import Llama
from glassllama.native.training import kernels
from glassllama.native.training.blocks import accelerate
from glassllama.nn.dropout import add_dropout
from glassllama.train.adamw import STATE, AdamW
from glassllama.train.ema import Average
from glassllama.train.loss import summed_loss
from glassllama.train.muon import Muon, orthogonalise
from glassllama.train.optimizers import Optimisers
from glassllama.train.settings import OptimiserSettings
from tolerances import CONDITION, assert_logits, difference, logits_bar, unit


def small_llama(vocab_size: int = 69, **changes: Any) -> Llama:
    """All sizes different, weights large enough that every part matters."""
    sizes = {
        "dim": 40, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 12, "ffn_dim": 56,
        "vocab_size": vocab_size, "max_seq_len": 32, "norm_eps": 1e-5, "rope_theta": 10_000.0,
        "tie_embeddings": True,
    }  # fmt: skip
    model = Llama(LlamaConfig(**{**sizes, **changes}))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.3 * noise + (parameter.ndim == 1)
    return model


# --- Muon -----------------------------------------------------------------------------------


def test_orthogonalised_matrices_have_the_directions_of_the_svd() -> None:
    gradients = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(1))
    u, s, vt = torch.linalg.svd(orthogonalise(gradients), full_matrices=False)
    exact_u, _, exact_vt = torch.linalg.svd(gradients, full_matrices=False)
    assert 0.6 < float(s.min()) <= float(s.max()) < 1.3
    polar = (exact_u @ exact_vt) * (u @ vt)
    assert float(polar.sum(dim=(1, 2)).min()) > 0.97 * 24  # cosine to U·Vᵀ, which measures √24
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_a_step_of_muon_is_the_published_rule_matrix_by_matrix() -> None:
    """The oracle takes one matrix at a time, in float64, as the papers write it."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"wide": (6, 10), "tall": (10, 6), "square": (8, 8), "tall too": (10, 6)}
    named = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    expected = {name: p.detach().double() for name, p in named.items()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    muon = Muon(named, lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(3):
        for name, parameter in named.items():
            parameter.grad = torch.randn(shapes[name], generator=generator)
            gradient = parameter.grad.double()
            momenta[name] = 0.9 * momenta[name] + 0.1 * gradient
            ahead = 0.1 * gradient + 0.9 * momenta[name]
            u, s, vt = torch.linalg.svd(ahead, full_matrices=False)
            for _ in range(5):
                s = s / (math.sqrt(float((s**2).sum())) if _ == 0 else 1.0)
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            step = 0.2 * math.sqrt(max(shapes[name])) * (u * s) @ vt
            expected[name] = expected[name] * (1 - 0.1 * 0.2) - 0.1 * step
        muon.step()
    for name, parameter in named.items():
        # Fifteen products in bfloat16 make the direction of each of three steps.
        moved = 3 * 0.1 * 0.2 * math.sqrt(max(shapes[name]))
        bound = CONDITION * unit(torch.bfloat16) * math.sqrt(15) * moved
        assert float((parameter.detach() - expected[name]).abs().max()) < bound, name


def test_adamw_is_pytorchs() -> None:
    """Weights, means and squares of some steps, with and without decay, by PyTorch's own plain
    loop; a parameter without a gradient is left alone, and begins when it has one."""
    torch.manual_seed(0)
    shapes, rate = [(7, 5), (11,), (3,)], 0.01
    ours, theirs = ([torch.nn.Parameter(torch.full(s, 0.5)) for s in shapes] for _ in range(2))
    settings = {"lr": rate, "betas": (0.8, 0.95), "eps": 1e-6}
    mine, other = (
        make([{"params": w[:1], "weight_decay": 0.3}, {"params": w[1:], "weight_decay": 0.0}],
             **settings, **more)
        for make, w, more in ((AdamW, ours, {}), (torch.optim.AdamW, theirs, {"foreach": False}))
    )  # fmt: skip
    for step in range(9):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape) if a.shape != (3,) or step > 4 else None
            b.grad = None if a.grad is None else a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        for key in STATE:
            apart = (mine.state[a][key] - other.state[b][key]).abs().max()
            assert float(apart) <= 9 * 4 * unit(), key  # nine steps of some roundings; numbers < 4
        assert float((a - b).detach().abs().max()) <= 9 * 8 * rate * unit() + 2 * unit()
    assert float(mine.state[ours[2]]["step"]) == 4


def test_muon_has_the_matrices_of_layers_and_adamw_the_rest() -> None:
    model = small_llama()
    both = Optimisers(model, OptimiserSettings(kind="muon", lr=0.01, weight_decay=0.5))
    assert both.muon is not None
    with_muon = {name for stack in both.muon.stacks.values() for name in stack}
    assert with_muon == {
        f"layers.{n}.{part}.weight"
        for n in range(2)
        for part in (
            *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo")),
            *(f"feed_forward.{w}" for w in ("gate", "up", "down")),
        )
    }
    assert len(both.muon.stacks) == 3  # wq with wo, wk with wv, gate and up with down
    decayed = {id(p) for p in both.adamw.param_groups[0]["params"]}
    assert decayed == {id(model.tok_embeddings.weight)}


# --- loss -----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_loss_in_pieces_is_the_loss_and_never_holds_all_logits() -> None:
    vocabulary, positions = 1031, 96
    model = small_llama(vocabulary)
    targets = torch.randint(vocabulary, (4, 24))
    targets[1, 5] = -100
    hidden = torch.randn(4, 24, 40, requires_grad=True)
    whole = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    whole.backward()
    expected, weights = hidden.grad, model.tok_embeddings.weight.grad
    for chunk in (7, 32, 95, 96, 500):
        hidden.grad, model.tok_embeddings.weight.grad = None, None
        with Largest() as largest:
            loss = summed_loss(model, hidden, targets, chunk)
            loss.backward()
        assert_logits(loss.detach(), whole.detach(), model.config, layers=1)
        assert_logits(hidden.grad, expected, model.config, layers=1)
        assert_logits(model.tok_embeddings.weight.grad, weights, model.config, layers=1)
        assert largest.numbers <= vocabulary * max(40, min(chunk, positions))


# --- running mean ---------------------------------------------------------------------------


def test_the_mean_is_of_all_weights_so_far_and_lends_itself() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    average = Average(layer, decay=0.9)
    mean = layer.weight.detach().clone()
    for step in range(1, 200):
        layer.weight.data.fill_(float(step))
        average.update(step)
        share = min(0.9, step / (step + 9))
        mean = share * mean + (1 - share) * step
    # A mean of decay 0.9 remembers the roundings of ten steps; three of each step, here and there.
    assert difference(average.means["weight"], mean) <= 2 * 3 * 10 * unit()
    with average.in_place():
        assert torch.equal(layer.weight, average.means["weight"])
    assert torch.equal(layer.weight, torch.full((1, 2), 199.0))


# --- the fast layer -------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_fast_layers_compute_what_the_model_says(qk_norm: bool, packed: bool) -> None:
    """Logits and every gradient: as far from float32 as rounding to bfloat16 explains, forwards
    and backwards."""
    model = small_llama(qk_norm=qk_norm)
    fast = copy.deepcopy(model)
    accelerate(fast)
    ids = torch.randint(69, (3, 17), generator=torch.Generator().manual_seed(5))
    segments = (torch.arange(17) >= 7).long().expand(3, -1) if packed else None
    exact = tensors_of_step(model, ids, segments)
    quick = tensors_of_step(fast, ids, segments)
    bar = logits_bar(model.config, torch.bfloat16, layers=2 * model.config.n_layers)
    for name, tensor in exact.items():
        assert (quick[name] - tensor).norm() <= bar * tensor.norm(), name


def tensors_of_step(
    model: Llama, ids: torch.Tensor, segments: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(ids, segments=segments)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **gradients}


def test_fast_layers_drop_out_in_training_only() -> None:
    model = small_llama()
    add_dropout(model, 0.5)
    accelerate(model, dropout=0.5)
    ids = torch.randint(69, (3, 17))
    inner = small_llama()  # the hook on the embeddings is the model's own; drop it here
    accelerate(inner, dropout=0.5)
    for each in (model, inner):
        torch.manual_seed(1)
        first, again = each.train()(ids), each(ids)
        torch.manual_seed(1)
        assert torch.equal(each(ids), first)
        assert not torch.equal(first, again)
        assert torch.equal(each.eval()(ids), each(ids))


def test_fast_layers_with_a_cache_are_the_model_itself() -> None:
    model = small_llama()
    fast = copy.deepcopy(model)
    accelerate(fast)
    ids = torch.randint(69, (1, 9))
    with torch.inference_mode():
        assert torch.equal(model(ids, model.new_cache(1, 16)), fast(ids, fast.new_cache(1, 16)))


def test_kernels_are_the_derivatives_of_each_other() -> None:
    """Each backward kernel against float64 autograd of the formula, one row at a time."""
    chance = np.random.default_rng(1)
    both = torch.tensor(chance.normal(size=(5, 12))).bfloat16().double().requires_grad_()
    d_out = torch.tensor(chance.normal(size=(5, 6))).bfloat16().double()
    gate, up = both.chunk(2, dim=1)
    out = F.silu(gate) * up
    out.backward(d_out)
    narrow = [as_bits(t.detach()) for t in (both, d_out)]
    found, d_both = np.empty((5, 6), np.int16), np.empty((5, 12), np.int16)
    kernels.gate(narrow[0], found)
    kernels.ungate(*narrow, d_both)
    once = 1.01 * unit(torch.bfloat16)  # float32 inside, and rounded once
    assert np.allclose(from_bits(found), out.detach(), rtol=once, atol=1e-6)
    assert np.allclose(from_bits(d_both), both.grad, rtol=once, atol=1e-6)


def as_bits(x: torch.Tensor) -> Any:
    return x.to(torch.bfloat16).view(torch.int16).numpy()


def from_bits(bits: Any) -> Any:
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
