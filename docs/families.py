"""One published model of each family of decoders, as its config.json says. Data, no weights.

make_compare.py resolves them with the descriptions in weights/architectures and writes a column for
each into docs/compare.md. Keys that do not matter for what the model computes are left out.
"""

from __future__ import annotations

from typing import Any

QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "rms_norm_eps": 1e-6}


def sizes(
    width: int, layers: int, heads: tuple[int, int], ffn: int, vocabulary: int, context: int
) -> dict[str, int]:
    """The keys that every config.json has; `heads`: query and key/value."""
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "intermediate_size": ffn, "vocab_size": vocabulary,
        "max_position_embeddings": context,
    }  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": {
        "model_type": "llama", **sizes(4096, 32, (32, 8), 14_336, 128_256, 131_072),
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "Mistral 7B v0.1": {
        "model_type": "mistral", **sizes(4096, 32, (32, 8), 14_336, 32_000, 32_768),
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "Qwen2.5 7B": {
        "model_type": "qwen2", **sizes(3584, 28, (28, 4), 18_944, 152_064, 131_072), **QWEN,
        "tie_word_embeddings": False,
    },
    "Qwen3 8B": {
        "model_type": "qwen3", **sizes(4096, 36, (32, 8), 12_288, 151_936, 40_960), **QWEN,
        "head_dim": 128, "tie_word_embeddings": False,
    },
    "Gemma 7B": {
        "model_type": "gemma", **sizes(3072, 28, (16, 16), 24_576, 256_000, 8192), **GEMMA,
        "rope_theta": 1e4,
    },
    "Gemma 2 9B": {
        "model_type": "gemma2", **sizes(3584, 42, (16, 8), 14_336, 256_000, 8192), **GEMMA,
        "rope_theta": 1e4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "Gemma 3 1B": {
        "model_type": "gemma3_text", **sizes(1152, 26, (4, 1), 6912, 262_144, 32_768), **GEMMA,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "sliding_window_pattern": 6,
    },
    "SmolLM3 3B": {
        "model_type": "smollm3", **sizes(2048, 36, (16, 4), 11_008, 128_256, 65_536),
        "rms_norm_eps": 1e-6, "rope_theta": 5e6, "no_rope_layer_interval": 4,
    },
    "Phi-3 mini 4k": {
        "model_type": "phi3", **sizes(3072, 32, (32, 32), 8192, 32_064, 4096),
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 2047,
        "tie_word_embeddings": False,
    },
    "OLMo 2 7B": {
        "model_type": "olmo2", **sizes(4096, 32, (32, 32), 11_008, 100_352, 4096),
        "rms_norm_eps": 1e-6, "rope_theta": 5e5, "tie_word_embeddings": False,
    },
    "Granite 3.1 8B": {
        "model_type": "granite", **sizes(4096, 40, (32, 8), 12_800, 49_155, 131_072),
        "rms_norm_eps": 1e-5, "rope_theta": 1e7, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.0078125, "logits_scaling": 16.0,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
