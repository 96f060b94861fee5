"""All families of decoders against transformers: reference model and engine, both file formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from glassllama.base.errors import GlassError
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import load_model
from glassllama.weights.pack import pack
from glassllama.weights.save import save_model
from rows import Rows
from tiny_families import FAMILIES, GGUF_NAMES, LONG, family_model, write_family_gguf
from tolerances import difference, logits_tolerance

TOKENIZER = CharTokenizer("".join(map(chr, range(200, 200 + 127))))
IDS = torch.arange(2 * 61).reshape(2, 61) * 37 % 131
# In GGUF files the scale of the scores follows from the sizes, and no key names windows of Qwen.
GGUF: dict[str, dict[str, Any]] = {
    **{name: {} for name in FAMILIES if not name.startswith(("mistral", "llama"))},
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3": {"query_pre_attn_scalar": 10},
}
del GGUF["qwen2 windows"]


def compare(
    checkpoint: Checkpoint, theirs: torch.Tensor, parity: Any, what: str, name: str
) -> None:
    """Reference and engine against logits (2, T, V) of transformers; the engine in three ways."""
    bar = logits_tolerance(checkpoint.config)
    apart = difference(load_model(checkpoint, dtype=torch.float32)(IDS), theirs)
    parity(f"logits, {what}", f"transformers, {name}", bar, apart)
    assert apart <= bar
    engine = pack(checkpoint, exact=True)
    first, second = IDS.tolist()
    at_once = Rows(engine).all_logits(first)
    apart = difference(at_once, theirs[0])
    parity(f"logits of the engine, {what}", f"transformers, {name}", bar, apart)
    assert apart <= bar
    rows = Rows(engine, 2)
    rows.next_logits([first[:23], second[:40]])
    for n in range(20):
        batch = rows.next_logits([[first[23 + n]], [second[40 + n]]])
        assert np.array_equal(batch[0], at_once[23 + n])
        assert difference(batch[1], theirs[1, 40 + n]) <= bar
    engine.close()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_folder_equal_transformers(name: str, tmp_path: Path, parity: Any) -> None:
    model = family_model(name)
    model.save_pretrained(tmp_path)
    compare(open_checkpoint(tmp_path), model(IDS).logits, parity, "safetensors", name)


@torch.no_grad()
@pytest.mark.parametrize("name", GGUF)
def test_logits_of_a_gguf_equal_transformers(name: str, tmp_path: Path, parity: Any) -> None:
    model = family_model(name, **GGUF[name])
    architecture = FAMILIES[name]["model_type"]
    architecture = GGUF_NAMES.get(architecture, architecture)
    path = write_family_gguf(model, architecture, tmp_path / "tiny.gguf")
    compare(open_checkpoint(path), model(IDS).logits, parity, "gguf", name)


LONGER = {
    "llama dynamic": {"max_position_embeddings": 32},
    "phi3 longrope": {
        "rope_parameters": {**LONG, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 32,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", LONGER)
def test_a_context_beyond_the_original_one(name: str, tmp_path: Path, parity: Any) -> None:
    """RoPE of a chosen context, which transformers has for a text of that length."""
    model, tokens = family_model(name, **LONGER[name]), IDS.shape[1]
    model.save_pretrained(tmp_path)
    paths = [tmp_path]
    if name in GGUF:
        architecture = FAMILIES[name]["model_type"]
        paths.append(write_family_gguf(model, architecture, tmp_path / "tiny.gguf"))
    for path in paths:
        usual = open_checkpoint(path)
        assert usual.config.max_seq_len == 32
        assert any("the context is 32 tokens; one of up to" in note for note in usual.notes)
        checkpoint = open_checkpoint(path, tokens)
        assert checkpoint.config.max_seq_len == tokens
        assert not any("--context-size" in note for note in checkpoint.notes)
        compare(checkpoint, model(IDS).logits, parity, f"{tokens} of 32 tokens", name)
        longest = checkpoint.config.longest_context
        assert longest == (128 if name == "llama dynamic" else 512)
        for wrong in (0, -1, longest + 1, 2**40, True, 3.0):
            with pytest.raises(GlassError, match=f"1 to {longest} tokens"):
                open_checkpoint(path, wrong)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_cache_in_chunks(name: str, tmp_path: Path) -> None:
    model = family_model(name)
    model.save_pretrained(tmp_path)
    ours = load_model(open_checkpoint(tmp_path), dtype=torch.float32)
    cache, parts = ours.new_cache(2, 61), []
    for first, last in ((0, 20), (20, 21), (21, 40), (40, 61)):
        parts.append(ours(IDS[:, first:last], cache))
    assert difference(torch.cat(parts, 1), model(IDS).logits) <= logits_tolerance(ours.config)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_what_we_save(name: str, tmp_path: Path) -> None:
    model = family_model(name)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = open_checkpoint(tmp_path / "theirs")
    save_model(tmp_path / "ours", load_model(checkpoint, dtype=torch.float32), TOKENIZER)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    bar = logits_tolerance(checkpoint.config)
    assert difference(again(IDS).logits, model(IDS).logits) <= bar
    assert open_checkpoint(tmp_path / "ours").config == checkpoint.config


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "score_cap"),
    ("gemma2", {"final_logit_softcapping": float("nan")}, "final_logit_softcapping"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_scale"),
    ("gemma3", {"layer_types": ["full_attention"]}, "layer_types"),
    ("smollm3", {"no_rope_layers": [1]}, "rope_layers"),
    ("granite", {"logits_scaling": 0.0}, "logit_divisor"),
    ("phi3", {"num_key_value_heads": 3}, "qkv_proj"),
    ("phi3 longrope", {"rope_parameters": {**LONG, "short_factor": [1.0]}}, "1 short and 3 long"),
    ("qwen3", {"num_hidden_layers": 3}, "layer_types"),
    ("olmo2", {"num_hidden_layers": 3}, "unexpected model.layers.3"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
]


@pytest.mark.parametrize(("name", "fields", "words"), BAD)
def test_wrong_fields_are_refused(
    name: str, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    family_model(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | fields))
    with pytest.raises(GlassError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
