"""The reference model against itself: cached, ragged, packed and hooked forward passes agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GenerationError, GlassError
from glassllama.models.llama import Llama
from glassllama.nn.hooks import add_hooks, hook_names
from tolerances import assert_logits, difference, sum_bound, wide

V = 37


def llama(**changes: object) -> Llama:
    values = {
        "dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "ffn_dim": 70,
        "vocab_size": V, "max_seq_len": 64, "norm_eps": 1e-5, "rope_theta": 10_000.0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**values, **changes}))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


IDS = torch.arange(2 * 24).reshape(2, 24) * 29 % V
VARIANTS = [{}, {"rope_layout": "interleaved"}, {"qk_norm": True}, {"tie_embeddings": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cuts", [[24], [1] * 24, [10, 1, 1, 12], [1, 23], [5, 5, 14]])
def test_a_prompt_in_chunks_gives_the_same_logits(
    variant: dict[str, object], cuts: list[int]
) -> None:
    model = llama(**variant)
    cache = model.new_cache(2, 30)
    parts = [model(piece, cache) for piece in IDS.split(cuts, dim=1)]
    assert_logits(torch.cat(parts, dim=1), model(IDS), model.config)
    assert cache.lengths == [24, 24]


def test_rows_of_different_length_are_independent() -> None:
    model, cache = llama(), llama().new_cache(3, 40)
    rows = [IDS[0, :3], IDS[1, :9], IDS[0, :6]]
    steps = [[3, 5, 0], [0, 1, 6], [0, 3, 0]]
    for new in steps:
        starts = list(cache.lengths)
        padded = torch.zeros(3, max(new), dtype=torch.long)
        for row, (start, n) in enumerate(zip(starts, new, strict=True)):
            padded[row, :n] = rows[row][start : start + n]
        logits = model(padded, cache, lengths=new)
        for row, (start, n) in enumerate(zip(starts, new, strict=True)):
            alone = model(rows[row][None])[0, start : start + n]
            assert_logits(logits[row, :n], alone, model.config)
    assert cache.lengths == [3, 9, 6]


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = llama()
    changed = IDS.clone()
    changed[:, 12] = (changed[:, 12] + 1) % V
    before, after = model(IDS), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])  # the same matrix products
    assert difference(after[:, 12:], before[:, 12:]) > 0.01


def test_packed_documents_are_independent() -> None:
    model = llama()
    packed = torch.cat((IDS[0, :8], IDS[1, :9]))[None]
    segments = torch.tensor([[0] * 8 + [1] * 9])
    together = model(packed, segments=segments)[0]
    assert_logits(together[:8], model(IDS[:1, :8])[0], model.config)
    assert_logits(together[8:], model(IDS[1:, :9])[0], model.config)


def test_truncated_cache_continues_from_there() -> None:
    model = llama()
    cache = model.new_cache(1, 30)
    model(IDS[:1], cache)
    cache.truncate(0, 7)
    again = model(IDS[:1, 7:], cache)
    assert_logits(again, model(IDS[:1])[:, 7:], model.config)
    with pytest.raises(GenerationError, match="25"):
        cache.truncate(0, 25)


def test_the_cache_grows_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassllama.nn.kv_cache.FIRST_CAPACITY", 4)
    model = llama()
    cache = model.new_cache(2, 1_000_000)
    parts = [model(piece, cache) for piece in IDS.split([3, 1, 1, 19], dim=1)]
    assert_logits(torch.cat(parts, dim=1), model(IDS), model.config)
    assert cache.keys.shape[3] == 24


def test_the_error_of_a_full_cache_contains_both_sizes() -> None:
    model = llama()
    with pytest.raises(GenerationError, match=r"24.*20"):
        model(IDS, model.new_cache(2, 20))


def test_logits_can_be_computed_in_chunks() -> None:
    model = llama()
    h = model.hidden(IDS)
    parts = torch.cat([model.logits(piece) for piece in h.split(7, dim=1)], 1)
    sizes = h.abs() @ model.output.weight.abs().mT
    apart = np.abs(wide(parts) - wide(model.logits(h)))
    assert (apart <= 2 * sum_bound(model.config.dim, sizes)).all()


def test_hooks_receive_every_intermediate_tensor_and_change_nothing() -> None:
    model, seen = llama(), {}
    with add_hooks(model, [("*", lambda name, out: seen.update({name: out}))]):
        hooked = model(IDS)
    assert_logits(hooked, model(IDS), model.config)
    assert torch.equal(seen["last_logits"], hooked)
    shapes = {name: tuple(tensor.shape) for name, tensor in seen.items() if "layers.1." in name}
    assert {name.removeprefix("layers.1."): shape for name, shape in shapes.items()} == {
        "attention_norm": (2, 24, 48),
        "attention.wq": (2, 24, 60),
        "attention.wk": (2, 24, 20),
        "attention.wv": (2, 24, 20),
        "attention.q": (2, 6, 24, 10),
        "attention.k": (2, 2, 24, 10),
        "attention.v": (2, 2, 24, 10),
        "attention.q_rope": (2, 6, 24, 10),
        "attention.k_rope": (2, 2, 24, 10),
        "attention.scores": (2, 6, 24, 24),
        "attention.weights": (2, 6, 24, 24),
        "attention.heads": (2, 6, 24, 10),
        "attention.wo": (2, 24, 48),
        "attention": (2, 24, 48),
        "after_attention": (2, 24, 48),
        "ffn_norm": (2, 24, 48),
        "feed_forward.gate": (2, 24, 70),
        "feed_forward.up": (2, 24, 70),
        "feed_forward.gated": (2, 24, 70),
        "feed_forward.down": (2, 24, 48),
        "feed_forward": (2, 24, 48),
    }
    assert set(seen) == set(hook_names(model)) - {"layers"}


def test_hooked_attention_weights_with_a_cache() -> None:
    model, seen = llama(), {}
    cache = model.new_cache(2, 30)
    model(IDS[:, :10], cache)
    hooks = [("layers.*.attention.weights", lambda name, out: seen.update({name: out}))]
    with add_hooks(model, hooks):
        model(IDS[:, 10:11], cache)
    assert seen["layers.0.attention.weights"].shape == (2, 6, 1, 11)
    sums = seen["layers.0.attention.weights"].sum(-1)
    assert ((sums - 1).abs() <= 2 * sum_bound(11, 1.0)).all()


def test_a_misspelled_hook_name_is_an_error() -> None:
    hooks = [("layers.*.weigths", lambda name, out: None)]
    with pytest.raises(GlassError, match="weigths"), add_hooks(llama(), hooks):
        pass
