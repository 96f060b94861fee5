"""Metadata with any values: the only exception is a GlassError, within limits on time and memory.

GLASSLLAMA_FUZZ=20000 tries that many mutants (nightly; minutes), new ones on every run.
"""

from __future__ import annotations

import json
import os
import random
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from family_files import BOTH, family_file
from glassllama.base.errors import GlassError
from glassllama.formats.gguf import open_gguf
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.train.checkpoint import FORMAT, read_state
from glassllama.train.settings import load_settings, preset_names, read_tables, require_same_run
from glassllama.weights.backend import estimate_memory
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.generation_config import defaults_from_folder
from glassllama.weights.inspection import describe
from glassllama.weights.load import load_model
from glassllama.weights.save import save_model
from glassllama.weights.tokenizer import (
    chat_template_from_folder,
    template_tokens_from_folder,
    tokenizer_from_folder,
)
from glassllama.weights.tokenizer_gguf import template_tokens_from_gguf, tokenizer_from_gguf
from semantic_mutants import DATES, HALF_CHARACTER, as_json, as_toml, gguf_bytes, mutant
from tiny_models import META_SHAPE, hf_model, write_hf, write_meta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NIGHTLY = "GLASSLLAMA_FUZZ" in os.environ
MUTANTS = int(os.environ.get("GLASSLLAMA_FUZZ", "320"))  # for all documents together
MOST_SECONDS = 1.0  # of CPU time
MOST_BYTES = 64 << 20  # in addition to what is allocated already
LONGEST_LINE = 3000  # for a path and twelve mismatches
MOST_SHOWN = 20  # failures of one document in the report

LLAMA = {
    **META_SHAPE, "num_hidden_layers": 1, "max_position_embeddings": 128, "vocab_size": 300,
}  # fmt: skip


@dataclass
class Target:
    """A document, the file to which its mutants are written, and the function that reads it."""

    document: Mapping[str, Any]
    write: Callable[[dict[str, Any]], object]
    use: Callable[[], object]
    extra: list[Any] = field(default_factory=list)


# --- what is done with a mutant that opens ----------------------------------------------------


def use_model(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    try:
        look_at(checkpoint)
    finally:
        checkpoint.close()


def look_at(checkpoint: Checkpoint) -> None:
    """Read from a checkpoint everything that show, the planner and the reference model read."""
    facts = describe(checkpoint)
    errors = [facts[name].get("error", "") for name in ("tokenizer", "sampling")]
    for line in [*facts["notes"], *errors]:
        check_line(line)
    if checkpoint.architecture.layer_plan is not None:
        estimate_memory(checkpoint, tokens=8, memory=1 << 40).advice()
    load_model(checkpoint)


def use_tokenizer(tokenizer: Any) -> None:
    ids = tokenizer.encode("hello a\n🙂", bos=True)
    assert isinstance(tokenizer.decode(ids), str)


def use_gguf_tokenizer(path: Path) -> None:
    metadata = open_gguf(path).metadata
    use_tokenizer(tokenizer_from_gguf(metadata))
    template_tokens_from_gguf(metadata)


def use_folder_tokenizer(folder: Path) -> None:
    use_tokenizer(tokenizer_from_folder(folder))
    template_tokens_from_folder(folder)
    chat_template_from_folder(folder)
    check_line(str(defaults_from_folder(folder)))


def use_state(folder: Path) -> None:
    """Like resuming a run: use its progress and compare its identity."""
    progress, identity = read_state(folder)
    progress.record_score(1.0)
    assert progress.step + 1 > 0
    assert progress.seconds + 1.0 >= 1.0
    require_same_run(folder, identity, IDENTITY)


# --- documents --------------------------------------------------------------------------------

GGUF_MODEL = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "general.name": "tiny",
    "general.sampling.temp": 0.5,
    "general.sampling.top_k": 5,
    "general.sampling.penalty_repeat": 1.1,
    "general.sampling.mirostat": 0,
    "general.sampling.sequence": "",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": 4,
    "llama.attention.value_length": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.attention.sliding_window": 32,
    "llama.rope.dimension_count": 4,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 2.0,
    "llama.vocab_size": 300,
    "llama.expert_count": 0,
    "split.count": 1,
    "split.no": 0,
    "tokenizer.chat_template": "{{ messages }}",
}


