"""Real folders and files: sliding windows, scaled contexts, value heads, stored output heads.

The oracle is transformers, with the longest text that fits into the context.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from glassllama.base.errors import ConfigError, WeightsError
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import load_model
from tiny_models import VARIANTS, hf_model, write_gguf, write_hf
from tolerances import assert_logits

PLAIN = VARIANTS["plain"]
IDS = torch.arange(96)[None] * 37 % 131


def edit(folder: Path, remove: tuple[str, ...] = (), **fields: Any) -> Path:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in remove}))
    return folder


def with_tensors(folder: Path, **tensors: torch.Tensor) -> Path:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})
    return folder


@torch.no_grad()
def check_as_transformers(folder: Path, tokens: int) -> Checkpoint:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = open_checkpoint(folder)
    ids = IDS[:, :tokens]
    assert_logits(load_model(checkpoint)(ids), theirs(ids).logits, checkpoint.config)
    return checkpoint


def mistral(folder: Path, remove: tuple[str, ...] = (), **fields: Any) -> Path:
    model = write_hf(hf_model(**PLAIN), folder)
    named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return edit(model, remove, **(named | fields))


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": None}, [None] * 3),
        ({"sliding_window": 40}, [40] * 3),
        ({"sliding_window": 40, "use_sliding_window": False}, [40] * 3),  # Qwen's, not Mistral's
        ({"sliding_window": 40, "max_window_layers": 3}, [40] * 3),
        ({"sliding_window": 40, "layer_types": [FULL] * 3}, [None] * 3),
        ({"sliding_window": 40, "layer_types": [FULL, SLIDING, FULL]}, [None, 40, None]),
    ],
)
def test_windows_of_a_mistral(
    fields: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    config = check_as_transformers(mistral(tmp_path, **fields), 96).config
    assert [config.window(n) for n in range(3)] == windows
    assert config.max_seq_len == 131_072


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {}, None,
    ],
)  # fmt: skip
def test_rope_scaling_and_rope_parameters_in_one_file(scaling: Any, tmp_path: Path) -> None:
    """The older key is used if a file has both and it is not empty."""
    both = {"rope_type": "default", "rope_theta": 5e5}
    folder = edit(
        write_hf(hf_model(**PLAIN), tmp_path), ("rope_theta",), rope_parameters=both,
        rope_scaling=scaling,
    )  # fmt: skip
    check_as_transformers(folder, 96)


def test_an_unsupported_rope_scaling_next_to_rope_parameters(tmp_path: Path) -> None:
    folder = edit(
        write_hf(hf_model(**PLAIN), tmp_path), rope_parameters={"rope_type": "default"},
        rope_scaling={"rope_type": "spiral", "factor": 2.0},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="spiral"):
        open_checkpoint(folder)


def test_a_mistral_without_the_key_has_the_default_window_of_transformers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(mistral(tmp_path, remove=("sliding_window",)))
    assert checkpoint.config.window(0) == 4096


def test_a_llama_of_transformers_has_no_window(tmp_path: Path) -> None:
    folder = edit(write_hf(hf_model(**PLAIN), tmp_path), sliding_window=4)
    checkpoint = check_as_transformers(folder, 96)
    assert checkpoint.config.max_seq_len == 131_072
    assert checkpoint.notes == ["config.json: sliding_window has no effect: no layer uses it"]


def test_a_window_in_gguf_metadata_limits_the_context(tmp_path: Path) -> None:
    import gguf

    path = write_gguf(hf_model(**PLAIN), tmp_path / "plain.gguf")
    reader, windowed = gguf.GGUFReader(path), tmp_path / "windowed.gguf"
    writer = gguf.GGUFWriter(windowed, "llama")
    for field in reader.fields.values():
        if field.types and not field.name.startswith("GGUF.") and "architecture" not in field.name:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_sliding_window(32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(windowed)
    assert checkpoint.config.max_seq_len == 32
    assert "llama.attention.sliding_window 32" in checkpoint.notes[0]


@pytest.mark.parametrize("original", [None, 48])
def test_dynamic_rope_is_exact_up_to_its_original_context(
    original: int | None, tmp_path: Path
) -> None:
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    rope |= {} if original is None else {"original_max_position_embeddings": original}
    shape = {**PLAIN, "max_position_embeddings": 64, "rope_parameters": rope}
    checkpoint = check_as_transformers(write_hf(hf_model(**shape), tmp_path), 64)
    assert checkpoint.config.max_seq_len == 64
    assert "one of up to 128 can be chosen" in checkpoint.notes[-1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_parameters": {"rope_type": "spiral", "factor": 4.0}}, "'spiral'.*default, linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one per type of layer"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["chunked_attention"]}, "layer_types"),
        ({"model_type": "bloom"}, r"model_type is 'bloom'.*gpt2.*llama \(Llama.*mistral"),
        ({"model_type": "bloom", "architectures": None}, r"'bloom', supported are glass_bigram"),
        ({"model_type": "granite"}, "model_type is 'granite', but architectures is"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', but architectures is"),
    ],
)
def test_configurations_with_other_arithmetic_are_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = edit(write_hf(hf_model(**PLAIN), tmp_path), **fields)
    with pytest.raises(ConfigError, match=words) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_without_architectures_the_model_type_decides(tmp_path: Path) -> None:
    folder = mistral(tmp_path, architectures=None, sliding_window=40)
    assert check_as_transformers(folder, 96).config.window(2) == 40


def test_a_notice_names_an_unused_value_head(tmp_path: Path) -> None:
    folder = write_hf(hf_model(**PLAIN), tmp_path)
    with_tensors(folder, **{"v_head.summary.weight": torch.ones(1, 48)})
    notes = check_as_transformers(folder, 20).notes
    assert notes == ["no part of a language model, ignored: v_head.summary.weight"]


def test_a_stored_output_is_used_although_the_configuration_ties_it(tmp_path: Path) -> None:
    folder = edit(write_hf(hf_model(**PLAIN), tmp_path), tie_word_embeddings=True)
    checkpoint = check_as_transformers(folder, 20)
    assert not checkpoint.config.tie_embeddings
    assert "lm_head.weight, which is used" in checkpoint.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_output_that_is_stored_again_stays_tied(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also if one of both is stored in another type with the same numbers."""
    folder = write_hf(hf_model(**VARIANTS["tied"]).bfloat16(), tmp_path)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    with_tensors(folder, **{"lm_head.weight": embeddings.clone().to(dtype)})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tie_embeddings
    assert checkpoint.notes == []
    embeddings[100, 3] += 1
    with_tensors(folder, **{"lm_head.weight": embeddings.to(dtype)})
    assert not open_checkpoint(folder).config.tie_embeddings


