"""Tiny random decoders of all families, written by transformers and by the gguf package.

Every option of a family is on: windows shorter than the prompts, soft caps that matter, contexts
beyond the original one. All sizes differ, so that swapped axes are detected.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from tiny_models import hf_model, to_pairs

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 140,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "head_dim": 10,
    "tie_word_embeddings": False,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "rope_theta": 10_000.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
FULL, SLIDING = "full_attention", "sliding_attention"
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 5.0],
    "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 7, "rope_parameters": DEFAULT},
    "mistral nemo": {"model_type": "mistral", "sliding_window": None, "rope_parameters": DEFAULT},
    "ministral3": {
        "model_type": "ministral3", "rope_parameters": {
            **YARN, "mscale": 1.0, "mscale_all_dim": 1.0,
            "beta_fast": 0.5, "beta_slow": 0.05, "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2": {"model_type": "qwen2", "rope_parameters": DEFAULT, "head_dim": 8},
    "qwen2 yarn": {"model_type": "qwen2", "rope_parameters": YARN, "head_dim": 8},
    "qwen2 windows": {
        "model_type": "qwen2", "rope_parameters": DEFAULT, "head_dim": 8,
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "rope_parameters": DEFAULT},
    "qwen3 tied": {
        "model_type": "qwen3", "rope_parameters": DEFAULT, "tie_word_embeddings": True
    },
    "gemma": {
        "model_type": "gemma", "rope_parameters": DEFAULT, "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2", "rope_parameters": DEFAULT, "tie_word_embeddings": True,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "sliding_window": 6,
        "query_pre_attn_scalar": 17,
    },
    "gemma3": {
        "model_type": "gemma3_text", "tie_word_embeddings": True, "num_hidden_layers": 7,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: DEFAULT,
        },
        "sliding_window": 6, "query_pre_attn_scalar": 17,
    },
    "smollm3": {
        "model_type": "smollm3", "rope_parameters": DEFAULT, "head_dim": 8, "pad_token_id": 0,
    },
    "phi3": {
        "model_type": "phi3", "rope_parameters": DEFAULT, "sliding_window": 9, "head_dim": 8,
        "pad_token_id": 0,
    },
    "phi3 longrope": {
        "model_type": "phi3", "rope_parameters": LONG, "head_dim": 8, "pad_token_id": 0,
        "original_max_position_embeddings": 256,
    },
    "olmo2": {"model_type": "olmo2", "rope_parameters": DEFAULT, "head_dim": 8},
    "exaone4": {
        "model_type": "exaone4", "rope_parameters": DEFAULT, "num_hidden_layers": 5,
        "sliding_window": 7,
    },
    "exaone4 small": {
        "model_type": "exaone4", "rope_parameters": DEFAULT, "sliding_window": None,
        "layer_types": [FULL] * 4, "head_dim": 8,  # llama.cpp wants H·D = C here
    },
    "granite": {
        "model_type": "granite", "rope_parameters": DEFAULT, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.5,
        "head_dim": 8,
    },
    "llama yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama dynamic": {
        "model_type": "llama", "rope_parameters": DYNAMIC, "max_position_embeddings": 64,
    },
}  # fmt: skip
# What `show` says of a family besides its sizes.
SHOWN: dict[str, list[str]] = {
    "mistral": ["window", "7 tokens"], "mistral nemo": [], "ministral3": ["YarnScaling"],
    "qwen2": ["biases", "q, k, v"], "qwen2 yarn": ["YarnScaling"],
    "qwen2 windows": ["5 tokens in 2 of 4 layers"], "qwen3": ["norm of q and k", "of every head"],
    "qwen3 tied": ["tied to the embeddings"], "gemma": ["GeGLU", "embeddings × 6.928"],
    "gemma2": ["scores 1.5, logits 2", "before and after"],
    "gemma3": ["6 tokens in 6 of 7 layers, none in 1",
               "base 10,000 in 6 of 7 layers, RoPE, base 1,000,000 ÷ 8 in 1"],
    "smollm3": ["RoPE, base 10,000 in 3 of 4 layers, none in 1"], "phi3": ["9 tokens"],
    "phi3 longrope": ["LongRopeScaling", "of 6 coordinates"],
    "olmo2": ["of all heads together", "after attention"], "granite": ["residuals × 0.4"],
    "exaone4": ["7 tokens in 4 of 5 layers, none in 1", "after attention", "of every head"],
    "exaone4 small": ["after attention", "of every head"],
    "llama yarn": ["YarnScaling"], "llama dynamic": ["DynamicScaling"],
}  # fmt: skip
# Words by which a step of the walkthrough names what a family has and most others have not.
QKV, POSITIONS, SCORES, ADDED, FFN, LOGITS = 6, 8, 9, 10, 11, 13
BIAS = (QKV, "A learned bias is added to each of q, k, v.")
HEAD_NORM = (QKV, "an RMSNorm of every head")
NO_NORM = (5, "Attention reads the residual stream without a norm")
SCALED = (POSITIONS, "changed by the configuration's rope_scaling")
FACTOR = (POSITIONS, "(attention factor)")
NOPE = (POSITIONS, "has no positional encoding")
EMBEDDINGS, GELU = (4, "It is multiplied by"), (FFN, "gelu(gate)")
SCALE = (SCORES, "a scale of this model")
ADDED_NORM = (ADDED, "normalized by post_attention_norm and then")
FFN_NORM = (FFN, "normalized by post_ffn_norm")
FOUR = [
    (5, "A layer has 4 norms"), FFN_NORM,
    (ADDED, "normalized by post_attention_norm (an extra norm) and then"),
]  # fmt: skip
STEP_WORDS: dict[str, list[tuple[int, str]]] = {
    "mistral": [(SCORES, "sliding window of 7 tokens")], "mistral nemo": [],
    "ministral3": [SCALED],
    "qwen2": [BIAS], "qwen2 yarn": [BIAS, SCALED, FACTOR],
    "qwen2 windows": [BIAS, (SCORES, "sliding window of 5 tokens")],
    "qwen3": [HEAD_NORM], "qwen3 tied": [HEAD_NORM],
    "gemma": [EMBEDDINGS, GELU],
    "gemma2": [EMBEDDINGS, GELU, SCALE, *FOUR, (SCORES, "A soft cap, 1.5 · tanh"),
               (SCORES, "sliding window of 6 tokens"), (LOGITS, "A soft cap, 2 · tanh")],
    "gemma3": [EMBEDDINGS, GELU, SCALE, *FOUR, HEAD_NORM, (SCORES, "sliding window of 6 tokens"),
               (POSITIONS, "Other frequencies: layers 5.")],
    "smollm3": [NOPE], "phi3": [(SCORES, "sliding window of 9 tokens")],
    "phi3 longrope": [SCALED, FACTOR, (POSITIONS, "Only the first 6 of the 8 coordinates")],
    "olmo2": [NO_NORM, ADDED_NORM, FFN_NORM, (QKV, "an RMSNorm of all heads together")],
    "exaone4": [NO_NORM, ADDED_NORM, FFN_NORM, HEAD_NORM, (SCORES, "sliding window of 7 tokens")],
    "exaone4 small": [NO_NORM, ADDED_NORM, FFN_NORM, HEAD_NORM],
    "granite": [EMBEDDINGS, SCALE, (ADDED, "multiplied by 0.4 and then"),
                (FFN, "multiplied by 0.4 and then"), (LOGITS, "They are divided by 2.5.")],
    "llama yarn": [SCALED, FACTOR], "llama dynamic": [],  # not within its original context
}  # fmt: skip
# Where they differ.
GGUF_NAMES = {"gemma3_text": "gemma3", "ministral3": "mistral3", "mistral": "llama"}
ADDS_ONE = ("gemma", "gemma2", "gemma3")  # stored as w for 1 + w in Hugging Face's files
PERMUTED = ("llama", "smollm3", "granite", "mistral3")  # q and k rows in pairs in GGUF files


def family_model(name: str, **changes: Any) -> Any:
    """A random model of transformers in float32."""
    model = hf_model(**{**SHAPE, **FAMILIES[name], **changes})
    if FAMILIES[name]["model_type"].startswith("gemma"):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data -= 1.0
    return model


GGUF_TENSORS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def gguf_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's converter writes them."""
    names = dict(GGUF_TENSORS)
    if architecture in ("gemma2", "gemma3", "olmo2", "exaone4"):
        names |= FOUR_NORMS
    heads = {
        "attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads
    }  # fmt: skip
    out = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            theirs = f"blk.{layer}.{names[part]}"
        else:
            theirs = names[stem]
        own = theirs.rpartition(".")[2]
        if architecture in PERMUTED and own in heads:
            tensor = to_pairs(tensor, heads[own])
        if architecture in ADDS_ONE and own.endswith("norm"):
            tensor = tensor + 1
        out[f"{theirs}.{kind}"] = tensor.float().numpy()
    return out


