"""The GPT against itself: cached, ragged and packed passes agree; errors."""

from __future__ import annotations

import math

import pytest
import torch

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError, GenerationError
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.llama import Llama
from glassllama.nn.attention import positions_in_segments
from glassllama.nn.init import add_dropout
from tolerances import assert_logits, difference, unit

V, CONTEXT = 37, 30
SIZES = {"dim": 48, "n_layers": 3, "n_heads": 6, "ffn_dim": 70, "vocab_size": V}
IDS = torch.arange(2 * 24).reshape(2, 24) * 29 % V
VARIANTS = [{}, {"activation": "relu"}, {"tie_embeddings": False}, {"bias": False}]


def gpt(**changes: object) -> GPT:
    model = GPT(GPTConfig(**{**SIZES, "max_seq_len": CONTEXT, **changes}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        if parameter.ndim == 1:
            parameter.data += 1.0
    return model.requires_grad_(False)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cuts", [[24], [1] * 24, [10, 1, 1, 12], [1, 23]])
def test_a_prompt_in_chunks_gives_the_same_logits(
    variant: dict[str, object], cuts: list[int]
) -> None:
    model = gpt(**variant)
    cache = model.new_cache(2, 30)
    parts = [model(piece, cache) for piece in IDS.split(cuts, dim=1)]
    assert_logits(torch.cat(parts, dim=1), model(IDS), model.config)
    assert cache.lengths == [24, 24]


def test_rows_of_different_length_are_independent() -> None:
    model = gpt()
    cache = model.new_cache(2, CONTEXT)
    for lengths in ([24, 3], [1, 9]):  # the padding of row 0 is beyond the last position
        starts, width = cache.lengths, max(lengths)
        ids = torch.zeros(2, width, dtype=torch.long)
        for row, n in enumerate(lengths):
            ids[row, :n] = torch.arange(starts[row], starts[row] + n) * 29 % V
        logits = model(ids, cache, lengths=lengths)
        for row, n in enumerate(lengths):
            alone = model(torch.arange(starts[row] + n)[None] * 29 % V)[0, starts[row] :]
            assert_logits(logits[row, :n], alone, model.config)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = gpt()
    changed = IDS.clone()
    changed[:, 12] = (changed[:, 12] + 1) % V
    before, after = model(IDS), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])  # the same matrix products
    assert difference(after[:, 12:], before[:, 12:]) > 0.01


def llama() -> Llama:
    config = LlamaConfig(
        dim=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8, ffn_dim=70, vocab_size=V,
        max_seq_len=64, norm_eps=1e-5, rope_theta=10_000.0,
    )  # fmt: skip
    model = Llama(config)
    model.initialize(torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8.0
    return model.requires_grad_(False)


@pytest.mark.parametrize("model", [gpt(), llama()], ids=["gpt", "llama"])
def test_packed_documents_give_the_same_logits_as_alone(model: GPT | Llama) -> None:
    cuts = [5, 1, 11, 7]
    segments = torch.tensor([[0] * 5 + [1] + [2] * 11 + [3] * 7, [4] * 24])
    together = model(IDS, segments=segments)
    alone = [model(piece)[0] for piece in IDS[:1].split(cuts, dim=1)]
    assert_logits(together[0], torch.cat(alone), model.config)
    assert_logits(together[1], model(IDS[1:])[0], model.config)


def test_every_document_begins_at_position_zero() -> None:
    segments = torch.tensor([[7, 7, 7, 0, 0, 3], [1, 2, 2, 2, 2, 1]])
    assert positions_in_segments(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]


def test_more_tokens_than_positions_is_an_error() -> None:
    model = gpt()
    with pytest.raises(GenerationError, match=r"31.*30 positions"):
        model(torch.zeros(1, 31, dtype=torch.long))
    with pytest.raises(GenerationError, match=r"31 tokens.*holds 30"):
        model(torch.zeros(1, 31, dtype=torch.long), model.new_cache(1, 100))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 5}, r"dim.*48 and 5"),
        ({"dim": 0}, r"dim must be a positive whole number.*got 0"),
        ({"n_layers": 2.0}, r"n_layers.*2\.0"),
        ({"activation": "swish"}, r"gelu_tanh.*'swish'"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_invalid_sizes_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gpt(**change)
    with pytest.raises(ConfigError, match="vocab_size"):
        BigramConfig(vocab_size=0, max_seq_len=3)


def new_models(seed: int) -> list[GPT | Llama | Bigram]:
    shape = {**SIZES, "max_seq_len": 64}
    models = [
        GPT(GPTConfig(**{**shape, "dim": 96, "n_layers": 8})),  # type: ignore[arg-type]
        Llama(
            LlamaConfig(
                **{**shape, "dim": 96, "n_layers": 8}, n_kv_heads=2, head_dim=16,
                norm_eps=1e-5, rope_theta=1e4,
            )  # type: ignore[arg-type]
        ),
        Bigram(BigramConfig(vocab_size=V, max_seq_len=64)),
    ]  # fmt: skip
    for model in models:
        model.initialize(torch.Generator().manual_seed(seed))
    return models


def test_initial_weights_are_reproducible_and_of_the_right_size() -> None:
    for one, same, other in zip(new_models(1), new_models(1), new_models(2), strict=True):
        weights = dict(same.named_parameters())
        for name, weight in one.named_parameters():
            assert torch.equal(weight, weights[name])
            if name.endswith("norm.weight"):
                assert (weight == 1).all()
            elif name.endswith("bias"):
                assert (weight == 0).all()
            else:
                residual = name.endswith(("wo.weight", "down.weight"))
                expected = 0.02 / math.sqrt(16) if residual else 0.02
                assert weight.std().item() == pytest.approx(expected, rel=0.1), name
        assert not torch.equal(one.tok_embeddings.weight, other.tok_embeddings.weight)
        loss = torch.nn.functional.cross_entropy(one(IDS).flatten(0, 1), IDS.roll(-1, 1).flatten())
        assert loss.item() == pytest.approx(math.log(V), abs=0.15)


@pytest.mark.parametrize("make", [gpt, llama])
def test_dropout_acts_in_training_only(make: type) -> None:
    plain, model = make(), make()
    add_dropout(model, 0.3)
    assert torch.equal(model.eval()(IDS), plain(IDS))
    torch.manual_seed(3)
    one = model.train()(IDS)
    torch.manual_seed(3)
    assert torch.equal(model(IDS), one), "results depend on the generator's state"
    assert not torch.equal(model(IDS), one)
    assert difference(one, plain(IDS)) > 0.01


def test_dropout_sets_that_share_to_zero_and_keeps_the_mean() -> None:
    model = gpt(n_layers=1)
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    places = [model.layers[0].attention, model.layers[0].feed_forward]
    for place in places:
        place.register_forward_hook(lambda *call: before.append(call[2]))
    add_dropout(model, 0.25)
    for place in places:
        place.register_forward_hook(lambda *call: after.append(call[2]))
    model(torch.arange(200 * 24).reshape(200, 24) % V)
    for full, left in zip(before, after, strict=True):
        kept = left != 0
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
        rounded = 3 * unit() * full[kept].abs() / 0.75  # the factor, the product, the quotient here
        assert ((left[kept] - full[kept] / 0.75).abs() <= rounded).all()


def test_invalid_dropout_is_refused() -> None:
    for wrong in (1.0, -0.1):
        with pytest.raises(ConfigError, match=str(wrong)):
            add_dropout(gpt(), wrong)
    with pytest.raises(ConfigError, match="Bigram"):
        add_dropout(Bigram(BigramConfig(vocab_size=3, max_seq_len=3)), 0.1)
