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
from glassllama.base.errors import ConfigError, listed, quoted
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
LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
GPT2, BIGRAM = "GPT2LMHeadModel", "GlassBigramForCausalLM"  # weights/gpt2.py, weights/bigram.py
# `model_type` of a config.json -> the architecture; transformers chooses by it, too.
FAMILIES = {
    "llama": LLAMA, "mistral": MISTRAL, "glass_llama": WITH_QK_NORM,
    "gpt2": GPT2, "glass_bigram": BIGRAM,
}  # fmt: skip
SUPPORTED_FAMILIES = ", ".join(f"{family} ({name})" for family, name in FAMILIES.items())


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
    "rope_parameters tie_word_embeddings qk_norm sliding_window layer_types "
    "original_max_position_embeddings".split()
)
# Keys that change the arithmetic -> the value at which they do not.
HF_MUST_BE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
FULL, SLIDING = "full_attention", "sliding_attention"  # the layer_types of transformers


def architecture(values: Mapping[str, Any]) -> str:
    """The name of the model in a config.json; a Llama's where it says none. Raises ConfigError."""
    get = Fields("config.json", values)
    family, named = get.text("model_type", None), get.items("architectures", (), of="text")
    if family is not None and family not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type is {quoted(family)}, supported are {SUPPORTED_FAMILIES}"
        )
    if named and named[0] not in FAMILIES.values():
        raise ConfigError(
            f"config.json: architectures is {quoted(named)}, supported are {SUPPORTED_FAMILIES}"
        )
    if family is None or not named:
        return str(named[0]) if named else FAMILIES[family or "llama"]
    if named[0] != FAMILIES[family] and {named[0], FAMILIES[family]} & {GPT2, BIGRAM}:
        raise ConfigError(
            f"config.json: model_type is {quoted(family)}, but architectures is {quoted(named)}"
        )
    return FAMILIES[family]


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    """config.json of a Llama-architecture model. Raises ConfigError naming the field."""
    name, get = architecture(values), Fields("config.json", values)
    same = {"hidden_act": "silu"} if values.get("hidden_act") == "swish" else {}  # an older name
    require_neutral({**values, **same}, HF_MUST_BE)
    notes = unused_keys(values, HF_USED | set(HF_MUST_BE))
    n_heads, dim = get.whole("num_attention_heads"), get.whole("hidden_size")
    n_layers, qk_norm = get.whole("num_hidden_layers"), get.boolean("qk_norm", False)
    if qk_norm and name != WITH_QK_NORM:
        get.refuse("qk_norm", f"false in a {name}, which has none for anybody else")
    # What transformers assumes where the keys are left out.
    kv_heads = 8 if name == MISTRAL and "num_key_value_heads" not in values else n_heads
    context = get.whole("max_position_embeddings", 131_072 if name == MISTRAL else 2048)
    theta, scaling, exact_up_to = _hf_rope(get, context, qk_norm)
    window = _hf_window(get, name)
    config = LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=get.whole("num_key_value_heads", kv_heads),
        head_dim=get.whole("head_dim", _divided(dim, n_heads) or REQUIRED),
        ffn_dim=get.whole("intermediate_size"),
        vocab_size=get.whole("vocab_size"),
        max_seq_len=min(context, exact_up_to or context, window or context),
        norm_eps=get.number("rms_norm_eps", 1e-6),  # as transformers assumes
        rope_theta=theta,
        rope_scaling=scaling,
        rope_layout="half",
        tie_embeddings=get.boolean("tie_word_embeddings", False),
        qk_norm=qk_norm,
    )
    if exact_up_to is not None:
        notes.append(f"config.json: rope type 'dynamic': {_bounded(exact_up_to)}")
    if window is not None and window < context:
        notes.append(f"config.json: sliding_window {window}: {_bounded(window)}")
    elif window is None and values.get("sliding_window") is not None:
        notes.append("config.json: sliding_window has no effect: no layer uses it")
    return Resolved(config, notes)


def _bounded(tokens: int) -> str:
    return f"exact up to {tokens} tokens, so the context ends there"


def _hf_window(get: Fields, name: str) -> int | None:
    """Tokens that the layer with the shortest sight sees, itself included; None: all of them.

    A Llama of transformers has no windows; its Mistral has one of 4,096 where the key is left out,
    in every layer: it knows nothing of `use_sliding_window` and `max_window_layers`, which are
    Qwen's. `layer_types` says that only some layers have it, or none.
    """
    left_out = name == MISTRAL and "sliding_window" not in get.values
    window = get.whole("sliding_window", 4096 if left_out else None)
    kinds = get.items("layer_types", None, of="text")
    if kinds is not None and set(kinds) - {FULL, SLIDING}:
        get.refuse("layer_types", f"a list of {FULL} and {SLIDING}")
    return window if (name == MISTRAL if kinds is None else SLIDING in kinds) else None


