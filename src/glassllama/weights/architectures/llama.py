"""Llama and its relatives: LLaMA, Llama 2, 3 and Mistral; a Llama with QK-norm of our own.

Tensor names of Hugging Face, GGUF and Meta; configurations of config.json, GGUF metadata and
params.json → one LlamaConfig. Sizes that a file leaves out follow from rules that its format
states; whatever would change the arithmetic and is not supported is an error; a key without effect
here is named in a note.

All formats store (out, in) matrices, and the RoPE layout is configuration: no tensor is permuted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import (
    GivenDivisors,
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    RopeScaling,
    rope_frequencies,
)
from glassllama.base.errors import ConfigError, join_names, quoted
from glassllama.base.fields import REQUIRED, Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import llama_plan
from glassllama.formats.blocks import FLOATS
from glassllama.weights.architectures.description import (
    Architecture,
    ExtraTensors,
    ReadKeys,
    Resolved,
    TensorRule,
    hf_class,
    require_neutral,
    unused_note,
)

OLD_THETA = 10_000.0  # the original base of RoPE; files before Llama 3 leave it out
LLAMA_CLASS, MISTRAL_CLASS = "LlamaForCausalLM", "MistralForCausalLM"
# transformers has no Llama with `qk_norm`. If its class is named it would still build a plain one,
# whatever the name of the architecture, but not with a RoPE type that it does not know.
QK_NORM_CLASS, QK_NORM_ROPE = "GlassLlamaForCausalLM", "+qk_norm"
HF_CLASSES = {"llama": LLAMA_CLASS, "mistral": MISTRAL_CLASS, "glass_llama": QK_NORM_CLASS}


# --- tensors --------------------------------------------------------------------------------


def weight(
    ours: str, hf: str, gguf: str, meta: str, *shape: str, absent_if: str = ""
) -> TensorRule:
    return TensorRule(
        ours=f"{ours}.weight", hf=f"{hf}.weight", gguf=f"{gguf}.weight", meta=f"{meta}.weight",
        shape=shape, absent_if=absent_if,
    )  # fmt: skip


def in_layer(ours: str, hf: str, gguf: str, meta: str, *shape: str) -> TensorRule:
    hf, gguf, meta = f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}", f"layers.{{}}.{meta}"
    return weight(f"layers.{{}}.{ours}", hf, gguf, meta, *shape)


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


def is_rope_table(file: TensorFile, name: str, config: LlamaConfig) -> bool:
    """Whether stored RoPE frequencies are the configuration's, with or without its scaling."""
    tables = rope_frequencies(config), rope_frequencies(replace(config, rope_scaling=None))
    return any(is_close_to(file, name, table) for table in tables)


