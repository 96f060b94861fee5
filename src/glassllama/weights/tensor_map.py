"""What each family of files calls a tensor, what its shape must be, and what does not fit.

One row a tensor, `{}` for the layer: ours, Meta's, Hugging Face's, GGUF's name. No row permutes or
transposes anything: all families store (out, in) matrices, and the RoPE layout is configuration.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from glassllama.base.config import LlamaConfig, rope_frequencies
from glassllama.base.errors import WeightsError, listed, named
from glassllama.base.interfaces import TensorFile

FileFormat = Literal["meta", "hf", "gguf"]

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
TABLES = {
    "meta": re.compile(r"rope\.freqs"),
    "hf": re.compile(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"),
    "gguf": re.compile(r"rope_freqs\.weight"),  # read by weights/configs.py
}
HEADS = re.compile(r"v_head\..+")  # what training by reward leaves beside a language model
# Numbers that old versions of transformers stored though they follow from the configuration.
BUFFERS = re.compile(r"(.+\.)?(masked_bias|causal_mask|position_ids|rotary_emb\.(cos|sin)_cached)")
FLOATS = {"F64", "F32", "F16", "BF16"}
SHOWN = 12  # mismatches spelled out in an error; the rest are counted
COMPARED_NUMBERS = 1 << 20  # of two tensors, at once

C = TypeVar("C", bound=Any)  # a configuration


class Fitted(NamedTuple):
    """Our name -> the file's, the configuration, and notes on what the file holds besides."""

    config: LlamaConfig
    names: dict[str, str]
    notes: list[str]


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


def foreign_names(file_format: FileFormat, n_layers: int) -> dict[str, str]:
    """Our name -> theirs, for a model of `n_layers`."""
    column, prefix = COLUMN[file_format], LAYER_PREFIX[file_format]
    table = {f"{row[0]}.weight": f"{row[column]}.weight" for row in OUTSIDE_LAYERS}
    for n in range(n_layers):
        for row in IN_LAYERS:
            table[f"layers.{n}.{row[0]}.weight"] = f"{prefix.format(n)}{row[column]}.weight"
    return table


def fit(
    file: TensorFile, config: LlamaConfig, file_format: FileFormat, quantised: frozenset[str]
) -> Fitted:
    """The file's name for every parameter of a Llama, if both agree exactly.

    `quantised` are the block types that count as weights too. Raises WeightsError (`require_fit`).
    """
    require_layers(file, config.n_layers)
    table = foreign_names(file_format, config.n_layers)
    output = table["output.weight"]
    held, embeddings = {*file.names()}, table["tok_embeddings.weight"]
    if config.tie_embeddings and output in held and embeddings not in held:
        table["tok_embeddings.weight"] = output  # the shared matrix, stored under its other name
    config, notes = with_stored_output(file, config, table["tok_embeddings.weight"], output)
    shapes = expected_shapes(config)
    wanted = {ours: table[ours] for ours in shapes}
    ignored = require_fit(
        file,
        {theirs: shapes[ours] for ours, theirs in wanted.items()},
        known={output},  # a tied output may be stored again
        ignored=[TABLES[file_format], HEADS, BUFFERS],
        types=FLOATS | quantised,
    )
    notes += head_notes(ignored)
    if file_format != "gguf":
        notes += table_notes(file, config, [n for n in ignored if TABLES[file_format].fullmatch(n)])
    return Fitted(config, wanted, notes)


def require_layers(file: TensorFile, claimed: int) -> None:
    """Raise WeightsError where more layers are claimed than the file holds tensors.

    Tables of names are as long as the claim, so they are made after this check only.
    """
    names = file.names()
    if claimed > len(names):
        numbers = (re.search(r"(?:^|\.)(?:layers|h|blk)\.([0-9]+)\.", name) for name in names)
        held = len({number[1] for number in numbers if number})
        raise WeightsError(
            f"weights and configuration do not fit: the configuration says {claimed} layers, the "
            f"file holds {held} ({len(names)} tensors)"
        )


