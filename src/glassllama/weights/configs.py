"""Three families of configuration → one LlamaConfig, and notes on what was inferred or ignored.

Sizes that a file leaves out follow from rules that its family states; anything that would change
the arithmetic and is not supported is an error; a key without effect here is named in a note.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glassllama.base.config import (
    GivenDivisors,
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    RopeScaling,
)
from glassllama.base.errors import ConfigError, quoted
from glassllama.base.fields import REQUIRED, Fields
from glassllama.base.interfaces import TensorFile

if TYPE_CHECKING:
    from glassllama.models.bigram import BigramConfig
    from glassllama.models.gpt import GPTConfig

    ModelConfig = LlamaConfig | GPTConfig | BigramConfig

OLD_THETA = 10_000.0  # what RoPE was born with; files before Llama 3 leave it out
# transformers knows no Llama with `qk_norm`. For somebody who names the class it would still build
# a plain one, whatever the architecture's name, but not with a kind of RoPE that it does not know.
WITH_QK_NORM = "GlassLlamaForCausalLM"
AND_QK_NORM = "+qk_norm"
LLAMA_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", WITH_QK_NORM)
GPT2, BIGRAM = "GPT2LMHeadModel", "GlassBigramForCausalLM"  # weights/gpt2.py, weights/bigram.py


class Resolved(NamedTuple):
    """A configuration, and in words what the file did not say or we do not use."""

    config: ModelConfig
    notes: list[str]


# --- Hugging Face: config.json ---------------------------------------------------------------

# Keys that may stand in a config.json and change nothing that a forward pass computes.
HF_WITHOUT_EFFECT = frozenset(
    "_name_or_path architectures attention_dropout attn_implementation auto_map bos_token_id dtype "
    "eos_token_id hidden_dropout initializer_range is_llama_config model_type pad_token_id "
    "pretraining_tp rope_interleaved torch_dtype transformers_version transformers.js_config "
    "use_cache return_dict output_hidden_states output_attentions problem_type id2label label2id "
    "chunk_size_feed_forward is_encoder_decoder _attn_implementation_autoset tokenizer_class "
    "unsloth_version unsloth_fixed rope_layout".split()
)
HF_USED = frozenset(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
    "intermediate_size max_position_embeddings rms_norm_eps rope_theta rope_scaling "
    "rope_parameters tie_word_embeddings qk_norm".split()
)
# Keys that change the arithmetic -> the value at which they do not.
HF_MUST_BE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "quantization_config": None,
}


def architecture(values: Mapping[str, Any]) -> str:
    """The name of the model in a config.json; a Llama's where it says none. Raises ConfigError."""
    supported = (*LLAMA_ARCHITECTURES, GPT2, BIGRAM)
    named = values.get("architectures") or supported
    if not isinstance(named, list | tuple) or named[0] not in supported:
        raise ConfigError(
            f"config.json: architectures is {quoted(named)}, supported are {', '.join(supported)}"
        )
    return str(named[0])


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    """config.json of a Llama-architecture model. Raises ConfigError naming the field."""
    architecture(values)
    require_neutral(values, HF_MUST_BE)
    notes = unused_keys(values, HF_USED | set(HF_MUST_BE))
    get = Fields("config.json", values)
    n_heads, dim = get.whole("num_attention_heads"), get.whole("hidden_size")
    theta, scaling = _hf_rope(values)
    config = LlamaConfig(
        dim=dim,
        n_layers=get.whole("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=get.whole("num_key_value_heads", n_heads),
        head_dim=get.whole("head_dim", _divided(dim, n_heads) or REQUIRED),
        ffn_dim=get.whole("intermediate_size"),
        vocab_size=get.whole("vocab_size"),
        max_seq_len=get.whole("max_position_embeddings", 2048),  # as transformers assumes
        norm_eps=get.number("rms_norm_eps", 1e-6),  # likewise
        rope_theta=theta,
        rope_scaling=scaling,
        rope_layout="halves",
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qk_norm=bool(values.get("qk_norm", False)),
    )
    return Resolved(config, notes)


def llama_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """What `config_from_hf` reads, and transformers. Raises ConfigError: no words for it."""
    if config.rope_layout != "halves":
        raise ConfigError(
            "config.json: Hugging Face's Llamas rotate halves, this one rotates pairs"
        )
    name = WITH_QK_NORM if config.qk_norm else LLAMA_ARCHITECTURES[0]
    ours = {"qk_norm": True} if config.qk_norm else {}
    return {
        "architectures": [name],
        "model_type": "glass_llama" if config.qk_norm else "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        **ours,
    }


def _rope_to_hf(config: LlamaConfig) -> dict[str, Any] | None:
    scaling, norm = config.rope_scaling, AND_QK_NORM if config.qk_norm else ""
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3" + norm,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear" + norm, "factor": scaling.factor}
    if scaling is not None:
        raise ConfigError("config.json has no place for RoPE divisors given one by one (GGUF's)")
    return {"rope_type": "default" + norm} if norm else None