def gguf_tensors(rope: bool) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (300, 8), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (4, 8), "blk.0.attn_v.weight": (4, 8),
        "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_norm.weight": (8,),
        "blk.0.ffn_gate.weight": (16, 8), "blk.0.ffn_up.weight": (16, 8),
        "blk.0.ffn_down.weight": (8, 16),
    }  # fmt: skip
    return {
        n: np.ones(s) for n, s in (shapes | ({"rope_freqs.weight": (2,)} if rope else {})).items()
    }


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": [*BYTES, "he", "ll", "<s>", "</s>", "[unused]"],
    "tokenizer.ggml.token_type": [1] * 258 + [3, 3, 5],
    "tokenizer.ggml.merges": ["h e", "l l"],
    "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.eos_token_id": 259,
    "tokenizer.ggml.eot_token_id": 259,
    "tokenizer.ggml.padding_token_id": 260,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "▁a"]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -0.5],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.ggml.remove_extra_whitespaces": False,
}
TOKENIZER_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "special": True},
    "add_bos_token": True,
    "additional_special_tokens": ["<s>"],
    "added_tokens_decoder": {"258": {"content": "<s>", "special": True, "lstrip": False}},
    "chat_template": [{"name": "default", "template": "{{ bos_token }}"}],
    "model_max_length": 1000,
}
SIDE_FILES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": TOKENIZER_SETTINGS,
    "generation_config.json": {
        "eos_token_id": [258, 259],
        "bos_token_id": 258,
        "temperature": 0.6,
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "num_beams": 1,
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    "added_tokens.json": {"<s>": 258, "</s>": 259},
}
IDENTITY = {"training text": "0" * 64, "schedule.steps": 9, "model.dim": 8, "model.lr": 1e-3}
STATE = {
    "format": FORMAT,
    "progress": {"step": 3, "seconds": 1.5, "best_step": 2, "best_loss": 2.5},
    "identity": IDENTITY,
}