def with_stored_output(
    file: TensorFile, config: C, embeddings: str, output: str
) -> tuple[C, list[str]]:
    """The configuration, not tied where the file holds an output matrix of its own; a note then.

    As transformers 5 does: what is stored is used, unless it is the embeddings again.
    """
    names = set(file.names())
    if not config.tie_embeddings or embeddings == output or not {embeddings, output} <= names:
        return config, []
    if same_numbers(file, embeddings, output):
        return config, []
    note = f"tie_word_embeddings is true, but the file holds another {output}, which is used"
    return replace(config, tie_embeddings=False), [note]


def same_numbers(file: TensorFile, one: str, other: str) -> bool:
    """Whether two matrices hold the same, bit for bit; of two types: the same as float32."""
    first, second = file.info(one), file.info(other)
    if first.shape != second.shape or len(first.shape) != 2:
        return False
    if not {first.dtype, second.dtype} <= FLOATS:
        return False
    step = max(1, COMPARED_NUMBERS // max(1, first.shape[1]))
    same = True
    for begin in range(0, first.shape[0], step):
        a, b = (file.read(name, slice(begin, begin + step)) for name in (one, other))
        if first.dtype != second.dtype:
            a, b = a.astype(np.float32), b.astype(np.float32)
        same = same and np.array_equal(a.view(np.uint8), b.view(np.uint8))
        if not same:
            break
    file.release_pages(one)
    file.release_pages(other)
    return same


def head_notes(ignored: Collection[str]) -> list[str]:
    """A note that names what is no part of a language model, if there is any."""
    heads = [name for name in ignored if HEADS.fullmatch(name) or BUFFERS.fullmatch(name)]
    return [f"no part of a language model, ignored: {listed(heads)}"] if heads else []


def table_notes(file: TensorFile, config: LlamaConfig, tables: Collection[str]) -> list[str]:
    """A note where stored frequencies are others than the configuration's, which are used."""
    expected = rope_frequencies(config), rope_frequencies(replace(config, rope_scaling=None))
    different = [
        name for name in tables if not any(_nearly(file, name, table) for table in expected)
    ]
    if not different:
        return []
    return [f"not the frequencies of the configuration, ignored: {listed(different)}"]


def _nearly(file: TensorFile, name: str, expected: Any) -> bool:
    """Whether a table agrees to the precision of its type.

    It was computed in float32 as theta to the power of -2i/D: the exponent's rounding weighs
    ln theta < 16 times, the other steps a few times, so 32 roundings; then its type rounds once.
    """
    info = file.info(name)
    if info.shape != expected.shape or info.dtype not in FLOATS:
        return False
    stored = file.read(name).astype(np.float64)
    precision = {"F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[info.dtype]
    smallest = 2.0**-24 if info.dtype == "F16" else 0.0  # F16 has few numbers near zero
    allowed = (32 * 2.0**-24 + precision) * expected + smallest
    return bool(np.all(np.abs(stored - expected) <= allowed))


def require_fit(
    file: TensorFile,
    wanted: Mapping[str, tuple[int, ...]],
    *,
    known: Collection[str],
    ignored: Collection[re.Pattern[str]],
    types: Collection[str] = FLOATS,
) -> list[str]:
    """Raise WeightsError unless the file holds exactly these names with these shapes.

    Lists every missing, unexpected, mis-shaped or wrongly typed tensor. Beside the wanted ones
    `known` names may be there, and those that match a pattern of `ignored`, which are returned.
    """
    present = set(file.names())
    others = sorted(present - set(wanted) - set(known))
    passed = [name for name in others if any(pattern.fullmatch(name) for pattern in ignored)]
    problems = [f"missing {name}" for name in wanted if name not in present]
    problems += [f"unexpected {named(name)}" for name in others if name not in set(passed)]
    for name, shape in wanted.items():
        if name in present:
            problems += _wrong(file, name, shape, types)
    if problems:
        raise WeightsError(_listing(problems))
    return passed


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
