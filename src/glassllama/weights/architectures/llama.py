"""Llama: LLaMA, Llama 2 and 3, GGUF files of Mistrals; a Llama with QK-norm of our own.

Tensor names of Hugging Face, GGUF and Meta; configurations of config.json, GGUF metadata and
params.json → one LlamaConfig. Sizes that a file leaves out follow from rules that its format
states; whatever would change the arithmetic and is not supported is an error; a key without effect
here is named in a note.

All formats store (out, in) matrices, and the RoPE layout is configuration: no tensor is permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassllama.base.config import Llama3Scaling, LlamaConfig
from glassllama.base.errors import ConfigError, join_names
from glassllama.base.fields import REQUIRED, Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import llama_plan
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.decoder import (
    FULL,
    HF_SIZES,
    SLIDING,
    GGUFFields,
    embedding_rows,
    hf_values,
    in_layer,
    quotient,
    read_sizes,
    weight,
)
from glassllama.weights.architectures.description import (
    Architecture,
    ReadKeys,
    Resolved,
    hf_class,
    require_neutral,
    unused_note,
)
from glassllama.weights.architectures.rope import (
    OLD_THETA,
    ORIGINAL,
    context_ends_at,
    rope_from_hf,
    rope_tables,
    rope_to_hf,
)

LLAMA_CLASS = "LlamaForCausalLM"
# transformers has no Llama with `qk_norm`. If its class is named it would still build a plain one,
# whatever the name of the architecture, but not with a RoPE type that it does not know.
QK_NORM_CLASS, QK_NORM_ROPE = "GlassLlamaForCausalLM", "+qk_norm"
HF_CLASSES = {"llama": LLAMA_CLASS, "glass_llama": QK_NORM_CLASS}


# --- tensors --------------------------------------------------------------------------------


RULES = (
    weight("tok_embeddings", "model.embed_tokens", "token_embd", "tok_embeddings", "V", "C"),
    in_layer("attention_norm", "input_layernorm", "attn_norm", "attention_norm", "C"),
    in_layer("attention.wq", "self_attn.q_proj", "attn_q", "attention.wq", "H*D", "C"),
    in_layer("attention.wk", "self_attn.k_proj", "attn_k", "attention.wk", "K*D", "C"),
    in_layer("attention.wv", "self_attn.v_proj", "attn_v", "attention.wv", "K*D", "C"),
    in_layer("attention.wo", "self_attn.o_proj", "attn_output", "attention.wo", "C", "H*D"),
    in_layer("ffn_norm", "post_attention_layernorm", "ffn_norm", "ffn_norm", "C"),
    in_layer("feed_forward.gate", "mlp.gate_proj", "ffn_gate", "feed_forward.w1", "F", "C"),
    in_layer("feed_forward.up", "mlp.up_proj", "ffn_up", "feed_forward.w3", "F", "C"),
    in_layer("feed_forward.down", "mlp.down_proj", "ffn_down", "feed_forward.w2", "C", "F"),
    weight("norm", "model.norm", "output_norm", "norm", "C"),
    weight("output", "lm_head", "output", "output", "V", "C", absent_if="tie_embeddings"),
)


# --- Hugging Face: config.json --------------------------------------------------------------

# Keys that change the arithmetic -> the value at which they do not.
HF_MUST_BE = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None,
}  # fmt: skip


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    """config.json of a Llama. Raises ConfigError naming the field."""
    name = hf_class(values, HF_CLASSES)
    get = Fields("config.json", values := ReadKeys(values))
    qk_norm = get.boolean("qk_norm", False)
    swish = {"hidden_act": "swish"} if values.get("hidden_act") == "swish" else {}  # its old name
    require_neutral(values, HF_MUST_BE | swish)
    if qk_norm and name != QK_NORM_CLASS:
        get.refuse("qk_norm", f"false in a {name}: other programs would ignore it")
    sizes: dict[str, Any] = read_sizes(get, HF_SIZES)
    dim, n_heads = sizes["dim"], sizes["n_heads"]
    context = get.integer("max_position_embeddings", 2048)  # as transformers assumes
    rope = rope_from_hf(get, context, suffix=QK_NORM_ROPE if qk_norm else "")
    rope.require_whole_heads()
    window = window_from_hf(get)
    config = LlamaConfig(
        **sizes,
        n_kv_heads=get.integer("num_key_value_heads", n_heads),
        head_dim=get.integer("head_dim", quotient(dim, n_heads) or REQUIRED),
        max_seq_len=min(rope.context, window or rope.context),
        norm_eps=get.number("rms_norm_eps", 1e-6),  # as transformers assumes
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_layout="half",
        tie_embeddings=get.boolean("tie_word_embeddings", False),
        qk_norm=qk_norm,
    )
    notes = [*unused_note(values.unused() - {ORIGINAL}), *rope.notes]
    if window is not None and window < context:
        notes.append(f"config.json: sliding_window {window}: {context_ends_at(window)}")
    elif window is None and values.get("sliding_window") is not None:
        notes.append("config.json: sliding_window has no effect: no layer uses it")
    return Resolved(config, notes)


def window_from_hf(get: Fields) -> int | None:
    """The sliding window of some layers, in tokens, the query's own included; None: none.

    transformers' Llama has no windows, unless `layer_types` lists layers with one.
    """
    window = get.integer("sliding_window", None)
    kinds = get.items("layer_types", None, of="text")
    if kinds is not None and set(kinds) - {FULL, SLIDING}:
        get.refuse("layer_types", f"a list of {FULL} and {SLIDING}")
    return window if kinds is not None and SLIDING in kinds else None


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """A config.json that transformers and `config_from_hf` read. Raises ConfigError if it has no
    key for something.
    """
    name, model_type = (QK_NORM_CLASS, "glass_llama") if config.qk_norm else (LLAMA_CLASS, "llama")
    values = hf_values(config, model_type, name, hidden_act="silu")
    if config.qk_norm:
        values |= {"rope_scaling": rope_to_hf(config.rope_scaling, QK_NORM_ROPE), "qk_norm": True}
    return values


# --- GGUF: llama.* metadata -----------------------------------------------------------------


def config_from_gguf(file: TensorFile) -> Resolved:
    """The metadata of a `llama` GGUF, and its `rope_freqs.weight`. Raises ConfigError."""

    def windows(get: GGUFFields, fields: dict[str, Any]) -> dict[str, Any]:
        context, notes = fields["max_seq_len"], list[str]()
        window = get.integer("attention.sliding_window", 0, minimum=0) or context  # 0: none
        if window < context:
            ends = context_ends_at(window)
            notes.append(f"GGUF: llama.attention.sliding_window {window}: {ends}")
        return {"max_seq_len": min(context, window), "notes": notes}

    return decoder.config_from_gguf(file, "llama", LlamaConfig, "interleaved", windows)


# --- Meta: params.json ----------------------------------------------------------------------

META_WITHOUT_EFFECT = ("max_seq_len", "max_batch_size", "model_type")
# params.json says only whether RoPE is scaled; the factor follows from the release.
SMALL_LLAMA_32 = {(2048, 16), (3072, 28)}  # (dim, n_layers) of 3.2-1B and 3B: factor 32, else 8
LLAMA_3_VOCABULARY = 128_256


def read_meta(values: Mapping[str, Any], file: TensorFile) -> Resolved:
    """`config_from_meta` with the numbers from the file's tensors."""
    names = set(file.names())
    if "tok_embeddings.weight" not in names:
        raise ConfigError("tok_embeddings.weight is missing: not a Llama in Meta's format")
    rows = embedding_rows(file, "tok_embeddings.weight")
    return config_from_meta(values, rows, tied="output.weight" not in names)