def llama_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """What `config_from_hf` reads, and transformers. Raises ConfigError: no words for it."""
    if config.rope_layout != "half":
        raise ConfigError(
            "config.json: Hugging Face's Llama has rope_layout half, this one has interleaved"
        )
    name = WITH_QK_NORM if config.qk_norm else LLAMA
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


def require_neutral(
    values: Mapping[str, Any], must_be: Mapping[str, Any], file: str = "config.json"
) -> None:
    """Raise ConfigError where a key that changes the arithmetic has another value than this.

    null is as good as left out.
    """
    for key, neutral in must_be.items():
        value = values.get(key)
        boolean = isinstance(value, bool) == isinstance(neutral, bool)
        if value is not None and (value != neutral or not boolean):
            raise ConfigError(f"{file}: {key} is {quoted(value)}, only {neutral!r} is supported")


def unused_keys(values: Mapping[str, Any], used: Collection[str]) -> list[str]:
    """A note that names the keys that nobody here looks at, if there are any."""
    unused = set(values) - HF_WITHOUT_EFFECT - set(used)
    return [f"config.json: no effect here: {listed(unused)}"] if unused else []


def _hf_rope(
    get: Fields, context: int, qk_norm: bool
) -> tuple[float, RopeScaling | None, int | None]:
    """Theta, scaling, and up to how many tokens that is exact (None: all).

    transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`, which
    holds where a file has both.
    """
    inner = {key: get.object(key, None) for key in ("rope_scaling", "rope_parameters")}
    key = next((key for key, one in inner.items() if one and one.values), "rope_parameters")
    values = one.values if (one := inner[key]) else {}
    rope = Fields(f"config.json: {key}", values, get.error)
    if nested := [key for key, value in values.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"{rope.place}: one for each kind of layer ({listed(nested)}), have one")
    require_neutral(values, {"partial_rotary_factor": 1.0})
    theta = rope.number("rope_theta", get.number("rope_theta", OLD_THETA))
    kind = rope.text("rope_type", rope.text("type", "default"))
    kind = kind.removesuffix(AND_QK_NORM) if qk_norm else kind
    if kind == "default":
        return theta, None, None
    if kind == "linear":
        return theta, LinearScaling(factor=rope.number("factor")), None
    trained = "original_max_position_embeddings"
    original = get.whole(trained, rope.whole(trained, context))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_seq_len=original,
        )
        return theta, scaling, None
    if kind == "dynamic":  # another theta, but only behind the context that it was trained with
        rope.number("factor")
        return theta, None, min(original, context)
    raise ConfigError(
        f"config.json: rope type {quoted(kind)} is not supported (have default, linear, llama3, "
        "and dynamic up to its original context)"
    )


# --- GGUF: llama.* metadata -----------------------------------------------------------------


GGUF_USED = frozenset(
    "block_count context_length embedding_length feed_forward_length expert_count vocab_size "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon attention.sliding_window rope.dimension_count rope.freq_base "
    "rope.scaling.type rope.scaling.factor rope.scale_linear".split()
)
# What llama.cpp reads of every architecture, and that changes the arithmetic.
GGUF_MUST_BE = {"llama.rope.scaling.attn_factor": 1.0, "llama.attention.causal": True}
# Numbers that may stand there once for each layer.
GGUF_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
GGUF_WITHOUT_EFFECT = frozenset(
    "expert_used_count rope.scaling.finetuned rope.scaling.original_context_length "
    "tensor_data_layout".split()
)
EMBEDDINGS, DIVISORS = "token_embd.weight", "rope_freqs.weight"


