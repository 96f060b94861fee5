"""A saved Llama: read by transformers and the engine, refused by readers that do not support it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from glassllama import load
from glassllama.base.config import GivenDivisors, LinearScaling, Llama3Scaling, LlamaConfig
from glassllama.base.errors import ConfigError
from glassllama.models.llama import Llama
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.save import save_model
from tolerances import assert_logits, assert_same_greedy, difference, logits_tolerance

CHARACTERS = "".join(chr(33 + n) for n in range(60)) + " \n日é🙂"
TOKENIZER = CharTokenizer(CHARACTERS)
V = TOKENIZER.vocab_size
SIZES: dict[str, Any] = {
    "dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "ffn_dim": 72,
    "vocab_size": V, "max_seq_len": 128, "norm_eps": 1e-5, "rope_theta": 20_000.0,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "scaled": {"rope_scaling": Llama3Scaling(factor=8.0, original_max_seq_len=32)},
    "linear": {"rope_scaling": LinearScaling(factor=3.0)},
    "qk norm": {"qk_norm": True},
    "qk norm, scaled": {
        "qk_norm": True,
        "rope_scaling": Llama3Scaling(factor=8.0, original_max_seq_len=32),
    },
}
IDS = torch.arange(2 * 61).reshape(2, 61) * 37 % V


def llama(**change: Any) -> Llama:
    model = Llama(LlamaConfig(**{**SIZES, **change}))
    model.initialize(torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        parameter.data *= 1.0 if "norm" in name else 7.0
    return model.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in VARIANTS if "qk" not in v])
def test_transformers_loads_it(variant: str, tmp_path: Path, parity: Any) -> None:
    model = llama(**VARIANTS[variant])
    save_model(tmp_path, model, TOKENIZER)
    theirs, loading = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), "no missing or unexpected weights"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    apart, bar = difference(theirs(IDS).logits, model(IDS)), logits_tolerance(model.config)
    parity("logits, our Llama folder", "transformers LlamaForCausalLM", bar, apart)
    assert apart <= bar
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (V - 4, V - 3)


@pytest.mark.parametrize("scaling", [None, LinearScaling(factor=3.0)])
def test_transformers_refuses_qk_norm_models(scaling: LinearScaling | None, tmp_path: Path) -> None:
    save_model(tmp_path, llama(qk_norm=True, rope_scaling=scaling), TOKENIZER)
    with pytest.raises((ValueError, KeyError), match="glass_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"\+qk_norm"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    ours = open_checkpoint(tmp_path).config
    assert (ours.qk_norm, ours.rope_scaling) == (True, scaling)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_backends_load_it(variant: str, tmp_path: Path, parity: Any) -> None:
    model = llama(**VARIANTS[variant])
    save_model(tmp_path, model, TOKENIZER)
    expected = model(IDS)[0].numpy()
    ids = IDS[0].tolist()
    torch_llm = load(tmp_path, backend="torch")
    assert_logits(torch_llm.logits(ids), expected, model.config)
    engine = load(tmp_path, exact=True)
    assert engine.backend == "engine"
    assert engine.checkpoint.config == model.config
    apart, bar = difference(engine.logits(ids), expected), logits_tolerance(model.config)
    parity("logits, our Llama folder, engine exact", "models/llama.py", bar, apart)
    assert apart <= bar
    ours, theirs = (llm.generate("日é", max_tokens=20).ids for llm in (engine, torch_llm))
    assert_same_greedy(ours, theirs, TOKENIZER.encode("日é"), torch_llm.logits, bar)


@pytest.mark.identical("ids and text of character vocabularies", "tokenizers")
@pytest.mark.filterwarnings("ignore")
def test_other_libraries_read_our_character_tokenizer(tmp_path: Path) -> None:
    save_model(tmp_path, llama(), TOKENIZER)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (CHARACTERS, "\n\n 日日  é🙂\n", "unknown: {|}~ ö", ""):
        ids = TOKENIZER.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        if TOKENIZER.unknown not in ids:
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.convert_tokens_to_ids(list(TOKENIZER.specials)) == list(
        TOKENIZER.specials.values()
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_layout": "interleaved"}, "interleaved"),
        ({"rope_scaling": GivenDivisors(values=(1.0,) * 5)}, "divisors"),
    ],
)
def test_configurations_that_the_format_cannot_express_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        save_model(tmp_path / "x", llama(**change), TOKENIZER)
    assert not (tmp_path / "x").exists()