def config_from_meta(values: Mapping[str, Any], vocab_rows: int, tied: bool) -> Resolved:
    """params.json, with what only the tensors say: rows of the embeddings, tied or not.

    Raises ConfigError naming the field. What the file leaves out is inferred, with a note.
    """
    get = Fields("params.json", values := ReadKeys(values))
    dim, n_layers, n_heads = (get.integer(key) for key in ("dim", "n_layers", "n_heads"))
    head_dim = quotient(dim, n_heads)
    if head_dim is None:
        raise ConfigError(f"params.json: dim {dim} is no multiple of n_heads {n_heads}")
    vocab_size = get.integer("vocab_size", -1, minimum=-1)
    vocab_size = vocab_rows if vocab_size == -1 else vocab_size
    scaled = get.boolean("use_scaled_rope", False)
    factor = 32.0 if (dim, n_layers) in SMALL_LLAMA_32 else 8.0
    context = 131_072 if scaled else 8192 if vocab_size == LLAMA_3_VOCABULARY else 4096
    notes = [f"params.json: context length {context} inferred"]
    if scaled:
        notes.append(f"params.json: RoPE scaling factor {factor:g} inferred from the size")
    multiple_of = get.integer("multiple_of", 256)  # the default of Meta's own code
    config = LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=get.integer("n_kv_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=meta_ffn_dim(dim, multiple_of, get.number("ffn_dim_multiplier", None)),
        vocab_size=vocab_size,
        max_seq_len=context,
        norm_eps=get.number("norm_eps", 1e-5),
        rope_theta=get.number("rope_theta", OLD_THETA),
        rope_scaling=Llama3Scaling(factor=factor) if scaled else None,
        rope_layout="interleaved",
        tie_embeddings=tied,
    )
    if unknown := values.unused(META_WITHOUT_EFFECT):
        raise ConfigError(
            f"params.json: {join_names(unknown)}: not a plain Llama (quantized, adapted or "
            "multimodal checkpoints are not supported)"
        )
    return Resolved(config, notes)


def meta_ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of SwiGLU in Meta's code: two thirds of 4·dim, times the multiplier, rounded up."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


LLAMA = Architecture(
    name="llama",
    title="Llama",
    hf_classes=HF_CLASSES,
    gguf_names=("llama",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    rules=RULES,
    extras={**decoder.EXTRAS, "meta": (rope_tables(r"rope\.freqs"),)},
    model="glassllama.models.llama:Llama",
    layer_plan=llama_plan,
)