def require_neutral(values: Mapping[str, Any], must_be: Mapping[str, Any]) -> None:
    """Raise ConfigError where a key that changes the arithmetic has another value than this."""
    for key, neutral in must_be.items():
        if key in values and values[key] != neutral:
            raise ConfigError(
                f"config.json: {key} is {quoted(values[key])}, only {neutral!r} is supported"
            )


def unused_keys(values: Mapping[str, Any], used: Collection[str]) -> list[str]:
    """A note that names the keys that nobody here looks at, if there are any."""
    unused = sorted(set(values) - HF_WITHOUT_EFFECT - set(used))
    return [f"config.json: no effect here: {', '.join(unused)}"] if unused else []


def _hf_rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", values.get("rope_theta"))
    get = Fields("config.json: rope_parameters", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = str(kind).removesuffix(AND_QK_NORM) if values.get("qk_norm") else kind
    scaling: RopeScaling | None = None
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=get.number("factor"),
            low_freq_factor=get.number("low_freq_factor"),
            high_freq_factor=get.number("high_freq_factor"),
            original_max_seq_len=get.whole("original_max_position_embeddings"),
        )
    elif kind == "linear":
        scaling = LinearScaling(factor=get.number("factor"))
    elif kind != "default":
        raise ConfigError(
            f"config.json: rope type {kind!r} is not supported (have default, linear, llama3)"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor is not supported, heads turn whole")
    return OLD_THETA if theta is None else float(theta), scaling


# --- GGUF: llama.* metadata -----------------------------------------------------------------


def config_from_gguf(file: TensorFile) -> Resolved:
    """The metadata of a `llama` GGUF, and its `rope_freqs.weight`. Raises ConfigError."""
    values = file.metadata
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"GGUF: general.architecture is {architecture!r}, only 'llama' is supported"
        )
    get = Fields("GGUF", values)
    if values.get("llama.expert_count"):
        raise ConfigError("GGUF: llama.expert_count: mixtures of experts are not supported")
    dim, n_heads = get.whole("llama.embedding_length"), get.whole("llama.attention.head_count")
    head_dim = get.whole("llama.attention.key_length", _divided(dim, n_heads) or REQUIRED)
    turned = get.whole("llama.rope.dimension_count", head_dim)
    if turned != head_dim or get.whole("llama.attention.value_length", head_dim) != head_dim:
        raise ConfigError(f"GGUF: heads of {head_dim} with {turned} turned are not supported")
    names = set(file.names())
    embedded = file.info("token_embd.weight").shape[0] if "token_embd.weight" in names else None
    config = LlamaConfig(
        dim=dim,
        n_layers=get.whole("llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=get.whole("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=get.whole("llama.feed_forward_length"),
        vocab_size=get.whole("llama.vocab_size", embedded or REQUIRED),
        max_seq_len=get.whole("llama.context_length"),
        norm_eps=get.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=get.number("llama.rope.freq_base", OLD_THETA),
        rope_scaling=_gguf_scaling(file, names),
        rope_layout="pairs",
        tie_embeddings="output.weight" not in names,
    )
    return Resolved(config, [])


def _gguf_scaling(file: TensorFile, names: set[str]) -> RopeScaling | None:
    """`rope_freqs.weight` holds the divisors of the frequencies: Llama 3.1's rule, worked out."""
    if "rope_freqs.weight" in names:
        stored = file.read("rope_freqs.weight")
        return GivenDivisors(values=tuple(float(v) for v in np.ravel(stored)))
    values = file.metadata
    kind = values.get("llama.rope.scaling.type", "none")
    factor = values.get("llama.rope.scaling.factor", values.get("llama.rope.scale_linear"))
    if kind == "linear" or (kind == "none" and factor not in (None, 0.0, 1.0)):
        get = Fields("GGUF", {"llama.rope.scaling.factor": factor})
        return LinearScaling(factor=get.number("llama.rope.scaling.factor"))
    if kind != "none":
        raise ConfigError(f"GGUF: llama.rope.scaling.type {kind!r} is not supported")
    return None


# --- Meta: params.json ----------------------------------------------------------------------

META_KEYS = frozenset(
    "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta "
    "use_scaled_rope max_seq_len max_batch_size model_type".split()
)
# Meta's params.json says only that RoPE is scaled; by how much follows from the release.
SMALL_LLAMA_32 = {(2048, 16), (3072, 28)}  # (dim, n_layers) of 3.2-1B and 3B: factor 32, else 8
LLAMA_3_VOCABULARY = 128_256


def config_from_meta(values: Mapping[str, Any], vocab_rows: int, tied: bool) -> Resolved:
    """params.json, with what the weights alone can tell: rows of the embedding, output or none.

    Raises ConfigError naming the field; what the file leaves out is inferred and noted.
    """
    unknown = sorted(set(values) - META_KEYS)
    if unknown:
        raise ConfigError(
            f"params.json: {', '.join(unknown)}: not a plain Llama (quantised, adapted or "
            "multimodal checkpoints are not supported)"
        )
    get = Fields("params.json", values)
    dim, n_heads = get.whole("dim"), get.whole("n_heads")
    n_layers, head_dim = get.whole("n_layers"), _divided(dim, n_heads)
    if head_dim is None:
        raise ConfigError(f"params.json: dim {dim} is no multiple of n_heads {n_heads}")
    vocab_size = vocab_rows if values.get("vocab_size", -1) == -1 else get.whole("vocab_size")
    scaled = bool(values.get("use_scaled_rope", False))
    factor = 32.0 if (dim, n_layers) in SMALL_LLAMA_32 else 8.0
    context = 131_072 if scaled else 8192 if vocab_size == LLAMA_3_VOCABULARY else 4096
    notes = [f"params.json: context length {context} inferred"]
    if scaled:
        notes.append(f"params.json: RoPE scaling factor {factor:g} inferred from the size")
    config = LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads if values.get("n_kv_heads") is None else get.whole("n_kv_heads"),
        head_dim=head_dim,
        ffn_dim=meta_ffn_dim(
            dim, get.whole("multiple_of", 256), values.get("ffn_dim_multiplier")
        ),  # 256: the default of Meta's own code
        vocab_size=vocab_size,
        max_seq_len=context,
        norm_eps=get.number("norm_eps", 1e-5),
        rope_theta=get.number("rope_theta", OLD_THETA),
        rope_scaling=Llama3Scaling(factor=factor) if scaled else None,
        rope_layout="pairs",
        tie_embeddings=tied,
    )
    return Resolved(config, notes)


def meta_ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Two thirds of 4·dim, times the multiplier, rounded up: how Meta sizes SwiGLU."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def _divided(dim: int, n_heads: int) -> int | None:
    return dim // n_heads if dim % n_heads == 0 else None
