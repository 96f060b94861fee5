"""Sizes stated in a small file are compared with the file before anything is allocated."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import handmade_gguf as hand
from glassllama.base.config import GivenDivisors, LinearScaling, LlamaConfig
from glassllama.base.errors import ConfigError, FormatError, GlassError, WeightsError
from glassllama.formats.gguf import open_gguf
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.weights.backend import estimate_memory
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.inspection import describe
from glassllama.weights.load import load_model
from glassllama.weights.save import save_model
from processor_time import seconds
from semantic_mutants import gguf_bytes
from tiny_models import VARIANTS, hf_model, write_hf, write_meta

MOST_SECONDS = 0.1  # of CPU time
MOST_BYTES = 8 << 20  # these files contain less than one MiB
HUGE = (10**6, 10**9, 2**31 - 1, 2**31, 2**40, 10**18)
TOKENIZER = CharTokenizer("abc \n")


def within_limits(work: Callable[[], Any]) -> GlassError | None:
    """The error, if any; fails if it took too long or too much memory."""
    errors: list[GlassError | None] = []

    def attempt() -> None:
        try:
            work()
            errors.append(None)
        except GlassError as came:
            errors.append(came)

    tracemalloc.start()
    attempt()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= MOST_BYTES
    assert seconds(attempt, enough=MOST_SECONDS) <= MOST_SECONDS
    return errors[0]


# --- the files, each with the keys that claim a size --------------------------------------------

GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": 4,
    "llama.attention.value_length": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 4,
}


def write_small_gguf(folder: Path, **changes: Any) -> Path:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (30, 8), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (4, 8), "blk.0.attn_v.weight": (4, 8),
        "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_norm.weight": (8,),
        "blk.0.ffn_gate.weight": (16, 8), "blk.0.ffn_up.weight": (16, 8),
        "blk.0.ffn_down.weight": (8, 16),
    }  # fmt: skip
    path = folder / "m.gguf"
    tensors = {name: np.ones(shape) for name, shape in shapes.items()}
    path.write_bytes(gguf_bytes(GGUF | changes, tensors))
    return path


def write_gpt2(folder: Path) -> Path:
    sizes = {"n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 30}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder / "config.json"


def write_bigram(folder: Path) -> Path:
    model = Bigram(BigramConfig(vocab_size=TOKENIZER.vocab_size, max_seq_len=32))
    save_model(folder, model, TOKENIZER)
    return folder / "config.json"


WRITERS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "llama": (
        lambda folder: write_hf(hf_model(**VARIANTS["plain"]), folder) / "config.json",
        ("num_hidden_layers", "head_dim", "hidden_size", "intermediate_size", "vocab_size",
         "num_attention_heads", "num_key_value_heads"),
    ),
    "meta": (
        lambda folder: write_meta(hf_model(**VARIANTS["plain"]), folder) / "params.json",
        ("n_layers", "dim", "n_heads", "multiple_of", "vocab_size"),
    ),
    "gpt2": (write_gpt2, ("n_layer", "n_embd", "n_inner", "n_positions", "vocab_size")),
    "bigram": (write_bigram, ("vocab_size",)),
}  # fmt: skip


@pytest.mark.parametrize("form", WRITERS)
def test_sizes_claimed_in_json(form: str, tmp_path: Path) -> None:
    write, keys = WRITERS[form]
    path = write(tmp_path)
    values = json.loads(path.read_text())
    open_checkpoint(path.parent)  # the file is valid
    for key in keys:
        for claimed in HUGE:
            path.write_text(json.dumps(values | {key: claimed}))
            error = within_limits(lambda: open_checkpoint(path.parent))
            assert isinstance(error, ConfigError | WeightsError), (key, claimed)
            assert "\n" not in str(error)
            assert len(str(error)) < 2500


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "feed_forward_length", "attention.head_count",
     "attention.head_count_kv", "attention.key_length"],
)  # fmt: skip
def test_sizes_claimed_in_gguf_metadata(key: str, tmp_path: Path) -> None:
    open_checkpoint(write_small_gguf(tmp_path))
    for claimed in HUGE:
        changes: dict[str, Any] = {f"llama.{key}": claimed}
        if key == "attention.key_length":
            same = ("llama.attention.value_length", "llama.rope.dimension_count")
            changes |= dict.fromkeys(same, claimed)
        path = write_small_gguf(tmp_path, **changes)
        error = within_limits(lambda path=path: open_checkpoint(path))
        assert isinstance(error, ConfigError | WeightsError), claimed


def test_the_error_contains_the_claimed_and_the_real_size(tmp_path: Path) -> None:
    path = write_small_gguf(tmp_path, **{"llama.block_count": 10**6})
    with pytest.raises(WeightsError, match=r"says 1000000 layers, the file holds 1 \(11 tensors\)"):
        open_checkpoint(path)


def test_a_long_context_takes_no_memory_before_it_is_used(tmp_path: Path) -> None:
    path = write_small_gguf(tmp_path, **{"llama.context_length": 2**31 - 1})
    look_at(open_checkpoint(path))  # imports
    assert within_limits(lambda: look_at(open_checkpoint(path))) is None


def look_at(checkpoint: Checkpoint) -> None:
    describe(checkpoint)
    estimate_memory(checkpoint, tokens=8, memory=1 << 40)
    load_model(checkpoint)


@pytest.mark.parametrize("write", [write_gpt2, write_bigram])
def test_no_other_context_where_positions_are_weights(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="context_size: the context of this model is fixed"):
        open_checkpoint(write(tmp_path), 2)


def test_a_bigram_with_any_context(tmp_path: Path) -> None:
    path = write_bigram(tmp_path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"max_position_embeddings": 2**31 - 1}))
    load_model(open_checkpoint(tmp_path))
    assert within_limits(lambda: load_model(open_checkpoint(tmp_path))) is None


def test_parts_claimed_in_gguf_metadata(tmp_path: Path) -> None:
    path = tmp_path / "s-00001-of-99999.gguf"
    path.write_bytes(hand.gguf([hand.pair("split.count", hand.U32, hand.u32(99_999))]))
    error = within_limits(lambda: open_gguf(path))
    assert isinstance(error, FormatError)
    assert "s-00002-of-99999.gguf: missing" in str(error)


# --- rotations ----------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "ffn_dim": 16,
    "vocab_size": 30, "max_seq_len": 64, "norm_eps": 1e-5, "rope_theta": 10_000.0,
}  # fmt: skip


def test_checking_a_head_of_a_billion_coordinates_allocates_nothing() -> None:
    scaled = {"rope_scaling": LinearScaling(factor=2.0)}
    for more in ({}, scaled):
        LlamaConfig(**{**SIZES, "head_dim": 2, **more})
        assert (
            within_limits(lambda m=more: LlamaConfig(**{**SIZES, "head_dim": 10**9, **m})) is None
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 1e-300}, "too fast"),
        ({"rope_scaling": LinearScaling(factor=1e-38)}, "too fast"),
        ({"rope_scaling": GivenDivisors(values=(1e-300, 1.0))}, "too fast"),
        ({"rope_scaling": GivenDivisors(values=(1.0,) * 3)}, "3 divisors for 2 frequencies"),
        ({"rope_theta": float("inf")}, "rope_theta must be positive and finite"),
        ({"norm_eps": 10**400}, "norm_eps must be positive and finite"),
        ({"n_layers": 2**31}, "n_layers must be a positive whole number up to 2147483647"),
        ({"vocab_size": True}, "vocab_size must be a positive whole number, got True"),
    ],
)
def test_configurations_with_infinite_angles_are_refused(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        LlamaConfig(**{**SIZES, **change})


def test_divisors_of_another_shape_are_refused(tmp_path: Path) -> None:
    for values in (np.ones(3), np.ones((2, 1)), np.ones(10**5)):
        tensors = {"rope_freqs.weight": values, "token_embd.weight": np.ones((30, 8))}
        path = tmp_path / "m.gguf"
        path.write_bytes(gguf_bytes(GGUF, tensors))
        with pytest.raises(ConfigError, match=r"rope_freqs\.weight must be 2 numbers of type F32"):
            open_checkpoint(path)


def test_the_embeddings_decide_the_vocabulary_of_a_gguf(tmp_path: Path) -> None:
    """llama.cpp uses the tensor, not the key; a tokenizer may have fewer tokens."""
    checkpoint = open_checkpoint(write_small_gguf(tmp_path, **{"llama.vocab_size": 28}))
    assert checkpoint.config.vocab_size == 30
    assert checkpoint.notes == ["GGUF: llama.vocab_size is 28, the embeddings have 30 rows"]


def test_a_notice_about_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    model = Bigram(BigramConfig(vocab_size=TOKENIZER.vocab_size - 2, max_seq_len=32))
    torch.nn.init.normal_(model.tok_embeddings.weight)
    save_model(tmp_path, model, TOKENIZER)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tokenizer.vocab_size == TOKENIZER.vocab_size
    assert "the last 2 cannot be read" in checkpoint.notes[-1]