def write_family_gguf(
    model: Any, architecture: str, path: Path, kind: Any = gguf.GGMLQuantizationType.F32,
    tokenizer: Any = None,
) -> Path:  # fmt: skip
    """`tokenizer`: a byte-level BPE of the tokenizers package, if the file has a vocabulary."""
    c, writer = model.config, gguf.GGUFWriter(str(path), architecture)
    rope = c.rope_parameters
    own = rope.get(FULL, rope)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(own["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * own.get("partial_rotary_factor", 1.0)))
    if own["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(own["factor"])
    if own["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(own["factor"])
        writer.add_rope_scaling_orig_ctx_len(own["original_max_position_embeddings"])
        if "beta_fast" in own:
            writer.add_rope_scaling_yarn_beta_fast(own["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(own["beta_slow"])
    if architecture == "mistral3":
        writer.add_rope_scaling_yarn_log_mul(own["mscale_all_dim"])
        writer.add_attn_temperature_scale(own["llama_4_scaling_beta"])
    if own["rope_type"] == "longrope":
        original = own["original_max_position_embeddings"]
        longer = c.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longer) / math.log(original)))
        for size in ("short", "long"):
            factors = np.array(own[f"{size}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{size}.weight", factors)
    if architecture in ("gemma2", "gemma3", "phi3", "exaone4") and c.sliding_window:
        writer.add_sliding_window(c.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if architecture == "granite":
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_logit_scale(c.logits_scaling)
        writer.add_attention_scale(c.attention_multiplier)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")  # llama.cpp opens no file without the key
    else:
        inner = json.loads(tokenizer.to_str())["model"]
        tokens = sorted(inner["vocab"], key=inner["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(merge) for merge in inner["merges"]])
        writer.add_eos_token_id(0)
    for name, values in gguf_tensors(model, architecture).items():
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_family(
    name: str, folder: Path, file_format: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """The model as a Hugging Face folder ("hf"), or as a GGUF file in the folder ("gguf")."""
    model = family_model(name, **changes).to(dtype)
    return write_model(model, name, folder, file_format)


def write_model(
    model: Any, name: str, folder: Path, file_format: str, tokenizer: Any = None
) -> Path:
    """The same for a given model of a family, with a vocabulary if one is given."""
    if file_format == "hf":
        model.save_pretrained(folder)
        if tokenizer is not None:
            ends = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
            ends.save_pretrained(folder)
        return folder
    architecture = FAMILIES[name]["model_type"]
    architecture = GGUF_NAMES.get(architecture, architecture)
    folder.mkdir(parents=True, exist_ok=True)
    return write_family_gguf(model, architecture, folder / "tiny.gguf", tokenizer=tokenizer)
