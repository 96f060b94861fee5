"""What the descriptions of decoders share: names of tensors, sizes, RoPE, windows.

All families of decoders have the tensors, the keys of config.json and the metadata of a Llama, and
a few of their own. A description (llama.py, qwen.py, …) says what is different.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glassllama.base.config import DecoderConfig, DynamicScaling, RopeLayout
from glassllama.base.errors import ConfigError
from glassllama.base.fields import MAX_INTEGER, REQUIRED, Fields, is_integer
from glassllama.base.interfaces import TensorFile
from glassllama.weights.architectures.description import (
    HF_WITHOUT_EFFECT,
    ExtraTensors,
    FileFormat,
    ReadKeys,
    Resolved,
    Stored,
    TensorRule,
    require_neutral,
    unused_note,
)
from glassllama.weights.architectures.rope import (
    OLD_THETA,
    ORIGINAL,
    expected,
    rope_from_hf,
    rope_tables,
    rope_to_hf,
    scaling_from_gguf,
)

EXTRAS: Mapping[FileFormat, tuple[ExtraTensors, ...]] = {
    "hf": (rope_tables(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"),),
    "gguf": (expected(r"rope_freqs\.weight"),),
}
FULL, SLIDING = "full_attention", "sliding_attention"  # the layer_types of transformers


# --- tensors --------------------------------------------------------------------------------


def weight(
    ours: str, hf: str | Stored, gguf: str | Stored, meta: str, *shape: str, absent_if: str = "",
    kind: str = "weight",
) -> TensorRule:  # fmt: skip
    """The rule of a parameter; names without `kind`. `meta` "": not in that format."""
    names = {"hf": hf, "gguf": gguf, **({"meta": meta} if meta else {})}
    stored: dict[str, Any] = {
        key: f"{name}.{kind}" if isinstance(name, str) else name for key, name in names.items()
    }
    return TensorRule(ours=f"{ours}.{kind}", shape=shape, absent_if=absent_if, **stored)


def in_layer(
    ours: str, hf: str | Stored, gguf: str | Stored, meta: str, *shape: str, kind: str = "weight"
) -> TensorRule:
    """The rule of a parameter of every layer; names without the layer, except in `Stored`."""
    hf = f"model.layers.{{}}.{hf}" if isinstance(hf, str) else hf
    gguf = f"blk.{{}}.{gguf}" if isinstance(gguf, str) else gguf
    meta = f"layers.{{}}.{meta}" if meta else ""
    return weight(f"layers.{{}}.{ours}", hf, gguf, meta, *shape, kind=kind)


# Ours -> Hugging Face's, GGUF's.
Norms = Mapping[str, tuple[str, str]]
PRE_NORMS: Norms = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}
POST_NORMS: Norms = {
    "post_attention_norm": ("post_attention_layernorm", "post_attention_norm"),
    "post_ffn_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
FOUR_NORMS: Norms = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "post_attention_norm": ("post_attention_layernorm", "post_attention_norm"),
    "ffn_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "post_ffn_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
# Ours -> Hugging Face's, GGUF's, shape.
MATRICES = {
    "attention.wq": ("self_attn.q_proj", "attn_q", "H*D", "C"),
    "attention.wk": ("self_attn.k_proj", "attn_k", "K*D", "C"),
    "attention.wv": ("self_attn.v_proj", "attn_v", "K*D", "C"),
    "attention.wo": ("self_attn.o_proj", "attn_output", "C", "H*D"),
    "feed_forward.gate": ("mlp.gate_proj", "ffn_gate", "F", "C"),
    "feed_forward.up": ("mlp.up_proj", "ffn_up", "F", "C"),
    "feed_forward.down": ("mlp.down_proj", "ffn_down", "C", "F"),
}
# Matrices that are stored as one, in this order -> Hugging Face's name, GGUF's.
Fused = Mapping[tuple[str, ...], tuple[str, str]]


def decoder_rules(
    *, norms: Norms = PRE_NORMS, qk_norm: tuple[str, str] | None = None, qkv_bias: bool = False,
    fused: Fused | None = None, less_one: bool = False,
) -> tuple[TensorRule, ...]:  # fmt: skip
    """All tensors of a family.

    `qk_norm`: the shapes of the norms of q and k. `fused`: matrices stored as one. `less_one`:
    Hugging Face's files store the norms as w for 1 + w.
    """

    def norm(ours: str, hf: str, gguf: str, shape: str = "C", layer: bool = True) -> TensorRule:
        prefix = "model.layers.{}." if layer else "model."
        name = Stored(f"{prefix}{hf}.weight", less_one=less_one)
        return (in_layer if layer else weight)(ours, name, gguf, "", shape)

    parts = {
        ours: (number, whole, names)
        for whole, names in (fused or {}).items()
        for number, ours in enumerate(whole)
    }

    def matrix(ours: str) -> TensorRule:
        hf, gguf, *shape = MATRICES[ours]
        if ours not in parts:
            return in_layer(ours, hf, gguf, "", *shape)
        number, whole, names = parts[ours]
        heights = tuple(MATRICES[one][2] for one in whole)
        in_hf, in_gguf = (
            Stored(f"{prefix}.{{}}.{name}.weight", parts=heights, part=number)
            for prefix, name in zip(("model.layers", "blk"), names, strict=True)
        )
        return in_layer(ours, in_hf, in_gguf, "", *shape)

    def layer() -> Iterator[TensorRule]:
        yield from (norm(ours, *names) for ours, names in norms.items())
        yield from (matrix(ours) for ours in MATRICES)
        for letter, shape in zip("qk", qk_norm or (), strict=False):
            names = f"self_attn.{letter}_norm", f"attn_{letter}_norm"
            yield norm(f"attention.{letter}_norm", *names, shape)
        for letter in "qkv" if qkv_bias else "":
            hf, gguf, height, _ = MATRICES[f"attention.w{letter}"]
            yield in_layer(f"attention.w{letter}", hf, gguf, "", height, kind="bias")

    return (
        weight("tok_embeddings", "model.embed_tokens", "token_embd", "", "V", "C"),
        *layer(),
        norm("norm", "norm", "output_norm", layer=False),
        weight("output", "lm_head", "output", "", "V", "C", absent_if="tie_embeddings"),
    )


# --- Hugging Face: config.json --------------------------------------------------------------

# Ours -> theirs: whole numbers that a file must have.
HF_SIZES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size", "vocab_size": "vocab_size",
}  # fmt: skip
# Lists with an entry for each layer are made before the tensors of the file are counted: a claimed
# number must not make them huge.
MAX_LAYERS = 1_000_000


def read_sizes(get: Fields, names: Mapping[str, str]) -> dict[str, int]:
    """The whole numbers of HF_SIZES or GGUF_SIZES."""
    largest = {"n_layers": MAX_LAYERS}
    return {
        ours: get.integer(theirs, maximum=largest.get(ours, MAX_INTEGER))
        for ours, theirs in names.items()
    }


@dataclass(frozen=True, kw_only=True)
class HFKeys:
    """How a family's config.json differs from a Llama's."""

    n_kv_heads: int | None = None  # transformers' default; None: as many as query heads
    head_dim: int | None = None  # transformers' default; None: dim / n_heads
    context: int = 2048  # transformers' default, as the following
    norm_eps: float = 1e-6
    rope_theta: float = OLD_THETA
    tied: bool = False
    rope_keys: tuple[str, ...] = ()  # keys of rope_parameters that the family reads
    partial: bool = False  # whether a part of each head may be rotated
    neutral: Mapping[str, Any] = field(default_factory=dict)  # keys -> the only value supported


def config_from_hf(
    values: Mapping[str, Any], make: Callable[..., DecoderConfig], keys: HFKeys,
    more: Callable[[Fields, dict[str, Any]], dict[str, Any]] = lambda *_: {},
    without_effect: Collection[str] = (), own_rope: bool = False,
) -> Resolved:  # fmt: skip
    """The configuration of a family. Raises ConfigError naming the field.

    `more` reads the family's own keys: it gets the fields and the sizes read so far, and returns
    arguments for `make`; with `own_rope` those of RoPE, too.
    """
    get = Fields("config.json", values := ReadKeys(values))
    require_neutral(values, {"quantization_config": None, **keys.neutral})
    fields: dict[str, Any] = read_sizes(get, HF_SIZES)
    dim, n_heads = fields["dim"], fields["n_heads"]
    fields["n_kv_heads"] = get.integer("num_key_value_heads", keys.n_kv_heads or n_heads)
    head_dim = keys.head_dim or quotient(dim, n_heads) or REQUIRED
    fields["head_dim"] = get.integer("head_dim", head_dim)
    fields["norm_eps"] = get.number("rms_norm_eps", keys.norm_eps)
    fields["tie_embeddings"] = get.boolean("tie_word_embeddings", keys.tied)
    notes: list[str] = []
    if not own_rope:
        context = get.integer("max_position_embeddings", keys.context)
        rope = rope_from_hf(get, context, keys.rope_theta, own_keys=keys.rope_keys)
        if not keys.partial:
            rope.require_whole_heads()
        fields |= {
            "rope_theta": rope.theta, "rope_scaling": rope.scaling, "max_seq_len": rope.context,
        }  # fmt: skip
        notes = rope.notes
    fields |= more(get, fields)
    notes = [*notes, *fields.pop("notes", [])]
    config = make(**fields)
    unused = values.unused(HF_WITHOUT_EFFECT | {ORIGINAL, *without_effect})
    return Resolved(config, [*unused_note(unused), *notes])


def hf_values(config: DecoderConfig, model_type: str, name: str, **more: Any) -> dict[str, Any]:
    """The config.json of a family. Raises ConfigError if it has no key for something."""
    if config.rope_layout != "half":
        raise ConfigError(
            f"config.json: Hugging Face's {name} has rope_layout half, this one has interleaved"
        )
    context = config.longest_context
    if isinstance(config.rope_scaling, DynamicScaling):  # its rule takes this key as the original
        context = config.rope_scaling.original_max_seq_len
    return {
        "architectures": [name],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in HF_SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        **more,
    }


def layer_types(get: Fields, layers: int, default: Sequence[bool]) -> tuple[bool, ...]:
    """Which layers have a sliding window, from `layer_types`; `default` if the file has none."""
    kinds = get.items("layer_types", None, of="text")
    if kinds is None:
        return tuple(default)
    if set(kinds) - {FULL, SLIDING} or len(kinds) != layers:
        get.refuse("layer_types", f"a list of {layers} names, {FULL} or {SLIDING}")
    return tuple(kind == SLIDING for kind in kinds)


def layer_types_to_hf(window_layers: Sequence[bool]) -> list[str]:
    return [SLIDING if windowed else FULL for windowed in window_layers]


# --- GGUF -----------------------------------------------------------------------------------

# Ours -> theirs, after the name of the architecture: whole numbers that a file must have.
GGUF_SIZES = {
    "dim": "embedding_length", "n_layers": "block_count", "n_heads": "attention.head_count",
    "ffn_dim": "feed_forward_length",
}  # fmt: skip
# Numbers that may be lists, with one entry for each layer.
GGUF_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
GGUF_WITHOUT_EFFECT = frozenset(
    "expert_used_count rope.scaling.finetuned rope.scaling.original_context_length "
    "tensor_data_layout".split()
)
EMBEDDINGS = "token_embd.weight"


class GGUFFields(Fields):
    """The metadata of an architecture; keys without its name."""

    def __init__(self, file: TensorFile, name: str) -> None:
        self.name, self.file = name, file
        super().__init__("GGUF", ReadKeys(with_uniform_lists(file.metadata, name)))

    def integer(self, key: str, *default: Any, **limits: Any) -> Any:
        return super().integer(f"{self.name}.{key}", *default, **limits)

    def number(self, key: str, *default: Any, **limits: Any) -> Any:
        return super().number(f"{self.name}.{key}", *default, **limits)

    def text(self, key: str, *default: Any) -> Any:
        return super().text(f"{self.name}.{key}", *default)

    def unused(self, without_effect: Collection[str] = ()) -> list[str]:
        """A note on the keys of this architecture that were not read."""
        keys: ReadKeys = self.values  # type: ignore[assignment]
        prefix = f"{self.name}."
        unused = {key.removeprefix(prefix) for key in keys.unused() if key.startswith(prefix)}
        left = unused - GGUF_WITHOUT_EFFECT - set(without_effect)
        return unused_note({prefix + key for key in left}, "GGUF")


def config_from_gguf(
    file: TensorFile, name: str, make: Callable[..., DecoderConfig], layout: RopeLayout,
    more: Callable[[GGUFFields, dict[str, Any]], dict[str, Any]] = lambda *_: {},
    neutral: Mapping[str, Any] | None = None, own: Collection[str] = (),
) -> Resolved:  # fmt: skip
    """The metadata of a GGUF of a family. Raises ConfigError.

    `more` reads the family's own keys: it gets the fields and what was read so far, and returns
    arguments for `make`. `neutral`: keys -> the only value supported, except those in `own`, which
    `more` reads.
    """
    get = GGUFFields(file, name)
    if get.integer("expert_count", 0, minimum=0):
        raise ConfigError(f"GGUF: {name}.expert_count: mixtures of experts are not supported")
    # Keys that llama.cpp reads for every architecture and that change the arithmetic.
    only = {"attention.causal": True, "rope.scaling.attn_factor": 1.0, **(neutral or {})}
    only["rope.scaling.yarn_ext_factor"] = 1.0
    only = {f"{name}.{key}": value for key, value in only.items() if key not in own}
    require_neutral(get.values, only, "GGUF")
    fields: dict[str, Any] = read_sizes(get, GGUF_SIZES)
    head_dim = quotient(fields["dim"], fields["n_heads"]) or REQUIRED
    head_dim = get.integer("attention.key_length", head_dim)
    value_dim = get.integer("attention.value_length", head_dim)
    rotary_dim = get.integer("rope.dimension_count", head_dim)
    partial = "rotary_width" in getattr(make, "__dataclass_fields__", ())
    if value_dim != head_dim or (rotary_dim != head_dim and not partial):
        raise ConfigError(
            f"GGUF: heads of {head_dim} with {rotary_dim} rotary dimensions and values of "
            f"{value_dim} are not supported: all three must be equal"
        )
    names = set(file.names())
    vocab_size = get.integer("vocab_size", None)
    rows = embedding_rows(file, EMBEDDINGS) if EMBEDDINGS in names else vocab_size
    fields |= {
        "n_kv_heads": get.integer("attention.head_count_kv", fields["n_heads"]),
        "head_dim": head_dim,
        "vocab_size": get.integer("vocab_size") if rows is None else rows,
        "max_seq_len": get.integer("context_length"),
        "norm_eps": get.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": get.number("rope.freq_base", OLD_THETA),
        "rope_scaling": scaling_from_gguf(file, get, name, rotary_dim // 2),
        "rope_layout": layout,
        "tie_embeddings": "output.weight" not in names,
        **({"rotary_width": rotary_dim} if partial else {}),
    }
    fields |= more(get, fields)
    notes = fields.pop("notes", [])
    config = make(**fields)
    notes = [*get.unused(), *notes]
    if vocab_size not in (None, rows):
        notes.append(f"GGUF: {name}.vocab_size is {vocab_size}, the embeddings have {rows} rows")
    return Resolved(config, notes)


def with_uniform_lists(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The metadata, with a number instead of a list that has the same number for each layer."""
    values, layers = dict(metadata), metadata.get(f"{name}.block_count")
    for key in (f"{name}.{key}" for key in GGUF_BY_LAYER):
        numbers = values.get(key)
        if isinstance(numbers, np.ndarray) and is_integer(layers) and len(numbers) == layers:
            different = {*numbers.tolist()}
            values[key] = different.pop() if len(different) == 1 else numbers
    return values


def embedding_rows(file: TensorFile, name: str) -> int:
    """The vocabulary of the model (the tokenizer's may be smaller). Raises ConfigError."""
    shape = file.info(name).shape
    if len(shape) != 2 or not shape[0]:
        raise ConfigError(f"{name} has the shape {shape}, expected (vocabulary, width)")
    return shape[0]


def quotient(dim: int, n_heads: int) -> int | None:
    return dim // n_heads if dim % n_heads == 0 else None
