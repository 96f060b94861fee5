"""Damaged files of all families, in both formats: one line that says what is wrong, at once.

Each test takes what transformers or the gguf package wrote and changes it in one way. A changed
file is refused with a `GlassError`, or what is missing has the value that transformers uses.
"""

from __future__ import annotations

import json
import math
import random
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from family_files import BOTH, FamilyFile, family_file
from glassllama.base.errors import GlassError
from glassllama.weights.architectures import ARCHITECTURES
from glassllama.weights.architectures.description import HF_WITHOUT_EFFECT
from glassllama.weights.checkpoint import open_checkpoint
from long_mode import LONG as LONG_MODE
from tiny_families import LONG

MOST_SECONDS = 1.0  # of CPU time
MOST_BYTES = 64 << 20
NAN, INF = math.nan, math.inf
SIZES = [  # in config.json and in GGUF metadata: required in every file
    ("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"), ("intermediate_size", "feed_forward_length"),
]  # fmt: skip
# Keys that may have any value: nothing reads them, or not in these files.
UNREAD = {"_sliding_window_pattern", "embd_pdrop", "resid_pdrop"}
UNREAD_IN = {("smollm3", "sliding_window"), ("phi3", "original_max_position_embeddings")}
HAS_OTHER_DEFAULTS = {("phi3 longrope", "original_max_position_embeddings")}  # of its RoPE instead