def test_a_stored_output_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = write_hf(hf_model(**VARIANTS["tied"]), tmp_path)
    with_tensors(folder, **{"lm_head.weight": torch.zeros(130, 48)})
    with pytest.raises(WeightsError, match=r"lm_head\.weight is 130×48"):
        open_checkpoint(folder)


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_stored_output_of_a_gpt2(change: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 131}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path)
    head = model.transformer.wte.weight.detach().clone()
    head[130, 23] += change
    with_tensors(tmp_path, **{"lm_head.weight": head})
    checkpoint = check_as_transformers(tmp_path, 20)
    assert any("lm_head.weight, which is used" in note for note in checkpoint.notes) == bool(change)


def test_stored_rope_tables_are_compared(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = write_hf(hf_model(**PLAIN), tmp_path)
    right = 10_000.0 ** -(torch.arange(0, 8, 2).float() / 8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with_tensors(folder, **{name: right.to(dtype)})
        assert open_checkpoint(folder).notes == []
    with_tensors(folder, **{name: right * 0.99})
    notes = check_as_transformers(folder, 20).notes
    assert notes == [f"not the frequencies of the configuration, ignored: {name}"]


def test_stored_masks_of_a_gpt2_are_compared(tmp_path: Path) -> None:
    sizes = {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 131}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    name, mask = "transformer.h.0.attn.bias", torch.ones(32, 32).tril()[None, None]
    with_tensors(tmp_path, **{name: mask})
    assert not any("masks" in note for note in open_checkpoint(tmp_path).notes)
    with_tensors(tmp_path, **{name: torch.ones_like(mask)})
    assert f"no causal masks, ignored: {name}" in open_checkpoint(tmp_path).notes


@pytest.mark.parametrize("number", [-1e4, -1e9, -np.inf, 0.0, np.nan, 1e9])
def test_stored_mask_values_of_a_gpt2_are_compared(number: float, tmp_path: Path) -> None:
    sizes = {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 131}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    name = "transformer.h.0.attn.masked_bias"
    with_tensors(tmp_path, **{name: torch.tensor(number)})
    noted = f"numbers that hide no score, ignored: {name}" in open_checkpoint(tmp_path).notes
    assert noted == (not number < -1000)


def test_divisors_and_a_factor_in_one_gguf_are_both_applied(tmp_path: Path) -> None:
    """As in llama.cpp: frequency / divisor / factor."""
    from glassllama.base.config import rope_frequencies
    from glassllama.formats.gguf import open_gguf
    from glassllama.weights.architectures import config_from_gguf

    file = open_gguf(write_gguf(hf_model(**VARIANTS["scaled-8"]), tmp_path / "m.gguf"))
    alone = rope_frequencies(config_from_gguf(file).config)  # type: ignore[arg-type]
    file.metadata = {**file.metadata, "llama.rope.scaling.factor": 4.0}
    both = rope_frequencies(config_from_gguf(file).config)  # type: ignore[arg-type]
    np.testing.assert_array_equal(both * 4, alone)  # a power of two: exact


def changed(path: Path, **fields: Any) -> Any:
    from glassllama.formats.gguf import open_gguf

    file = open_gguf(path)
    file.metadata = {**file.metadata, **{f"llama.{k}": v for k, v in fields.items()}}
    return file


def test_one_number_for_each_layer_of_a_gguf(tmp_path: Path) -> None:
    """As in llama.cpp, if all of them are equal."""
    from glassllama.weights.architectures import config_from_gguf

    path = write_gguf(hf_model(**PLAIN), tmp_path / "m.gguf")
    usual = config_from_gguf(changed(path)).config
    n_layers, names = usual.n_layers, ("attention.head_count", "feed_forward_length")  # type: ignore[union-attr]
    for name in names:
        value = changed(path).metadata[f"llama.{name}"]
        each = np.full(n_layers, value, np.uint32)
        assert config_from_gguf(changed(path, **{name: each})).config == usual
        for wrong in (each[1:], np.append(each[1:], 1)):
            with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
                config_from_gguf(changed(path, **{name: wrong}))


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [("rope.scaling.attn_factor", 1.0, 2.0), ("attention.causal", True, False)],
)
def test_metadata_keys_that_llama_cpp_reads_for_every_architecture(
    name: str, neutral: Any, other: Any, tmp_path: Path
) -> None:
    from glassllama.weights.architectures import config_from_gguf

    path = write_gguf(hf_model(**PLAIN), tmp_path / "m.gguf")
    assert config_from_gguf(changed(path, **{name: neutral})) == config_from_gguf(changed(path))
    with pytest.raises(ConfigError, match=f"llama.{name} is {other}, only {neutral} is supported"):
        config_from_gguf(changed(path, **{name: other}))
