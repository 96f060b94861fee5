"""Fused training blocks against the model, and their kernels against autograd."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glassllama.base.layer_plan import llama_plan
from glassllama.models.llama import Llama
from glassllama.native.training import kernels
from glassllama.native.training.blocks import can_fuse, fuse_blocks
from glassllama.nn.init import add_dropout
from tolerances import logits_tolerance, unit
from train.recipes import small_llama


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_fused_blocks_equal_the_model(qk_norm: bool, packed: bool) -> None:
    """Logits and every gradient differ from float32 only by the rounding to bfloat16."""
    model = small_llama(qk_norm=qk_norm)
    fused = copy.deepcopy(model)
    fuse_blocks(fused)
    ids = torch.randint(69, (3, 17), generator=torch.Generator().manual_seed(5))
    segments = (torch.arange(17) >= 7).long().expand(3, -1) if packed else None
    exact = tensors_of_step(model, ids, segments)
    quick = tensors_of_step(fused, ids, segments)
    bar = logits_tolerance(model.config, torch.bfloat16, layers=2 * model.config.n_layers)
    for name, tensor in exact.items():
        assert (quick[name] - tensor).norm() <= bar * tensor.norm(), name


def test_blocks_with_other_operations_are_not_fused() -> None:
    plan = llama_plan(small_llama(qk_norm=True).config)
    block = plan.blocks[1]
    attention, ffn = block.attention, block.feed_forward
    assert attention.rope is not None
    changes = [
        replace(attention, scale=attention.scale / 2),
        replace(attention, window=5),
        replace(attention, softcap=30.0),
        replace(attention, qk_norm="per_head"),
        replace(attention, biases=frozenset("q")),
        replace(attention, rope=None),
        replace(attention, rope=replace(attention.rope, layout="interleaved")),
        replace(attention, rope=replace(attention.rope, frequencies=(0.5,))),
    ]
    others = [replace(block, attention=changed) for changed in changes]
    others += [replace(block, feed_forward=replace(ffn, activation="gelu_tanh"))]
    others += [replace(block, residual_multiplier=0.5)]
    others += [replace(block, norms=frozenset({"post_attention", "post_ffn"}))]
    assert can_fuse(plan)
    assert can_fuse(replace(plan, blocks=(block,)))
    for other in others:
        assert not can_fuse(replace(plan, blocks=(block, other))), other


def tensors_of_step(
    model: Llama, ids: torch.Tensor, segments: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(ids, segments=segments)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **gradients}


def test_fused_blocks_apply_dropout_in_training_only() -> None:
    model = small_llama()
    add_dropout(model, 0.5)
    fuse_blocks(model, dropout=0.5)
    ids = torch.randint(69, (3, 17))
    inner = small_llama()  # the hook on the embeddings is the model's own; drop it here
    fuse_blocks(inner, dropout=0.5)
    for each in (model, inner):
        torch.manual_seed(1)
        first, again = each.train()(ids), each(ids)
        torch.manual_seed(1)
        assert torch.equal(each(ids), first)
        assert not torch.equal(first, again)
        assert torch.equal(each.eval()(ids), each(ids))


def test_fused_blocks_with_a_cache_run_the_model_itself() -> None:
    model = small_llama()
    fused = copy.deepcopy(model)
    fuse_blocks(fused)
    ids = torch.randint(69, (1, 9))
    with torch.inference_mode():
        assert torch.equal(model(ids, model.new_cache(1, 16)), fused(ids, fused.new_cache(1, 16)))


def test_backward_kernels_are_the_derivatives() -> None:
    """Each backward kernel against float64 autograd of the formula, one row at a time."""
    chance = np.random.default_rng(1)
    both = torch.tensor(chance.normal(size=(5, 12))).bfloat16().double().requires_grad_()
    d_out = torch.tensor(chance.normal(size=(5, 6))).bfloat16().double()
    gate, up = both.chunk(2, dim=1)
    out = F.silu(gate) * up
    out.backward(d_out)
    product = [as_bits(t.detach()) for t in (both, d_out)]
    found, d_both = np.empty((5, 6), np.int16), np.empty((5, 12), np.int16)
    kernels.swiglu(product[0], found)
    kernels.swiglu_backward(*product, d_both)
    once = 1.01 * unit(torch.bfloat16)  # computed in float32 and rounded once
    assert np.allclose(from_bits(found), out.detach(), rtol=once, atol=1e-6)
    assert np.allclose(from_bits(d_both), both.grad, rtol=once, atol=1e-6)


def as_bits(x: torch.Tensor) -> Any:
    return x.to(torch.bfloat16).view(torch.int16).numpy()


def from_bits(bits: Any) -> Any:
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
