"""The table of Meta's models agrees with Meta's list, transformers and params.json files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from llama_models.sku_list import all_registered_models

import make_compare
from families import MODELS as FAMILIES
from glassllama.base.config import Llama3Scaling, LlamaConfig
from glassllama.hub.names import HUB_MODELS
from glassllama.weights.architectures import ARCHITECTURES
from glassllama.weights.architectures.llama import config_from_meta
from llama_generations import GENERATIONS, MODELS, parameters, weight_bytes

PAGE = Path(__file__).parent.parent / "docs" / "compare.md"
# Parameters as the model cards count them.
PUBLISHED = {
    "llama1-7b": 6_738_415_616,
    "llama1-65b": 65_285_660_672,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
}
# params.json of Meta's releases before Llama 3, which `llama-models` lists only as placeholders.
OLDER = {
    "llama1-7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-6},
    "llama1-33b": {"dim": 6656, "n_layers": 60, "n_heads": 52, "norm_eps": 1e-6},
    "llama1-65b": {"dim": 8192, "n_layers": 80, "n_heads": 64, "norm_eps": 1e-5},
    "llama2-7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-5},
    "llama2-13b": {"dim": 5120, "n_layers": 40, "n_heads": 40, "norm_eps": 1e-5},
    "llama2-70b": {
        "dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "norm_eps": 1e-5,
        "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
    },
}  # fmt: skip


def as_transformers(config: LlamaConfig) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_embeddings,
    )


def listed_by_meta(name: str) -> tuple[dict[str, object], int]:
    """Meta's own list: the values of params.json and the context."""
    identifiers = {name.replace(".", "_").replace("-", "_") + end for end in ("", "_instruct")}
    found = [m for m in all_registered_models() if m.core_model_id.name in identifiers]
    # Of several releases of the same weights the first is used.
    return dict(found[0].arch_args), found[0].max_seq_length


def test_the_names_are_those_of_the_generations() -> None:
    assert set(OLDER) < set(MODELS)
    assert list(MODELS)[:2] == ["llama1-7b", "llama1-13b"]
    assert len(MODELS) == sum(len(generation.models) for generation in GENERATIONS) == 15


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name: str) -> None:
    assert parameters(MODELS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_equal_those_of_transformers(name: str) -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(as_transformers(MODELS[name]))
    assert parameters(MODELS[name]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("llama3")])
def test_llama_3_agrees_with_metas_list(name: str) -> None:
    values, context = listed_by_meta(name)
    expected = MODELS[name]
    theirs = config_from_meta(values, expected.vocab_size, tied=expected.tie_embeddings).config
    assert theirs == replace(expected, rope_layout="interleaved")
    assert context == expected.max_seq_len


@pytest.mark.parametrize("name", OLDER)
def test_older_models_agree_with_their_params_json(name: str) -> None:
    values = {"multiple_of": 256, "vocab_size": -1, **OLDER[name]}
    theirs = config_from_meta(values, 32_000, tied=False).config
    # params.json does not contain the context, and LLaMA's is shorter than the inferred one.
    expected = replace(MODELS[name], rope_layout="interleaved", max_seq_len=theirs.max_seq_len)
    assert theirs == expected


def test_contexts_and_scaling() -> None:
    assert [MODELS[n].max_seq_len for n in ("llama1-7b", "llama2-7b")] == [2048, 4096]
    scalings = [MODELS[n].rope_scaling for n in ("llama3.1-8b", "llama3.2-1b", "llama3.3-70b")]
    assert scalings == [Llama3Scaling(factor=factor) for factor in (8.0, 32.0, 8.0)]


def test_the_hub_table_agrees() -> None:
    shared = {n: n.removesuffix("-instruct") for n in HUB_MODELS if n.startswith("llama3")}
    assert len(shared) >= 10
    for name, expected in shared.items():
        assert HUB_MODELS[name].parameters == parameters(MODELS[expected]), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_bytes_are_those_of_the_gguf_package(kind: str) -> None:
    config = MODELS["llama3.2-1b"]
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    norms = (2 * config.n_layers + 1) * config.dim
    matrices = (parameters(config) - norms) // elements * size
    assert weight_bytes(config, kind) == matrices + norms * (2 if kind == "BF16" else 4)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_compare.page(), (
        "run python docs/make_compare.py"
    )


def test_the_page_marks_changes() -> None:
    rows = {line.split(" | ")[0]: line for line in make_compare.generations().split("\n")}
    assert "| 10,000 | 10,000 | **500,000** | 500,000 |" in rows["| RoPE theta"]
    assert rows["| context (tokens)"].count("**") == 6  # three changes, marked on both sides
    assert "| no | no | no | no | **yes** | **no** |" in rows["| embeddings tied to output"]
    assert "| no | **70B: K = 8** | **all: K = 8** | all: K = 8 |" in rows["| grouped queries"]


# Parameters of the safetensors files, as the Hugging Face Hub counts them.
OF_FAMILIES = {
    "Mistral 7B v0.1": 7_241_732_096,
    "Qwen2.5 7B": 7_615_616_512,
    "Qwen3 8B": 8_190_735_360,
    "Gemma 7B": 8_537_680_896,
    "Gemma 2 9B": 9_241_705_984,
    "Gemma 3 1B": 999_885_952,
    "SmolLM3 3B": 3_075_098_624,
    "Phi-3 mini 4k": 3_821_079_552,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_of_other_families(name: str) -> None:
    architecture, config, _ = make_compare.resolved()[name]
    count = sum(math.prod(shape) for shape in architecture.shapes(config).values())
    values = {**FAMILIES[name], "pad_token_id": 0}
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**values)
        )
    assert count == theirs.num_parameters()
    assert count == OF_FAMILIES.get(name, count)


def test_every_architecture_is_in_the_comparison() -> None:
    """Those of docs/families.py have a column, all have a row in the table of files."""
    compared = {architecture.name for architecture, *_ in make_compare.resolved().values()}
    assert compared <= {one.name for one in ARCHITECTURES.values() if one.layer_plan}
    rows = [line.split(" | ")[0] for line in make_compare.family_files().strip().split("\n")[2:]]
    assert rows == [f"| {one.title}" for one in ARCHITECTURES.values()]


def test_decisions_of_other_families() -> None:
    table = make_compare.families()
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in table.split("\n")}
    column = {name: n for n, name in enumerate(FAMILIES)}
    expected = {
        ("norms", "OLMo 2 7B"): "**after attention and feed-forward**",
        ("norms", "Gemma 2 9B"): "**before and after attention and feed-forward**",
        ("norm of q and k", "Qwen3 8B"): "**of every head**",
        ("biases", "Qwen2.5 7B"): "**q, k, v**",
        ("positions", "SmolLM3 3B"): "**RoPE, base 5,000,000 in 27 of 36 layers, none in 9**",
        ("window", "Gemma 3 1B"): "**512 tokens in 22 of 26 layers, none in 4**",
        ("soft caps", "Gemma 2 9B"): "**scores 50, logits 30**",
        ("scale of scores", "Llama 3.1 8B"): "1/√D", ("feed-forward", "Gemma 7B"): "**GeGLU**",
        ("multipliers", "Gemma 7B"): "**embeddings × 55.43**",
        ("stored as one matrix", "Phi-3 mini 4k"): "**qkv_proj, gate_up_proj**",
    }  # fmt: skip
    found = {key: rows[f"| {key[0]}"][column[key[1]]] for key in expected}
    assert found == expected
