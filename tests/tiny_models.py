"""Tiny random Llamas, written by transformers, torch.save and the gguf package.

Our readers are tested with files of other libraries, never with files of our own writers. All sizes
differ, so that swapped axes are detected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import LlamaForCausalLM

SCALED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
# Shapes that Meta's params.json can express: head_dim = dim/n_heads, ffn and scaling by its rules.
META_SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 140,  # 2/3 of 4·48, rounded up to a multiple of 20
    "vocab_size": 131,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {**SCALED, "factor": 8.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "scaled-8": META_SHAPE,
    "scaled-32": {**META_SHAPE, "rope_parameters": {**SCALED, "factor": 32.0}},
    "plain": {**META_SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "linear": {
        **META_SHAPE,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    },
    "tied": {**META_SHAPE, "tie_word_embeddings": True},
    "wide heads": {**META_SHAPE, "head_dim": 10},
    "one kv head": {**META_SHAPE, "num_key_value_heads": 1},
    "no groups": {**META_SHAPE, "num_key_value_heads": 6, "rms_norm_eps": 1e-3},
}


def hf_model(seed: int = 0, **shape: Any) -> LlamaForCausalLM:
    """A random Llama of transformers in float32, with weights large enough that every part matters.

    `shape` is a complete shape, META_SHAPE by default; the defaults of transformers are those of
    7B.
    """
    assert not shape or "num_hidden_layers" in shape, (
        "expected a complete shape, not a change to one"
    )
    settings = {"model_type": "llama", **(shape or META_SHAPE)}
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
        if parameter.ndim == 1:
            parameter.data += 1.0
    return model


def write_hf(model: LlamaForCausalLM, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def to_pairs(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder q or k rows head by head from Hugging Face's layout "half" to Meta's
    "interleaved"."""
    heads = rows.unflatten(0, (n_heads, 2, -1))  # (H, half, D/2, C)
    return heads.transpose(1, 2).flatten(0, 2)  # (H, D/2, half, C) -> (H·D, C)


def meta_state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors under Meta's names, q and k in Meta's layout."""
    c, state = model.config, dict(model.state_dict())
    out = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
    }
    if not c.tie_word_embeddings:
        out["output.weight"] = state["lm_head.weight"]
    rows = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    heads = {"attention.wq": c.num_attention_heads, "attention.wk": c.num_key_value_heads}
    for n in range(c.num_hidden_layers):
        for meta, hf in rows.items():
            tensor = state[f"model.layers.{n}.{hf}.weight"]
            tensor = to_pairs(tensor, heads[meta]) if meta in heads else tensor
            out[f"layers.{n}.{meta}.weight"] = tensor
    return {name: tensor.detach().contiguous() for name, tensor in out.items()}


def meta_params(model: LlamaForCausalLM, multiple_of: int = 20) -> dict[str, Any]:
    c = model.config
    return {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "vocab_size": c.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_parameters["rope_theta"],
        "use_scaled_rope": c.rope_parameters["rope_type"] == "llama3",
    }


BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output", "tok_embeddings")
BY_COLUMNS = ("wo", "w2")


def write_meta(
    model: LlamaForCausalLM,
    folder: Path,
    *,
    shards: int = 1,
    llama2: bool = False,
    multiple_of: int = 20,
) -> Path:
    """consolidated.NN.pth + params.json; `llama2` splits the embedding by columns, as in Llama
    2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(meta_params(model, multiple_of)))
    by_rows = BY_ROWS[:-1] if llama2 else BY_ROWS
    by_columns = (*BY_COLUMNS, "tok_embeddings") if llama2 else BY_COLUMNS
    for shard in range(shards):
        part = {}
        for name, tensor in meta_state(model).items():
            kind = name.removesuffix(".weight").split(".")[-1]
            axis = 0 if kind in by_rows else 1 if kind in by_columns else None
            part[name] = tensor if axis is None else tensor.chunk(shards, axis)[shard].clone()
        torch.save(part, folder / f"consolidated.{shard:02d}.pth")
    return folder


GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def gguf_name(meta: str) -> str:
    parts = meta.removesuffix(".weight").split(".")
    if parts[0] != "layers":
        return f"{GGUF_NAMES[parts[0]]}.weight"
    return f"blk.{parts[1]}.{GGUF_NAMES['.'.join(parts[2:])]}.weight"


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A GGUF file: matrices in type `kind`, vectors in float32, RoPE scaling as rope_freqs."""
    c = model.config
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")  # llama.cpp opens no file without the key
    head_dim = c.head_dim
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if c.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(c))
    elif c.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_parameters["factor"])
    for name, tensor in meta_state(model).items():
        values = tensor.float().numpy()
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(c: transformers.LlamaConfig) -> np.ndarray:
    """Plain frequencies divided by those of transformers, as converters store them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](c, torch.device("cpu"))
    exponents = np.arange(0, c.head_dim, 2) / c.head_dim
    plain = c.rope_parameters["rope_theta"] ** -exponents
    return (plain / scaled.double().numpy()).astype(np.float32)