@pytest.fixture(scope="module", params=BOTH, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def family(request: pytest.FixtureRequest) -> tuple[str, FamilyFile]:
    name, format = request.param
    return name, family_file(name, format)


Family = tuple[str, FamilyFile]


def message(path: Path) -> str | None:
    """The error on opening this model, within the limit on time; None if it opens."""
    error, started = None, time.process_time()
    try:
        checkpoint = open_checkpoint(path)
        assert checkpoint.layer_plan is not None
        checkpoint.close()
    except GlassError as fault:
        error = str(fault)
    assert time.process_time() - started < MOST_SECONDS
    assert error is None or "\n" not in error
    return error


@contextmanager
def limited_memory() -> Iterator[None]:
    """Tracing makes everything several times as slow."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES


def refused(file: FamilyFile, folder: Path, changes: dict[str, Any]) -> str:
    """The error for a file with these values changed; None removes one."""
    values = {k: v for k, v in {**file.values, **changes}.items() if changes.get(k, 0) is not None}
    error = message(file.write(folder, values))
    assert error is not None, changes
    return error


def test_unchanged_files_open(family: Family, tmp_path: Path) -> None:
    assert message(family[1].write(tmp_path, family[1].values)) is None


def filled_by_transformers(path: Path) -> dict[str, Any] | None:
    """The file with transformers' defaults; None if it divides by a null of the file (EXAONE)."""
    try:
        return transformers.AutoConfig.from_pretrained(path).to_dict()
    except ZeroDivisionError:
        return None


def test_a_missing_field(family: Family, tmp_path: Path) -> None:
    """It is named, or has the default of transformers."""
    name, file = family
    for names in SIZES:
        key = file.key(*names)
        assert f"{key} is missing" in refused(file, tmp_path, {key: None})
    for key in file.values:
        values = {k: v for k, v in file.values.items() if k != key}
        error = message(path := file.write(tmp_path, values))
        if error is None and file.format == "hf" and (name, key) not in HAS_OTHER_DEFAULTS:
            config = open_checkpoint(path).config
            if "model_type" in values and (filled := filled_by_transformers(path)) is not None:
                assert open_checkpoint(file.write(tmp_path, filled)).config == config, key


def test_half_of_the_fields_are_missing(family: Family, tmp_path: Path) -> None:
    chance, (_, file) = random.Random(0), family
    required = {file.key(*names) for names in SIZES}
    for _ in range(20):
        kept = chance.sample(sorted(file.values), len(file.values) // 2)
        error = message(file.write(tmp_path, {key: file.values[key] for key in kept}))
        assert error is not None or required <= {*kept}


WRONG: list[Any] = ["7", "x", "", [], [1], ["x"], {}, {"a": 1}, True, -1, 1.5, NAN, INF, -INF,
                    2**31, 2**40, 10**30]  # fmt: skip


def test_a_field_of_another_type(family: Family, tmp_path: Path) -> None:
    """Refused, unless the key has no effect. Numbers may have other values, true may be meant."""
    name, file = family
    chance = random.Random(name)
    unchanged = open_checkpoint(file.write(tmp_path, file.values)).config
    for key, value in file.values.items():
        if key in HF_WITHOUT_EFFECT | UNREAD or (name, key) in UNREAD_IN:
            continue
        for wrong in WRONG if LONG_MODE else chance.sample(WRONG, 4):
            if message(path := file.write(tmp_path, {**file.values, key: wrong})) is not None:
                continue
            is_other_number = isinstance(value, float | int | None) and wrong in WRONG[-8:]
            is_meant = isinstance(value, bool) and wrong is True
            is_empty = isinstance(value, dict) and wrong in ({}, {"a": 1})
            if not (is_other_number or is_meant or is_empty):
                assert open_checkpoint(path).config == unchanged, (key, wrong)
    with limited_memory():
        for key in (file.key(*names) for names in SIZES):
            for wrong in (0, -1, 1.5, 2**31 - 1, 2**31, 2**40):
                refused(file, tmp_path, {key: wrong})


def test_contradictory_layer_counts(family: Family, tmp_path: Path) -> None:
    """The file has other layers than the configuration says: all are listed."""
    _, file = family
    key = file.key("num_hidden_layers", "block_count")
    layers = file.values[key]
    for count in (layers - 1, layers + 1, 10 * layers, 2**31 - 1):
        error = refused(file, tmp_path, {key: count})
        words = [key, "layer_types", "rope_layers", f"says {count} layers"]
        words += ["unexpected" if count < layers else "missing"]
        assert any(word in error for word in words), error
    for lists in ("layer_types", "no_rope_layers"):
        if isinstance(file.values.get(lists), list):
            for wrong in ([], file.values[lists][1:], file.values[lists] * 2, ["x"] * layers):
                refused(file, tmp_path, {lists: wrong})


def test_windows_and_soft_caps(family: Family, tmp_path: Path) -> None:
    _, file = family
    caps = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")
    scales = (
        "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
        "embedding_scale", "residual_scale", "attention.scale", "logit_scale", "rope.freq_base",
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", "rope.scaling.yarn_beta_fast",
    )  # fmt: skip
    for key, value in file.values.items():
        own = key.partition(".")[2] if file.format == "gguf" else key
        is_window = own.endswith("sliding_window") and value is not None
        wrong: list[Any] = []
        if own in caps + scales and value is not None:
            wrong = [0.0, -1.0, NAN, INF, -INF, 1e39]
        elif is_window and file.values.get("model_type") != "smollm3":
            # In GGUF files 0 means no window, where a window is no part of the architecture.
            wrong = [-1, 2**31, *([0] if file.format == "hf" or "gemma" in key else [])]
        for one in wrong:
            error = refused(file, tmp_path, {key: one})
            assert any(word in error for word in (own, "cap", "scale", "multiplier", "divisor",
                                                  "window", "eps", "theta")), error  # fmt: skip


def test_head_counts(family: Family, tmp_path: Path) -> None:
    _, file = family
    heads = file.key("num_attention_heads", "attention.head_count")
    groups = file.key("num_key_value_heads", "attention.head_count_kv")
    for key, count in ((groups, 4), (groups, 5), (groups, 12), (heads, 7), (heads, 5)):
        error = refused(file, tmp_path, {key: count})
        assert "multiple" in error or "do not fit" in error or "equal" in error or key in error
    for key in (file.key("head_dim", "attention.key_length"),):
        for size in (7, 9, 2**20):
            refused(file, tmp_path, {key: size, **rope_width(file, size)})


def rope_width(file: FamilyFile, size: int) -> dict[str, Any]:
    if file.format == "hf":
        return {}
    return {
        file.key("", "rope.dimension_count"): size,
        file.key("", "attention.value_length"): size,
    }


ROPES: list[tuple[Any, str]] = [
    ({"rope_type": "spiral"}, "rope type 'spiral' is not supported"),
    ({"rope_type": 7}, "rope_type must be text"),
    ({"rope_type": "linear"}, "factor is missing"),
    ({"rope_type": "linear", "factor": 0.0}, "factor must be positive"),
    ({"rope_type": "linear", "factor": NAN}, "factor must be a finite number"),
    ({"rope_type": "yarn", "factor": -4.0}, "factor must be positive"),
    ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.0}, "beta_fast must be positive"),
    ({"rope_type": "dynamic"}, "factor is missing"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
    ({"rope_type": "longrope"}, "short_factor is missing"),
    ({**LONG, "short_factor": [1.0]}, "1 short and 3 long"),
    ({**LONG, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}, "4 divisors for"),
    ({**LONG, "short_factor": ["x"] * 3}, "short_factor must be a list of finite numbers"),
    ({**LONG, "long_factor": [1.0, NAN, 1.0]}, "long_factor must be a list of finite numbers"),
    ({**LONG, "long_factor": [1.0, -1.0, 1.0]}, "divisors must be finite and positive"),
    ({"rope_type": "default", "rope_theta": 0.0}, "rope_theta must be positive"),
    ({"rope_type": "default", "rope_theta": NAN}, "rope_theta must be a finite number"),
    ({"full_attention": {"rope_type": "default"}, "x": {}}, "one per type of layer"),
]


@pytest.mark.parametrize("number", range(len(ROPES)))
def test_rope_scalings(number: int, tmp_path: Path) -> None:
    rope, words = ROPES[number]
    for name, format in BOTH:
        file = family_file(name, format)
        is_by_type = name == "gemma3" and "full_attention" in rope  # right for a Gemma 3
        if format == "hf" and not is_by_type:
            error = refused(file, tmp_path, {"rope_parameters": rope, "rope_scaling": None})
            is_other = name in ("ministral3", "gemma3") or "partial_rotary_factor is" in error
            assert words in error or is_other, (name, error)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope.scaling.type": "spiral"}, "rope.scaling.type 'spiral' is not supported"),
        ({"rope.scaling.type": 7}, "rope.scaling.type must be text"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "original_context_length is"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": NAN}, "factor must be a finite"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": -1.0}, "factor must be a finite"),
        ({"attention.causal": False}, "attention.causal is False, only True"),
        ({"expert_count": 8}, "mixtures of experts are not supported"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5, only 1.0"),
        ({"attention.head_count": [6, 5, 6, 6]}, "attention.head_count must be a whole number"),
        ({"context_length": 0}, "context_length must be a whole number"),
        ({"block_count": [4, 4]}, "block_count must be a whole number"),
        ({"block_count": [4, 4], "attention.head_count": [6, 6]}, "block_count must be a whole"),
    ],
)  # fmt: skip
def test_gguf_keys_that_change_the_arithmetic(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for name, format in BOTH:
        file = family_file(name, format)
        if format == "gguf":
            gone = {file.key("", "rope.scaling.original_context_length"): None}
            named = {file.key("", key): value for key, value in changes.items()}
            assert words in refused(file, tmp_path, {**gone, **named})


def damaged_tensors(file: FamilyFile) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """The tensors with one fault, and what the message names."""
    for name, tensor in file.tensors.items():
        yield {key: value for key, value in file.tensors.items() if key != name}, name
        if tensor.ndim == 2:
            for other in (tensor[:-1], np.vstack([tensor, tensor[:1]]), tensor[:, :-1], tensor[0]):
                yield {**file.tensors, name: other}, name
        yield {**file.tensors, name: tensor.reshape(*tensor.shape, 1)}, name
    yield {**file.tensors, "model.layers.0.more.weight": np.ones(3, np.float32)}, "more.weight"
    yield {}, "missing" if file.format == "hf" else "token_embd.weight"


def test_tensors(family: Family, tmp_path: Path) -> None:
    """Missing, unexpected, of another height (fused ones, too) or width: each is named."""
    _, file = family
    seen = set[str]()
    for tensors, named in damaged_tensors(file):
        kind = named.replace("1", "0")
        if kind in seen and random.Random(named).random() < 0.8:
            continue  # the same in another layer
        seen.add(kind)
        error = message(file.write(tmp_path, file.values, tensors))
        is_tied = named in ("output.weight", "rope_freqs.weight")  # files may leave them out
        assert error is not None or is_tied, named
        if error is not None and len(file.tensors) - len(tensors) <= 1:
            assert named in error or "rope_factors" in named or "embeddings" in error, error


def test_truncated_files(family: Family, tmp_path: Path) -> None:
    _, file = family
    path = file.write(tmp_path, file.values)
    path = path / "model.safetensors" if file.format == "hf" else path
    whole, chance = path.read_bytes(), random.Random(0)
    for size in [0, 1, 7, 8, 9, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(30))]:
        path.write_bytes(whole[:size])
        assert message(path.parent if file.format == "hf" else path) is not None, size
    if file.format == "hf":
        path.write_bytes(whole)
        config = tmp_path / "config.json"
        text = config.read_text()
        for size in (0, 1, len(text) // 2, len(text) - 2):
            config.write_text(text[:size])
            assert "config.json" in str(message(tmp_path))


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_an_unknown_architecture_lists_the_supported_ones(format: str, tmp_path: Path) -> None:
    file = family_file("qwen3", format)
    key = "model_type" if format == "hf" else "general.architecture"
    error = refused(file, tmp_path, {key: "mamba", "architectures": ["MambaForCausalLM"]})
    assert f"{key} is 'mamba', supported are" in error
    for one in ARCHITECTURES.values():
        names = one.hf_classes if format == "hf" else one.gguf_names
        assert all(name in error for name in names), error


def test_the_factor_of_longrope_in_a_gguf(tmp_path: Path) -> None:
    """The file's, which llama.cpp's converter always writes, or the one of both contexts."""
    file = family_file("phi3 longrope", "gguf")
    values = dict(file.values)
    key = file.key("", "rope.scaling.attn_factor")

    def factor() -> float:
        return open_checkpoint(file.write(tmp_path, values)).config.rope_scaling.attention_factor

    written = values.pop(key)
    assert factor() == pytest.approx(written, rel=2.0**-24)
    values[key] = 1.5
    assert factor() == 1.5


def test_a_scale_of_queries_has_no_effect_in_a_mistral(tmp_path: Path) -> None:
    plain = json.loads(json.dumps(family_file("mistral", "hf").values))
    plain["rope_parameters"]["llama_4_scaling_beta"] = 0.1  # transformers ignores it there
    notes = open_checkpoint(family_file("mistral", "hf").write(tmp_path, plain)).notes
    assert "config.json: rope_parameters: no effect here: llama_4_scaling_beta" in notes
