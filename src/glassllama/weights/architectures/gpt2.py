"""GPT-2 in Hugging Face's format.

Matrices are stored as (in, out), and queries, keys and values as one matrix. Source: the published
GPT-2 checkpoints; transformers' `GPT2Config` for the keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.weights.architectures.description import (
    HF_WITHOUT_EFFECT,
    Architecture,
    ExtraTensors,
    ReadKeys,
    Resolved,
    Stored,
    TensorRule,
    require_neutral,
    unused_note,
)

if TYPE_CHECKING:
    from glassllama.models.gpt import GPTConfig

PREFIX = "transformer."
QKV = ("C", "C", "C")  # heights of the matrices in c_attn
MASK_ELEMENTS = 1 << 20  # of a stored mask, compared at once
EXP_IS_ZERO = -104.0  # exp(x) is 0 in float32 for x up to here

# --- tensors --------------------------------------------------------------------------------


def with_bias(ours: str, theirs: str, *shape: str, part: int | None = None) -> Iterator[TensorRule]:
    """A weight and its bias. Files always have a bias: zeros if the configuration has none."""
    parts = {} if part is None else {"parts": QKV, "part": part}
    name = f"{PREFIX}{theirs}"
    yield TensorRule(
        ours=f"{ours}.weight",
        shape=shape,
        hf=Stored(f"{name}.weight", transposed=len(shape) > 1, **parts),  # type: ignore[arg-type]
    )
    yield TensorRule(
        ours=f"{ours}.bias",
        shape=shape[:1],
        hf=Stored(f"{name}.bias", **parts),  # type: ignore[arg-type]
        zero_unless="bias",
    )


RULES = (
    TensorRule(ours="tok_embeddings.weight", shape=("V", "C"), hf=f"{PREFIX}wte.weight"),
    TensorRule(ours="pos_embeddings.weight", shape=("S", "C"), hf=f"{PREFIX}wpe.weight"),
    *with_bias("layers.{}.attention_norm", "h.{}.ln_1", "C"),
    *with_bias("layers.{}.attention.wq", "h.{}.attn.c_attn", "C", "C", part=0),
    *with_bias("layers.{}.attention.wk", "h.{}.attn.c_attn", "C", "C", part=1),
    *with_bias("layers.{}.attention.wv", "h.{}.attn.c_attn", "C", "C", part=2),
    *with_bias("layers.{}.attention.wo", "h.{}.attn.c_proj", "C", "C"),
    *with_bias("layers.{}.ffn_norm", "h.{}.ln_2", "C"),
    *with_bias("layers.{}.feed_forward.up", "h.{}.mlp.c_fc", "F", "C"),
    *with_bias("layers.{}.feed_forward.down", "h.{}.mlp.c_proj", "C", "F"),
    *with_bias("norm", "ln_f", "C"),
    TensorRule(
        ours="output.weight", shape=("V", "C"), hf="lm_head.weight", absent_if="tie_embeddings"
    ),
)


def is_causal_mask(file: TensorFile, name: str, _config: GPTConfig) -> bool:
    """Whether a stored mask (1, 1, T, T) is 1 up to the diagonal and 0 above it."""
    shape = file.info(name).shape
    if len(shape) != 4 or shape != (1, 1, shape[3], shape[3]):
        return False
    mask, count = file.read(name)[0, 0], shape[3]
    step = max(1, MASK_ELEMENTS // max(1, count))
    positions = np.arange(count)
    same = all(
        np.array_equal(mask[n : n + step] != 0, positions[n : n + step, None] >= positions)
        for n in range(0, count, step)
    )
    file.release_pages(name)
    return same


def hides_scores(file: TensorFile, name: str, _config: GPTConfig) -> bool:
    """Whether a stored number makes an attention weight zero if it replaces the score."""
    if math.prod(file.info(name).shape) != 1:
        return False
    return float(file.read(name).astype(np.float32).item()) < EXP_IS_ZERO  # False for NaN


# Masks that old writers stored beside the weights, and the number that replaced hidden scores.
MASKS = ExtraTensors(
    re.compile(r"(transformer\.)?h\.[0-9]+\.attn\.bias"), is_causal_mask, "no causal masks, ignored"
)
HIDDEN_SCORES = ExtraTensors(
    re.compile(r"(transformer\.)?h\.[0-9]+\.attn\.masked_bias"),
    hides_scores,
    "numbers that hide no score, ignored",
)

# --- config.json ----------------------------------------------------------------------------

# Ours -> theirs: whole numbers that a file must have.
SIZES = {"dim": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "vocab_size": "vocab_size"}
# Theirs -> ours; the first of several is written.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu": "gelu", "relu": "relu",
}  # fmt: skip
WITHOUT_EFFECT = HF_WITHOUT_EFFECT | frozenset(
    "n_ctx attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "task_specific_params".split()
)
NEUTRAL = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "quantization_config": None,
}  # fmt: skip


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    """config.json of a GPT-2. Raises ConfigError naming the field; needs PyTorch."""
    from glassllama.models.gpt import GPTConfig

    get = Fields("config.json", values := ReadKeys(values))
    require_neutral(values, NEUTRAL)
    activation = get.text("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        get.refuse("activation_function", f"one of {', '.join(ACTIVATIONS)}")
    sizes = {ours: get.integer(theirs) for ours, theirs in SIZES.items()}
    config = GPTConfig(
        **sizes,
        ffn_dim=get.integer("n_inner", 4 * sizes["dim"]),
        max_seq_len=get.integer("n_positions", 1024),  # the defaults of transformers
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        norm_eps=get.number("layer_norm_epsilon", 1e-5),
        bias=get.boolean("bias", True),
        tie_embeddings=get.boolean("tie_word_embeddings", True),
    )
    return Resolved(config, unused_note(values.unused(WITHOUT_EFFECT)))


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """A config.json that transformers and `config_from_hf` read.

    `bias` false is a key of our own.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_inner": config.ffn_dim,
        "n_positions": config.max_seq_len,
        "activation_function": next(t for t, o in ACTIVATIONS.items() if o == config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),  # the default is 0.1
        **({} if config.bias else {"bias": False}),
    }


GPT2 = Architecture(
    name="gpt2",
    title="GPT",
    hf_classes={"gpt2": "GPT2LMHeadModel"},
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    rules=RULES,
    optional_prefix=PREFIX,
    extras={"hf": (MASKS, HIDDEN_SCORES)},
    model="glassllama.models.gpt:GPT",
    layer_plan=None,
)
