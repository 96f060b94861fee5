"""Configurations in three formats: what is read, inferred, noted and refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from glassllama.base.config import Llama3Scaling
from glassllama.base.errors import ConfigError
from glassllama.weights.architectures import config_from_hf, hf_architecture
from glassllama.weights.architectures.bigram import BIGRAM as BIGRAM_ARCHITECTURE
from glassllama.weights.architectures.description import Resolved
from glassllama.weights.architectures.gpt2 import GPT2 as GPT2_ARCHITECTURE
from glassllama.weights.architectures.llama import config_from_meta, meta_ffn_dim

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def test_old_and_new_rope_keys_agree() -> None:
    new = dict(LLAMA_31_8B)
    new["rope_parameters"] = {**new.pop("rope_scaling"), "rope_theta": new.pop("rope_theta")}  # type: ignore[dict-item]
    old, again = config_from_hf(LLAMA_31_8B), config_from_hf(new)
    assert old == again
    assert old.config.rope_theta == 500_000
    assert old.config.rope_scaling == Llama3Scaling(factor=8.0)
    assert old.config.head_dim == 128
    assert old.notes == []


def test_defaults_of_missing_keys() -> None:
    short = {k: LLAMA_31_8B[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config, _ = config_from_hf({**short, "num_attention_heads": 32, "vocab_size": 32000})
    assert (config.n_kv_heads, config.rope_theta, config.max_seq_len) == (32, 10_000, 2048)


def test_notices_name_keys_without_effect() -> None:
    _, notes = config_from_hf({**LLAMA_31_8B, "my_own_key": 3})
    assert notes == ["config.json: no effect here: my_own_key"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM.*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "long_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
        ({"hidden_size": "big"}, "hidden_size.*'big'"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_attention_heads": 32.5}, "num_attention_heads"),
        ({"num_key_value_heads": 5}, "n_kv_heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"qk_norm": True}, "qk_norm must be false in a LlamaForCausalLM"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": {"partial_rotary_factor": 0.5}}, "partial"),
    ],
)
def test_unsupported_arithmetic_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_hf({**LLAMA_31_8B, **change})


META_31_8B = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-05, "rope_theta": 500000.0,
    "use_scaled_rope": True,
}  # fmt: skip
META_32_1B = {
    **META_31_8B, "dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256,
}  # fmt: skip
META_2_7B = {
    "dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05,
    "vocab_size": -1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("params", "rows", "ffn", "factor", "context", "theta", "kv"),
    [
        (META_31_8B, 128256, 14336, 8.0, 131072, 5e5, 8),
        (META_32_1B, 128256, 8192, 32.0, 131072, 5e5, 8),
        ({**META_31_8B, "use_scaled_rope": False}, 128256, 14336, None, 8192, 5e5, 8),
        (META_2_7B, 32000, 11008, None, 4096, 1e4, 32),
    ],
)
def test_meta_rules(
    params: dict[str, Any], rows: int, ffn: int, factor: float, context: int, theta: float, kv: int
) -> None:
    config, notes = config_from_meta(params, rows, tied=False)
    assert config.ffn_dim == ffn
    assert config.max_seq_len == context
    assert config.rope_theta == theta
    assert config.n_kv_heads == kv
    assert config.vocab_size == rows
    assert config.rope_layout == "interleaved"
    scaling = config.rope_scaling
    assert (scaling.factor if isinstance(scaling, Llama3Scaling) else None) == factor
    assert any("context length" in note for note in notes)
    assert any("factor" in note for note in notes) == (factor is not None)


def test_ffn_rule() -> None:
    assert meta_ffn_dim(4096, 1024, 1.3) == 14336
    assert meta_ffn_dim(2048, 256, 1.5) == 8192
    assert meta_ffn_dim(4096, 256, None) == 11008


@pytest.mark.parametrize("key", ["quantization_args", "lora_args", "vision_chunk_size"])
def test_errors_name_other_kinds_of_meta_checkpoints(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        config_from_meta({**META_31_8B, key: {}}, 128256, tied=False)


GPT_2 = {
    "model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 96, "vocab_size": 9,
    "n_positions": 16, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    "scale_attn_weights": True, "bias": True, "tie_word_embeddings": True,
}  # fmt: skip
BIGRAM = {"model_type": "glass_bigram", "vocab_size": 9, "max_position_embeddings": 16}
ALL_KEYS: dict[str, Any] = {
    **LLAMA_31_8B, "head_dim": 128, "rope_theta": 1e4, "qk_norm": False, "sliding_window": 4096,
    "layer_types": ["full_attention"],
}  # fmt: skip
READERS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Resolved]]] = {
    "llama": (ALL_KEYS, config_from_hf),
    "meta": (META_31_8B, lambda values: config_from_meta(values, 128256, tied=False)),
    "gpt2": (GPT_2, GPT2_ARCHITECTURE.config_from_hf),
    "bigram": (BIGRAM, BIGRAM_ARCHITECTURE.config_from_hf),
}
NO_EFFECT = {"torch_dtype", "model_type"}  # only config_from_hf reads the last of these
WHOLE: list[Any] = [4.5, 8.0, "8", True, [8], {"a": 8}, -8, 0, 10**400, math.nan]
NUMBER: list[Any] = ["1e-5", True, [1.0], {}, math.nan, math.inf, -1.0, 10**400, 1e300]
WRONG: dict[type, list[Any]] = {
    bool: [0, 1, "false", "", [], [False], {}],
    int: WHOLE,
    float: NUMBER,
    str: [1, True, [], ["silu"], {}, 1.5],
    list: ["llama", 1, {}, [1], [["LlamaForCausalLM"]], {"LlamaForCausalLM": 1}],
    dict: ["linear", 1, [], [1], True],
}
# "vocab_size" of Meta may be -1 for "as many as there are".


@pytest.mark.parametrize("form", READERS)
def test_fields_of_another_type_are_refused(form: str) -> None:
    values, read = READERS[form]
    read(values)
    for key, value in values.items():
        if (key in NO_EFFECT and form != "llama") or key == "torch_dtype":
            continue
        for wrong in WRONG[type(value)]:
            message = error_message(read, {**values, key: wrong})
            assert message, f"{key}: {wrong!r} was accepted"
            assert "\n" not in message
            assert len(message) < 400


def error_message(read: Callable[[dict[str, Any]], Resolved], values: dict[str, Any]) -> str:
    try:
        read(values)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
def test_scaling_fields_of_another_type_are_refused(key: str) -> None:
    for wrong in (*NUMBER, None) if key != "original_max_position_embeddings" else WHOLE:
        rope = {**ALL_KEYS["rope_scaling"], key: wrong}
        with pytest.raises(ConfigError):
            config_from_hf({**ALL_KEYS, "rope_scaling": rope})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"model_type": "bloom"},
            r"'bloom', supported are .*llama \(LlamaForCausalLM\),.* mistral",
        ),
        ({"model_type": "bert", "architectures": ["LlamaForCausalLM"]}, "'bert'"),
        ({"model_type": 5}, "model_type must be text"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of text"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures must be a list of text"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
    ],
)
def test_models_of_other_architectures(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        hf_architecture(values)


def test_long_names_are_shortened_in_notices() -> None:
    strange = {"x" * 70_000: 1, "two\nlines": 2, **{f"key{n}": n for n in range(1000)}}
    (note,) = config_from_hf({**LLAMA_31_8B, **strange}).notes
    assert "\n" not in note
    assert len(note) < 1000
    assert "990 more" in note