def config_from_gguf(file: TensorFile) -> Resolved:
    """The metadata of a `llama` GGUF, and its `rope_freqs.weight`. Raises ConfigError."""
    get = Fields("GGUF", _one_for_all_layers(file.metadata))
    architecture = get.text("general.architecture", None)
    if architecture != "llama":
        raise ConfigError(
            f"GGUF: general.architecture is {quoted(architecture)}, only 'llama' is supported"
        )
    if get.whole("llama.expert_count", 0, least=0):
        raise ConfigError("GGUF: llama.expert_count: mixtures of experts are not supported")
    require_neutral(file.metadata, GGUF_MUST_BE, "GGUF")
    dim, n_heads = get.whole("llama.embedding_length"), get.whole("llama.attention.head_count")
    head_dim = get.whole("llama.attention.key_length", _divided(dim, n_heads) or REQUIRED)
    turned = get.whole("llama.rope.dimension_count", head_dim)
    if turned != head_dim or get.whole("llama.attention.value_length", head_dim) != head_dim:
        raise ConfigError(f"GGUF: heads of {head_dim} with {turned} turned are not supported")
    names = set(file.names())
    vocab_size = get.whole("llama.vocab_size", None)
    rows = embedding_rows(file, EMBEDDINGS) if EMBEDDINGS in names else vocab_size
    context = get.whole("llama.context_length")
    window = get.whole("llama.attention.sliding_window", 0, least=0) or context  # 0: none
    config = LlamaConfig(
        dim=dim,
        n_layers=get.whole("llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=get.whole("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=get.whole("llama.feed_forward_length"),
        vocab_size=get.whole("llama.vocab_size") if rows is None else rows,
        max_seq_len=min(context, window),
        norm_eps=get.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=get.number("llama.rope.freq_base", OLD_THETA),
        rope_scaling=_gguf_scaling(file, get, head_dim // 2),
        rope_layout="interleaved",
        tie_embeddings="output.weight" not in names,
    )
    notes = _gguf_unused(file.metadata)
    if window < context:
        notes.append(f"GGUF: llama.attention.sliding_window {window}: {_bounded(window)}")
    if vocab_size not in (None, rows):
        notes.append(f"GGUF: llama.vocab_size is {vocab_size}, the embeddings have {rows} rows")
    return Resolved(config, notes)


def _one_for_all_layers(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, with one number for a list that has the same for each layer."""
    values = dict(metadata)
    for key in (f"llama.{name}" for name in GGUF_BY_LAYER):
        each = values.get(key)
        if isinstance(each, np.ndarray) and len(each) == values.get("llama.block_count"):
            numbers = {*each.tolist()}
            values[key] = numbers.pop() if len(numbers) == 1 else each
    return values


def embedding_rows(file: TensorFile, name: str) -> int:
    """The model's vocabulary; the tokenizer's may be another. Raises ConfigError: no matrix."""
    shape = file.info(name).shape
    if len(shape) != 2 or not shape[0]:
        raise ConfigError(f"{name} has the shape {shape}, expected (vocabulary, width)")
    return shape[0]


def _gguf_unused(metadata: Mapping[str, Any]) -> list[str]:
    used = {f"llama.{key}" for key in GGUF_USED | GGUF_WITHOUT_EFFECT} | {*GGUF_MUST_BE}
    unused = {key for key in metadata if key.startswith("llama.")} - used
    return [f"GGUF: no effect here: {listed(unused)}"] if unused else []


def _gguf_scaling(file: TensorFile, get: Fields, count: int) -> RopeScaling | None:
    """By what the `count` frequencies are divided: a factor, and a divisor each.

    `rope_freqs.weight` holds such divisors: Llama 3.1's rule, worked out. Where a file has both,
    llama.cpp applies both.
    """
    kind = get.text("llama.rope.scaling.type", None)
    old = get.number("llama.rope.scale_linear", 0.0, least=0.0)
    factor = get.number("llama.rope.scaling.factor", old, least=0.0)
    if kind not in (None, "none", "linear"):
        raise ConfigError(f"GGUF: llama.rope.scaling.type {quoted(kind)} is not supported")
    factor = factor if factor and kind != "none" else 1.0  # llama.cpp takes 0 for none
    if DIVISORS not in file.names():
        return None if factor == 1.0 else LinearScaling(factor=factor)
    info = file.info(DIVISORS)
    if info.shape != (count,) or info.dtype != "F32":
        raise ConfigError(
            f"GGUF: {DIVISORS} must be {count} numbers of type F32, got {info.dtype} {info.shape}"
        )
    return GivenDivisors(values=tuple(factor * float(one) for one in file.read(DIVISORS)))


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
    unknown = set(values) - META_KEYS
    if unknown:
        raise ConfigError(
            f"params.json: {listed(unknown)}: not a plain Llama (quantised, adapted or "
            "multimodal checkpoints are not supported)"
        )
    get = Fields("params.json", values)
    dim, n_heads = get.whole("dim"), get.whole("n_heads")
    n_layers, head_dim = get.whole("n_layers"), _divided(dim, n_heads)
    if head_dim is None:
        raise ConfigError(f"params.json: dim {dim} is no multiple of n_heads {n_heads}")
    vocab_size = get.whole("vocab_size", -1, least=-1)
    vocab_size = vocab_rows if vocab_size == -1 else vocab_size
    scaled = get.boolean("use_scaled_rope", False)
    factor = 32.0 if (dim, n_layers) in SMALL_LLAMA_32 else 8.0
    context = 131_072 if scaled else 8192 if vocab_size == LLAMA_3_VOCABULARY else 4096
    notes = [f"params.json: context length {context} inferred"]
    if scaled:
        notes.append(f"params.json: RoPE scaling factor {factor:g} inferred from the size")
    config = LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=get.whole("n_kv_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=meta_ffn_dim(
            dim, get.whole("multiple_of", 256), get.number("ffn_dim_multiplier", None)
        ),  # 256: the default of Meta's own code
        vocab_size=vocab_size,
        max_seq_len=context,
        norm_eps=get.number("norm_eps", 1e-5),
        rope_theta=get.number("rope_theta", OLD_THETA),
        rope_scaling=Llama3Scaling(factor=factor) if scaled else None,
        rope_layout="interleaved",
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
