"""Muon, AdamW, EMA weights and the loss, each against a plain implementation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from glassllama.train.loop import summed_loss
from glassllama.train.optimizers import EMA, STATE, AdamW, Muon, Optimizers, orthogonalize
from glassllama.train.settings import OptimizerSettings
from tolerances import CONDITION, assert_logits, difference, unit
from train.recipes import small_llama

# --- Muon -----------------------------------------------------------------------------------


def test_orthogonalized_matrices_have_the_directions_of_the_svd() -> None:
    gradients = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(1))
    u, s, vt = torch.linalg.svd(orthogonalize(gradients), full_matrices=False)
    exact_u, _, exact_vt = torch.linalg.svd(gradients, full_matrices=False)
    assert 0.6 < float(s.min()) <= float(s.max()) < 1.3
    polar = (exact_u @ exact_vt) * (u @ vt)
    assert float(polar.sum(dim=(1, 2)).min()) > 0.97 * 24  # cosine to U·Vᵀ, which measures √24
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_a_step_of_muon_is_the_published_rule_matrix_by_matrix() -> None:
    """The reference computes one matrix at a time in float64, as in the papers."""
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


def test_adamw_equals_pytorchs() -> None:
    """Weights, means and squares of some steps, with and without decay, against PyTorch's own loop;
    a parameter without a gradient is not changed, and starts when it has one."""
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


def test_muon_updates_the_matrices_of_layers_and_adamw_the_rest() -> None:
    model = small_llama()
    both = Optimizers(model, OptimizerSettings(kind="muon", lr=0.01, weight_decay=0.5))
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


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation creates, in elements."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_chunked_loss_equals_the_loss_and_never_allocates_all_logits() -> None:
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
        with LargestTensor() as largest:
            loss = summed_loss(model, hidden, targets, chunk)
            loss.backward()
        assert_logits(loss.detach(), whole.detach(), model.config, layers=1)
        assert_logits(hidden.grad, expected, model.config, layers=1)
        assert_logits(model.tok_embeddings.weight.grad, weights, model.config, layers=1)
        assert largest.numbers <= vocabulary * max(40, min(chunk, positions))


# --- running mean ---------------------------------------------------------------------------


def test_ema_is_the_mean_of_weights_and_is_swapped_in_temporarily() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    ema = EMA(layer, decay=0.9)
    mean = layer.weight.detach().clone()
    for step in range(1, 200):
        layer.weight.data.fill_(float(step))
        ema.update(step)
        share = min(0.9, step / (step + 9))
        mean = share * mean + (1 - share) * step
    # With decay 0.9 the roundings of ten steps add up; three per step, in both computations.
    assert difference(ema.means["weight"], mean) <= 2 * 3 * 10 * unit()
    with ema.in_place():
        assert torch.equal(layer.weight, ema.means["weight"])
    assert torch.equal(layer.weight, torch.full((1, 2), 199.0))