def is_close_to(file: TensorFile, name: str, expected: NDArray[np.float32]) -> bool:
    """Whether a stored table agrees to the precision of its type.

    It was computed in float32 as theta to the power of -2i/D: the exponent's rounding error is
    multiplied by ln theta < 16, the other steps add a few, together 32; then the type rounds once.
    """
    info = file.info(name)
    if info.shape != expected.shape or info.dtype not in FLOATS:
        return False
    stored = file.read(name).astype(np.float64)
    precision = {"F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[info.dtype]
    smallest = 2.0**-24 if info.dtype == "F16" else 0.0  # F16 has few numbers near zero
    allowed = (32 * 2.0**-24 + precision) * expected + smallest
    return bool(np.all(np.abs(stored - expected) <= allowed))


def rope_tables(pattern: str) -> ExtraTensors:
    """Tables that old writers stored beside the weights."""
    note = "not the frequencies of the configuration, ignored"
    return ExtraTensors(re.compile(pattern), is_rope_table, note)


# --- Hugging Face: config.json --------------------------------------------------------------

# Ours -> theirs: whole numbers that a file must have.
HF_SIZES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size", "vocab_size": "vocab_size",
}  # fmt: skip
# Keys that change the arithmetic -> the value at which they do not.
HF_MUST_BE = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"  # the layer_types of transformers


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    """config.json of a Llama or Mistral. Raises ConfigError naming the field."""
    name = hf_class(values, HF_CLASSES)
    get = Fields("config.json", values := ReadKeys(values))
    is_mistral, qk_norm = name == MISTRAL_CLASS, get.boolean("qk_norm", False)
    swish = {"hidden_act": "swish"} if values.get("hidden_act") == "swish" else {}  # its old name
    require_neutral(values, HF_MUST_BE | swish)
    if qk_norm and name != QK_NORM_CLASS:
        get.refuse("qk_norm", f"false in a {name}: other programs would ignore it")
    sizes: dict[str, Any] = {ours: get.integer(theirs) for ours, theirs in HF_SIZES.items()}
    dim, n_heads = sizes["dim"], sizes["n_heads"]
    # The defaults of transformers.
    kv_heads = 8 if is_mistral and "num_key_value_heads" not in values else n_heads
    context = get.integer("max_position_embeddings", 131_072 if is_mistral else 2048)
    theta, scaling, exact_up_to = rope_from_hf(get, context, qk_norm)
    window = window_from_hf(get, name)
    config = LlamaConfig(
        **sizes,
        n_kv_heads=get.integer("num_key_value_heads", kv_heads),
        head_dim=get.integer("head_dim", quotient(dim, n_heads) or REQUIRED),
        max_seq_len=min(context, exact_up_to or context, window or context),
        norm_eps=get.number("rms_norm_eps", 1e-6),  # as transformers assumes
        rope_theta=theta,
        rope_scaling=scaling,
        rope_layout="half",
        tie_embeddings=get.boolean("tie_word_embeddings", False),
        qk_norm=qk_norm,
    )
    notes = unused_note(values.unused() - {ORIGINAL})
    if exact_up_to is not None:
        notes.append(f"config.json: rope type 'dynamic': {context_ends_at(exact_up_to)}")
    if window is not None and window < context:
        notes.append(f"config.json: sliding_window {window}: {context_ends_at(window)}")
    elif window is None and values.get("sliding_window") is not None:
        notes.append("config.json: sliding_window has no effect: no layer uses it")
    return Resolved(config, notes)


def context_ends_at(tokens: int) -> str:
    return f"exact up to {tokens} tokens, so the context ends there"


