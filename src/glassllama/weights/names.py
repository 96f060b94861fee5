"""What each family of files calls a tensor, what its shape must be, and what does not fit.

One row a tensor, `{}` for the layer: ours, Meta's, Hugging Face's, GGUF's name. No row permutes or
transposes anything: all families store (out, in) matrices, and the RoPE layout is configuration.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import WeightsError
from glassllama.base.interfaces import TensorFile

Family = Literal["meta", "hf", "gguf"]

OUTSIDE_LAYERS = (
    ("tok_embeddings", "tok_embeddings", "model.embed_tokens", "token_embd"),
    ("norm", "norm", "model.norm", "output_norm"),
    ("output", "output", "lm_head", "output"),
)
IN_LAYERS = (
    ("attention_norm", "attention_norm", "input_layernorm", "attn_norm"),
    ("attention.wq", "attention.wq", "self_attn.q_proj", "attn_q"),
    ("attention.wk", "attention.wk", "self_attn.k_proj", "attn_k"),
    ("attention.wv", "attention.wv", "self_attn.v_proj", "attn_v"),
    ("attention.wo", "attention.wo", "self_attn.o_proj", "attn_output"),
    ("ffn_norm", "ffn_norm", "post_attention_layernorm", "ffn_norm"),
    ("feed_forward.gate", "feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.up", "feed_forward.w3", "mlp.up_proj", "ffn_up"),
    ("feed_forward.down", "feed_forward.w2", "mlp.down_proj", "ffn_down"),
)
COLUMN = {"meta": 1, "hf": 2, "gguf": 3}
LAYER_PREFIX = {"meta": "layers.{}.", "hf": "model.layers.{}.", "gguf": "blk.{}."}
# Tables that old writers stored beside the weights; the configuration says the same.
IGNORED = {
    "meta": re.compile(r"rope\.freqs"),
    "hf": re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    "gguf": re.compile(r"rope_freqs\.weight"),  # read by weights/configs.py
}
FLOATS = {"F64", "F32", "F16", "BF16"}
SHOWN = 12  # mismatches spelled out in an error; the rest are counted


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names -> shapes, in the order of a forward pass."""
    c = config
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layer = {
        "attention_norm": (c.dim,),
        "attention.wq": (queries, c.dim),
        "attention.wk": (keys, c.dim),
        "attention.wv": (keys, c.dim),
        "attention.wo": (c.dim, queries),
        "ffn_norm": (c.dim,),
        "feed_forward.gate": (c.ffn_dim, c.dim),
        "feed_forward.up": (c.ffn_dim, c.dim),
        "feed_forward.down": (c.dim, c.ffn_dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (c.vocab_size, c.dim)}
    for n in range(c.n_layers):
        shapes |= {f"layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (c.dim,)
    if not c.tie_embeddings:
        shapes["output.weight"] = (c.vocab_size, c.dim)
    return shapes


def foreign_names(family: Family, n_layers: int) -> dict[str, str]:
    """Our name -> theirs, for a model of `n_layers`."""
    column, prefix = COLUMN[family], LAYER_PREFIX[family]
    table = {f"{row[0]}.weight": f"{row[column]}.weight" for row in OUTSIDE_LAYERS}
    for n in range(n_layers):
        for row in IN_LAYERS:
            table[f"layers.{n}.{row[0]}.weight"] = f"{prefix.format(n)}{row[column]}.weight"
    return table


def fit(
    file: TensorFile, config: LlamaConfig, family: Family, quantised: frozenset[str]
) -> dict[str, str]:
    """Our name -> the file's name for every parameter of a Llama, if both agree exactly.

    `quantised` are the block types that count as weights too. Raises WeightsError (`require_fit`).
    """
    table = foreign_names(family, config.n_layers)
    shapes = expected_shapes(config)
    wanted = {ours: table[ours] for ours in shapes}
    require_fit(
        file,
        {theirs: shapes[ours] for ours, theirs in wanted.items()},
        known={table["output.weight"]},  # a tied output may be stored again
        ignored=IGNORED[family],
        types=FLOATS | quantised,
    )
    return wanted


def require_fit(
    file: TensorFile,
    wanted: Mapping[str, tuple[int, ...]],
    *,
    known: Collection[str],
    ignored: re.Pattern[str],
    types: Collection[str] = FLOATS,
) -> None:
    """Raise WeightsError unless the file holds exactly these names with these shapes.

    Lists every missing, unexpected, mis-shaped or wrongly typed tensor; nothing is read before
    that. Beside the wanted ones `known` names and those that match `ignored` may be there.
    """
    present = set(file.names())
    problems = [f"missing {name}" for name in wanted if name not in present]
    problems += [
        f"unexpected {name}"
        for name in sorted(present - set(wanted) - set(known))
        if not ignored.fullmatch(name)
    ]
    for name, shape in wanted.items():
        if name in present:
            problems += _wrong(file, name, shape, types)
    if problems:
        raise WeightsError(_listing(problems))


def _wrong(
    file: TensorFile, name: str, shape: tuple[int, ...], types: Collection[str]
) -> list[str]:
    info = file.info(name)
    problems = []
    if info.shape != shape:
        problems.append(f"{name} is {_by(info.shape)}, the configuration says {_by(shape)}")
    if info.dtype not in types:
        problems.append(f"{name} is of type {info.dtype}, which no weight is")
    return problems


def _listing(problems: list[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    shown = "; ".join(problems[:SHOWN])
    return f"weights and configuration do not fit ({len(problems)} tensors): {shown}{more}"


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape) or "a scalar"
