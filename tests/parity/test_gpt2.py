"""The GPT against transformers' GPT-2, in both directions: reading its folders, and it reading
ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from glassllama.models.gpt import GPT, GPTConfig
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model
from glassllama.weights.save import save_model
from rows import Rows
from tolerances import difference, logits_tolerance

ORACLE = "transformers GPT2LMHeadModel"
SIZES: dict[str, Any] = {
    "n_embd": 30, "n_layer": 3, "n_head": 5, "vocab_size": 131, "n_positions": 67, "n_inner": 77,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {**SIZES, "n_inner": None},
    "odd ffn": SIZES,
    "relu": {**SIZES, "activation_function": "relu"},
    "exact gelu": {**SIZES, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "own output": {**SIZES, "tie_word_embeddings": False},
    "one head": {**SIZES, "n_head": 1, "activation_function": "gelu_pytorch_tanh"},
}
IDS = torch.arange(2 * 61).reshape(2, 61) * 37 % 131


def theirs(**shape: Any) -> GPT2LMHeadModel:
    """A random GPT-2 of transformers, with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
        if parameter.ndim == 1:
            parameter.data += 0.5
    return model


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_transformers(variant: str, tmp_path: Path, parity: Any) -> None:
    model = theirs(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    ours = load_model(checkpoint)
    apart, bar = difference(ours(IDS), model(IDS).logits), logits_tolerance(ours.config)
    parity("logits, GPT-2, safetensors", ORACLE, bar, apart)
    assert apart <= bar
    assert ours.config.ffn_dim == (VARIANTS[variant]["n_inner"] or 120)  # type: ignore[union-attr]
    assert checkpoint.notes == ["a GPT runs on the torch backend only"]


@torch.no_grad()
def test_with_a_cache_in_chunks(tmp_path: Path, parity: Any) -> None:
    model = theirs(**SIZES)
    model.save_pretrained(tmp_path)
    ours = load_model(open_checkpoint(tmp_path))
    executor, bar = TorchExecutor(ours), logits_tolerance(ours.config)
    cache = Rows(executor, 2)
    rows = IDS.tolist()
    apart = 0.0
    for start, stop in ((0, 40), (40, 41), (41, 61)):
        last = cache.next_logits([row[start:stop] for row in rows])
        apart = max(apart, difference(last, model(IDS[:, :stop]).logits[:, -1]))
    parity("logits with cache, GPT-2", ORACLE, bar, apart)
    assert apart <= bar


@torch.no_grad()
@pytest.mark.parametrize("tied_again", [False, True])
def test_the_oldest_files(tied_again: bool, tmp_path: Path, parity: Any) -> None:
    """OpenAI's original files: names without a prefix, stored masks, a second copy of the tied
    output."""
    model = theirs(**SIZES)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    for n in range(SIZES["n_layer"]):
        old[f"h.{n}.attn.bias"] = torch.ones(1, 1, 67, 67).tril()
        old[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    if tied_again:
        old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, path)
    ours = load_model(open_checkpoint(tmp_path))
    apart, bar = difference(ours(IDS), model(IDS).logits), logits_tolerance(ours.config)
    parity("logits, GPT-2, names of the first release", ORACLE, bar, apart)
    assert apart <= bar


@torch.no_grad()
def test_a_bfloat16_file_stays_bfloat16(tmp_path: Path) -> None:
    model = theirs(**SIZES).bfloat16()
    model.save_pretrained(tmp_path)
    ours = load_model(open_checkpoint(tmp_path))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    wide = load_model(open_checkpoint(tmp_path), dtype=torch.float32)
    assert difference(wide(IDS), model.float()(IDS).logits) <= logits_tolerance(wide.config)


CONFIG: dict[str, Any] = {
    "dim": 30, "n_layers": 3, "n_heads": 5, "ffn_dim": 77, "vocab_size": 131, "max_seq_len": 67,
}  # fmt: skip
TOKENIZER = CharTokenizer(chr(33 + n) for n in range(127))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{}, {"bias": False}, {"tie_embeddings": False, "activation": "relu"}, {"activation": "gelu"}],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_transformers_reads_our_folder_and_we_read_it_back(
    change: dict[str, Any], tmp_path: Path, parity: Any
) -> None:
    model = GPT(GPTConfig(**{**CONFIG, **change}))
    model.initialize(torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        parameter.data = parameter.data * 8.0 if parameter.ndim > 1 else parameter.data + 0.1
    save_model(tmp_path, model, TOKENIZER)
    other, loading = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), "no missing or unexpected weights"
    apart, bar = difference(model(IDS), other.eval()(IDS).logits), logits_tolerance(model.config)
    parity("logits, our GPT folder", ORACLE, bar, apart)
    assert apart <= bar
    again = load_model(open_checkpoint(tmp_path))
    assert again.config == model.config
    weights = dict(again.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"activation_function": "swish"},
            r"activation_function must be one of gelu_new, .*'swish'",
        ),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": 7}, "dim must be a multiple of n_heads"),
        ({"n_layer": 4}, r"missing transformer\.h\.3\.ln_1\.weight"),
        ({"vocab_size": 130}, r"wte\.weight is 131×30, the configuration says 130×30"),
        ({"n_inner": 80}, r"c_fc\.weight is 30×77, the configuration says 30×80"),
        ({"bias": False}, "not zero"),
        ({"n_embd": None}, "n_embd is missing"),
    ],
    ids=str,
)
def test_unsupported_configurations_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    from glassllama.base.errors import GlassError

    theirs(**SIZES).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(GlassError, match=words):
        open_checkpoint(tmp_path)