def byte_level_tokenizer() -> Tokenizer:
    vocabulary = {text: id for id, text in enumerate([*BYTES, "he", "ll"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e"), ("l", "l")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    vocabulary = {text: id for id, text in enumerate(PIECES)}
    model = models.BPE(
        vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


# --- targets ----------------------------------------------------------------------------------


def gguf_target(home: Path, metadata: Mapping[str, Any], rope: bool = False) -> Target:
    path, tensors = home / "m.gguf", gguf_tensors(rope)
    return Target(
        metadata,
        lambda values: path.write_bytes(gguf_bytes(values, tensors)),
        lambda: use_model(path),
    )


def gguf_tokenizer_target(home: Path, metadata: Mapping[str, Any]) -> Target:
    path = home / "t.gguf"
    return Target(
        metadata,
        lambda values: path.write_bytes(gguf_bytes(values, {})),
        lambda: use_gguf_tokenizer(path),
    )


def json_target(path: Path, use: Callable[[], object]) -> Target:
    """Mutants of an existing JSON file."""
    document = json.loads(path.read_text())
    return Target(
        document, lambda values: path.write_text(as_json(values)), use, [HALF_CHARACTER, *USUAL]
    )


USUAL = ["llama", "gpt2", "linear", "llama3", "dynamic", "full_attention", "sliding_attention"]


def llama_target(home: Path) -> Target:
    folder = write_hf(hf_model(**LLAMA), home)
    edit(folder / "config.json", tie_word_embeddings=False, sliding_window=64, attention_bias=False)
    return json_target(folder / "config.json", lambda: use_model(folder))


def mistral_target(home: Path) -> Target:
    plain = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    folder = write_hf(hf_model(**{**LLAMA, "rope_parameters": plain}), home)
    edit(
        folder / "config.json", model_type="mistral", architectures=["MistralForCausalLM"],
        sliding_window=64, layer_types=["sliding_attention"], max_window_layers=0,
        use_sliding_window=True, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0},
    )  # fmt: skip
    return json_target(folder / "config.json", lambda: use_model(folder))


def gpt2_target(home: Path) -> Target:
    torch.manual_seed(0)
    sizes = {"n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 300}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(home)
    return json_target(home / "config.json", lambda: use_model(home))


def bigram_target(home: Path) -> Target:
    tokenizer = CharTokenizer("abc \n")
    model = Bigram(BigramConfig(vocab_size=tokenizer.vocab_size, max_seq_len=32))
    save_model(home, model, tokenizer)
    return json_target(home / "config.json", lambda: use_model(home))


def meta_target(home: Path) -> Target:
    folder = write_meta(hf_model(**LLAMA), home)
    edit(folder / "params.json", ffn_dim_multiplier=1.0)
    return json_target(folder / "params.json", lambda: use_model(folder))


def index_target(home: Path) -> Target:
    folder = write_hf(hf_model(**LLAMA), home, max_shard_size="60KB")
    return json_target(folder / "model.safetensors.index.json", lambda: use_model(folder))


def header_target(home: Path) -> Target:
    """The header of a safetensors file, with its `__metadata__`."""
    folder = write_hf(hf_model(**LLAMA), home)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")

    def write(values: dict[str, Any]) -> None:
        header = as_json(values).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])

    return Target(json.loads(whole[8:end]), write, lambda: use_model(folder), [HALF_CHARACTER])


def tokenizer_json_target(home: Path, tokenizer: Tokenizer) -> Target:
    tokenizer.save(str(home / "tokenizer.json"))
    return json_target(home / "tokenizer.json", lambda: use_folder_tokenizer(home))


def side_files_target(home: Path) -> Target:
    """All small files next to a tokenizer.json as one document."""
    byte_level_tokenizer().save(str(home / "tokenizer.json"))

    def write(values: dict[str, Any]) -> None:
        for name, file in values.items():
            (home / name[:100].replace("\n", "")).write_text(as_json(file))

    return Target(SIDE_FILES, write, lambda: use_folder_tokenizer(home), [HALF_CHARACTER])


def settings_target(home: Path) -> Target:
    path = home / "settings.toml"
    name = next(name for name in preset_names() if name.startswith("llama"))
    return Target(
        read_tables(name),
        lambda values: path.write_text(as_toml(values), "utf-8"),
        lambda: load_settings(str(path)),
        list(DATES),
    )


def family_target(home: Path, name: str, format: str) -> Target:
    file = family_file(name, format)
    path = file.write(home, file.values)
    return Target(
        file.values, lambda values: file.write(home, values), lambda: use_model(path),
        [*USUAL, "yarn", "longrope", "gelu", *([HALF_CHARACTER] if format == "hf" else [])],
    )  # fmt: skip


def state_target(home: Path) -> Target:
    folder = home / "step-000003"
    folder.mkdir()
    (folder / "state.json").write_text(as_json(STATE))
    return json_target(folder / "state.json", lambda: use_state(folder))


TARGETS: dict[str, Callable[[Path], Target]] = {
    "GGUF": lambda home: gguf_target(home, GGUF_MODEL),
    "GGUF with a tokenizer": lambda home: gguf_target(home, GGUF_MODEL | BYTE_LEVEL, rope=True),
    "GGUF, byte-level tokens": lambda home: gguf_tokenizer_target(home, BYTE_LEVEL),
    "GGUF, SentencePiece": lambda home: gguf_tokenizer_target(home, SENTENCEPIECE),
    "config.json of a Llama": llama_target,
    "config.json of a Mistral": mistral_target,
    "config.json of a GPT-2": gpt2_target,
    "config.json of a bigram": bigram_target,
    "params.json": meta_target,
    "index.json": index_target,
    "safetensors header": header_target,
    "tokenizer.json": lambda home: tokenizer_json_target(home, byte_level_tokenizer()),
    "tokenizer.json, pieces": lambda home: tokenizer_json_target(home, sentencepiece_tokenizer()),
    "files next to a tokenizer": side_files_target,
    "training settings": settings_target,
    "training state": state_target,
} | {
    f"{name} in {format}": partial(family_target, name=name, format=format)
    for name, format in BOTH
}  # fmt: skip


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- the test ---------------------------------------------------------------------------------


def check_line(line: str) -> None:
    assert "\n" not in line
    assert len(line) <= LONGEST_LINE, f"{len(line)} characters: {line[:100]}"


def outcome(target: Target) -> str:
    """What was wrong with the handling of this mutant, or nothing."""
    tracemalloc.reset_peak()
    before, started = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        target.use()
    except GlassError as error:
        try:
            check_line(str(error))
        except AssertionError as fault:
            return str(fault)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error!s:.200}"
    took = time.process_time() - started
    grown = tracemalloc.get_traced_memory()[1] - before
    if took > MOST_SECONDS:
        return f"{took:.1f} s"
    return f"{grown >> 20} MiB" if grown > MOST_BYTES else ""


@contextmanager
def traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_of(name: str, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path)
    target.write(dict(target.document))
    target.use()  # the original is valid; imports everything that is needed
    first = random.randrange(1 << 40) if NIGHTLY else 0
    failures: dict[str, str] = {}
    with traced():
        for seed in range(first, first + max(1, MUTANTS // len(TARGETS))):
            if problem := failure(target, seed):
                failures.setdefault(problem[:60], f"{seed}: {problem}")
    report = "\n".join(list(failures.values())[:MOST_SHOWN])
    assert not failures, f"{len(failures)} kinds of failure:\n{report}"


def failure(target: Target, seed: int) -> str:
    values = mutant(seed, target.document, target.extra)
    target.write(values)
    if (problem := outcome(target)).endswith(
        " s"
    ):  # the measurement may be wrong on a busy machine: try again
        problem = outcome(target)
    if not problem:
        return ""
    changed = {k: v for k, v in values.items() if v != target.document.get(k)}
    return f"{problem}: {str(changed)[:300]}"