def window_from_hf(get: Fields, name: str) -> int | None:
    """The smallest sliding window of all layers, in tokens, the query's own included; None: none.

    transformers' Llama has no windows. Its Mistral has one of 4,096 in every layer by default, and
    ignores `use_sliding_window` and `max_window_layers`, which are Qwen's. `layer_types` lists the
    layers with a window.
    """
    left_out = name == MISTRAL_CLASS and "sliding_window" not in get.values
    window = get.integer("sliding_window", 4096 if left_out else None)
    kinds = get.items("layer_types", None, of="text")
    if kinds is not None and set(kinds) - {FULL, SLIDING}:
        get.refuse("layer_types", f"a list of {FULL} and {SLIDING}")
    return window if (name == MISTRAL_CLASS if kinds is None else SLIDING in kinds) else None


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """A config.json that transformers and `config_from_hf` read. Raises ConfigError if it has no
    key for something.
    """
    if config.rope_layout != "half":
        raise ConfigError(
            "config.json: Hugging Face's Llama has rope_layout half, this one has interleaved"
        )
    return {
        "architectures": [QK_NORM_CLASS if config.qk_norm else LLAMA_CLASS],
        "model_type": "glass_llama" if config.qk_norm else "llama",
        **{theirs: getattr(config, ours) for ours, theirs in HF_SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_to_hf(config),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        **({"qk_norm": True} if config.qk_norm else {}),
    }


def rope_to_hf(config: LlamaConfig) -> dict[str, Any] | None:
    scaling, norm = config.rope_scaling, QK_NORM_ROPE if config.qk_norm else ""
    if isinstance(scaling, Llama3Scaling):
        factors = {key: getattr(scaling, key) for key in LLAMA3_FACTORS}
        return {"rope_type": "llama3" + norm, **factors, ORIGINAL: scaling.original_max_seq_len}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear" + norm, "factor": scaling.factor}
    if scaling is not None:
        raise ConfigError("config.json has no key for a list of RoPE divisors (of a GGUF file)")
    return {"rope_type": "default" + norm} if norm else None


def rope_from_hf(
    get: Fields, context: int, qk_norm: bool
) -> tuple[float, RopeScaling | None, int | None]:
    """Theta, scaling, and the number of tokens up to which they are exact (None: no limit).

    transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`, which
    is used if a file has both.
    """
    objects = {key: get.object(key, None) for key in ("rope_scaling", "rope_parameters")}
    key = next((key for key, found in objects.items() if found and found.values), "rope_parameters")
    values = found.values if (found := objects[key]) else {}
    rope = Fields(f"config.json: {key}", values, get.error)
    if nested := [key for key, value in values.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"{rope.source}: one per type of layer ({join_names(nested)}), only one for all is "
            "supported"
        )
    require_neutral(values, {"partial_rotary_factor": 1.0})
    theta = rope.number("rope_theta", get.number("rope_theta", OLD_THETA))
    kind = rope.text("rope_type", rope.text("type", "default"))
    kind = kind.removesuffix(QK_NORM_ROPE) if qk_norm else kind
    if kind == "default":
        return theta, None, None
    if kind == "linear":
        return theta, LinearScaling(factor=rope.number("factor")), None
    original = get.integer(ORIGINAL, rope.integer(ORIGINAL, context))
    if kind == "llama3":
        factors = {key: rope.number(key) for key in LLAMA3_FACTORS}
        return theta, Llama3Scaling(**factors, original_max_seq_len=original), None
    if kind == "dynamic":  # changes theta, but only for texts longer than the original context
        rope.number("factor")
        return theta, None, min(original, context)
    raise ConfigError(
        f"config.json: rope type {quoted(kind)} is not supported (have default, linear, llama3, "
        "and dynamic up to its original context)"
    )


# --- GGUF: llama.* metadata -----------------------------------------------------------------

# Ours -> theirs, after "llama.": whole numbers that a file must have.
GGUF_SIZES = {
    "dim": "embedding_length", "n_layers": "block_count", "n_heads": "attention.head_count",
    "ffn_dim": "feed_forward_length",
}  # fmt: skip
# Keys that llama.cpp reads for every architecture and that change the arithmetic.
GGUF_MUST_BE = {"llama.rope.scaling.attn_factor": 1.0, "llama.attention.causal": True}
# Numbers that may be lists, with one entry for each layer.
GGUF_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
GGUF_WITHOUT_EFFECT = frozenset(
    "expert_used_count rope.scaling.finetuned rope.scaling.original_context_length "
    "tensor_data_layout".split()
)
EMBEDDINGS, DIVISORS = "token_embd.weight", "rope_freqs.weight"


def config_from_gguf(file: TensorFile) -> Resolved:
    """The metadata of a `llama` GGUF, and its `rope_freqs.weight`. Raises ConfigError."""
    get = Fields("GGUF", values := ReadKeys(with_uniform_lists(file.metadata)))
    if get.integer("llama.expert_count", 0, minimum=0):
        raise ConfigError("GGUF: llama.expert_count: mixtures of experts are not supported")
    require_neutral(values, GGUF_MUST_BE, "GGUF")
    sizes: dict[str, Any] = {
        our: get.integer(f"llama.{their}") for our, their in GGUF_SIZES.items()
    }
    head_dim = quotient(sizes["dim"], sizes["n_heads"]) or REQUIRED
    head_dim = get.integer("llama.attention.key_length", head_dim)
    rotary_dim = get.integer("llama.rope.dimension_count", head_dim)
    value_dim = get.integer("llama.attention.value_length", head_dim)
    if not rotary_dim == value_dim == head_dim:
        raise ConfigError(
            f"GGUF: heads of {head_dim} with {rotary_dim} rotary dimensions and values of "
            f"{value_dim} are not supported: all three must be equal"
        )
    names = set(file.names())
    vocab_size = get.integer("llama.vocab_size", None)
    rows = embedding_rows(file, EMBEDDINGS) if EMBEDDINGS in names else vocab_size
    context = get.integer("llama.context_length")
    window = get.integer("llama.attention.sliding_window", 0, minimum=0) or context  # 0: none
    config = LlamaConfig(
        **sizes,
        n_kv_heads=get.integer("llama.attention.head_count_kv", sizes["n_heads"]),
        head_dim=head_dim,
        vocab_size=get.integer("llama.vocab_size") if rows is None else rows,
        max_seq_len=min(context, window),
        norm_eps=get.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=get.number("llama.rope.freq_base", OLD_THETA),
        rope_scaling=scaling_from_gguf(file, get, head_dim // 2),
        rope_layout="interleaved",
        tie_embeddings="output.weight" not in names,
    )
    unused = {key.removeprefix("llama.") for key in values.unused() if key.startswith("llama.")}
    notes = unused_note({f"llama.{key}" for key in unused - GGUF_WITHOUT_EFFECT}, "GGUF")
    if window < context:
        notes.append(f"GGUF: llama.attention.sliding_window {window}: {context_ends_at(window)}")
    if vocab_size not in (None, rows):
        notes.append(f"GGUF: llama.vocab_size is {vocab_size}, the embeddings have {rows} rows")
    return Resolved(config, notes)


def with_uniform_lists(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, with a number instead of a list that has the same number for each layer."""
    values = dict(metadata)
    for key in (f"llama.{name}" for name in GGUF_BY_LAYER):
        numbers = values.get(key)
        if isinstance(numbers, np.ndarray) and len(numbers) == values.get("llama.block_count"):
            different = {*numbers.tolist()}
            values[key] = different.pop() if len(different) == 1 else numbers
    return values


def embedding_rows(file: TensorFile, name: str) -> int:
    """The vocabulary of the model (the tokenizer's may be smaller). Raises ConfigError."""
    shape = file.info(name).shape
    if len(shape) != 2 or not shape[0]:
        raise ConfigError(f"{name} has the shape {shape}, expected (vocabulary, width)")
    return shape[0]


def scaling_from_gguf(file: TensorFile, get: Fields, count: int) -> RopeScaling | None:
    """The divisors of the `count` frequencies: a factor for all, and `rope_freqs.weight`.

    That tensor holds what Llama 3.1's rule gives. If a file has both, both apply, as in llama.cpp.
    """
    kind = get.text("llama.rope.scaling.type", None)
    old = get.number("llama.rope.scale_linear", 0.0, minimum=0.0)
    factor = get.number("llama.rope.scaling.factor", old, minimum=0.0)
    if kind not in (None, "none", "linear"):
        raise ConfigError(f"GGUF: llama.rope.scaling.type {quoted(kind)} is not supported")
    factor = factor if factor and kind != "none" else 1.0  # 0 means none in llama.cpp
    if DIVISORS not in file.names():
        return None if factor == 1.0 else LinearScaling(factor=factor)
    info = file.info(DIVISORS)
    if info.shape != (count,) or info.dtype != "F32":
        raise ConfigError(
            f"GGUF: {DIVISORS} must be {count} numbers of type F32, got {info.dtype} {info.shape}"
        )
    return GivenDivisors(values=tuple(factor * float(divisor) for divisor in file.read(DIVISORS)))


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


def quotient(dim: int, n_heads: int) -> int | None:
    return dim // n_heads if dim % n_heads == 0 else None


LLAMA = Architecture(
    name="llama",
    title="Llama",
    hf_classes=HF_CLASSES,
    gguf_names=("llama",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    rules=RULES,
    extras={
        "hf": (rope_tables(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"),),
        "meta": (rope_tables(r"rope\.freqs"),),
        "gguf": (ExtraTensors(re.compile(r"rope_freqs\.weight"), lambda *_: True, ""),),  # DIVISORS
    },
    model="glassllama.models.llama:Llama",
    layer_plan=llama_plan,
)
