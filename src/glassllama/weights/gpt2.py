"""GPT-2 in Hugging Face's form: its names, its configuration, and how its matrices lie.

Two habits of that family are columns of the table: a matrix is stored as (in, out), and queries,
keys and values share one. Source: the published GPT-2 checkpoints; transformers' `GPT2Config` for
the keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from glassllama.base.errors import listed
from glassllama.base.fields import Fields
from glassllama.weights.configs import GPT2, Resolved, require_neutral, unused_keys
from glassllama.weights.rows import Opened, RemappedFile, Row
from glassllama.weights.tensor_map import (
    COMPARED_NUMBERS,
    HEADS,
    head_notes,
    require_layers,
    with_stored_output,
)

if TYPE_CHECKING:
    from glassllama.base.interfaces import TensorFile
    from glassllama.models.gpt import GPTConfig

PREFIX = "transformer."  # the oldest files, OpenAI's own, do without
OUTPUT = "lm_head.weight"
# Masks that old writers stored beside the weights: ones up to the diagonal, and what replaced 0.
MASK = re.compile(r"(transformer\.)?h\.[0-9]+\.attn\.bias")
MASKED = re.compile(r"(transformer\.)?h\.[0-9]+\.attn\.masked_bias")
EXP_IS_ZERO = -104.0  # in float32, from here downwards
QKV = ("wq", "wk", "wv")  # in this order in one matrix


def open_gpt2(file: TensorFile, config: GPTConfig) -> Opened:
    """Raises WeightsError that lists all that does not fit."""
    require_layers(file, config.n_layers)
    prefix = "" if "wte.weight" in file.names() else PREFIX
    config, notes = with_stored_output(file, config, f"{prefix}wte.weight", OUTPUT)
    rows = gpt2_rows(config, prefix)
    # A tied output may be stored again.
    ours = RemappedFile(file, rows, known={OUTPUT}, ignored=[MASK, MASKED, HEADS])
    notes += head_notes(ours.ignored)
    masks = [name for name in ours.ignored if MASK.fullmatch(name)]
    if strange := [name for name in masks if not is_causal(file, name)]:
        notes.append(f"no causal masks, ignored: {listed(strange)}")
    masked = [name for name in ours.ignored if MASKED.fullmatch(name)]
    if strange := [name for name in masked if not hides(file, name)]:
        notes.append(f"numbers that hide no score, ignored: {listed(strange)}")
    return Opened(ours, config, notes)


def is_causal(file: TensorFile, name: str) -> bool:
    """Whether a stored mask (1, 1, T, T) lets every position see itself and what is before it."""
    shape = file.info(name).shape
    if len(shape) != 4 or shape != (1, 1, shape[3], shape[3]):
        return False
    mask, count = file.read(name)[0, 0], shape[3]
    step = max(1, COMPARED_NUMBERS // max(1, count))
    places = np.arange(count)
    same = all(
        np.array_equal(mask[n : n + step] != 0, places[n : n + step, None] >= places)
        for n in range(0, count, step)
    )
    file.release_pages(name)
    return same


def hides(file: TensorFile, name: str) -> bool:
    """Whether a stored number, put in a score's place, makes its weight zero."""
    if math.prod(file.info(name).shape) != 1:
        return False
    return float(file.read(name).astype(np.float32).item()) < EXP_IS_ZERO  # NaN is not


def gpt2_rows(config: GPTConfig, prefix: str = PREFIX) -> list[Row]:
    """Every parameter in the order of a forward pass."""
    c = config
    rows = [
        Row("tok_embeddings.weight", f"{prefix}wte.weight", (c.vocab_size, c.dim)),
        Row("pos_embeddings.weight", f"{prefix}wpe.weight", (c.max_seq_len, c.dim)),
    ]
    for n in range(c.n_layers):
        for row in layer_rows(c):
            ours, theirs = f"layers.{n}.{row.ours}", f"{prefix}h.{n}.{row.theirs}"
            rows += with_bias(row._replace(ours=ours, theirs=theirs), c.bias)
    rows += with_bias(Row("norm", f"{prefix}ln_f", (c.dim,)), c.bias)
    if not c.tie_embeddings:
        rows.append(Row("output.weight", OUTPUT, (c.vocab_size, c.dim)))
    return rows


def layer_rows(config: GPTConfig) -> list[Row]:
    """What a layer holds, each with a weight and a bias."""
    c, square = config, (config.dim, config.dim)
    return [
        Row("attention_norm", "ln_1", (c.dim,)),
        *(
            Row(f"attention.{name}", "attn.c_attn", square, True, part, len(QKV))
            for part, name in enumerate(QKV)
        ),
        Row("attention.wo", "attn.c_proj", square, True),
        Row("ffn_norm", "ln_2", (c.dim,)),
        Row("feed_forward.up", "mlp.c_fc", (c.ffn_dim, c.dim), True),
        Row("feed_forward.down", "mlp.c_proj", (c.dim, c.ffn_dim), True),
    ]


def with_bias(row: Row, bias: bool) -> Iterator[Row]:
    """The weight that a row names, and its bias: in their form there always is one."""
    for name, zero in (("weight", False), ("bias", not bias)):
        ours, theirs = f"{row.ours}.{name}", f"{row.theirs}.{name}"
        named = row._replace(ours=ours, theirs=theirs, zero=zero)
        yield named if name == "weight" else named._replace(shape=row.shape[:1], transposed=False)


# Theirs -> ours; the first of several is written.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
USED = frozenset(
    "n_embd n_layer n_head n_inner n_positions vocab_size layer_norm_epsilon activation_function "
    "tie_word_embeddings bias".split()
)
WITHOUT_EFFECT = frozenset(
    "n_ctx attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "task_specific_params".split()
)
MUST_BE = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def config_from_gpt2(values: Mapping[str, Any]) -> Resolved:
    """config.json of a GPT-2. Raises ConfigError naming the field; needs PyTorch."""
    from glassllama.models.gpt import GPTConfig

    require_neutral(values, MUST_BE)
    get = Fields("config.json", values)
    activation = get.text("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        get.refuse("activation_function", f"one of {', '.join(ACTIVATIONS)}")
    dim = get.whole("n_embd")
    config = GPTConfig(
        dim=dim,
        n_layers=get.whole("n_layer"),
        n_heads=get.whole("n_head"),
        ffn_dim=get.whole("n_inner", 4 * dim),
        vocab_size=get.whole("vocab_size"),
        max_seq_len=get.whole("n_positions", 1024),  # as transformers assumes
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        norm_eps=get.number("layer_norm_epsilon", 1e-5),  # likewise
        bias=get.boolean("bias", True),
        tie_embeddings=get.boolean("tie_word_embeddings", True),
    )
    return Resolved(config, unused_keys(values, USED | WITHOUT_EFFECT | set(MUST_BE)))


def config_to_gpt2(config: GPTConfig) -> dict[str, Any]:
    """What `config_from_gpt2` reads, and transformers; `bias` is our own key, where it is False."""
    without_bias = {} if config.bias else {"bias": False}
    return {
        "architectures": [GPT2],
        "model_type": "gpt2",
        "n_embd": config.dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.ffn_dim,
        "n_positions": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "activation_function": next(t for t, o in ACTIVATIONS.items() if o == config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),  # theirs would be 0.1
        **without_bias,
    }
