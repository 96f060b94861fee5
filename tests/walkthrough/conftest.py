"""Tiny checkpoints for the walkthrough in all three formats, some with a vocabulary."""

from __future__ import annotations

import io
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from rich.cells import cell_len
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from byte_level_families import trained
from cli.conftest import verb  # noqa: F401 -- a fixture
from glassllama.base.config import LlamaConfig
from glassllama.models.llama import Llama
from glassllama.walkthrough.export import Layout, render, step_to_json
from glassllama.walkthrough.step import Step
from glassllama.walkthrough.steps import STEPS, run_step
from glassllama.walkthrough.walkthrough import Walkthrough, open_walkthrough
from tiny_models import META_SHAPE, hf_model, write_gguf, write_hf, write_meta
from tokenizers import Tokenizer

PROSE = pydoc_data.topics.topics["lambda"] + pydoc_data.topics.topics["with"]
WRITERS = {"hf": write_hf, "meta": write_meta}
IDS = [17, 3, 99, 3, 130, 0, 64]
WITHOUT_A_CHECK = {0, 1}  # steps without a check if ids are given and there is no text


def random_llama(**changes: Any) -> Llama:
    """A model without a file; all sizes differ."""
    shape: dict[str, Any] = {
        "dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "ffn_dim": 70,
        "vocab_size": 37, "max_seq_len": 64, "norm_eps": 1e-5, "rope_theta": 10_000.0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**shape, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if parameter.ndim == 1:
            parameter.data += 1.0
    return model.requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def every_test_uses_one_thread(one_thread: None) -> None:
    pass


@pytest.fixture
def llama() -> Llama:
    return random_llama()


def write_checkpoint(family: str, folder: Path, **shape: Any) -> Path:
    """A tiny random Llama, written by another library."""
    model = hf_model(**{**META_SHAPE, **shape})
    if family == "gguf":
        return write_gguf(model, folder / "tiny.gguf")
    return WRITERS[family](model, folder)


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level vocabulary, trained with Hugging Face's libraries."""
    return trained("gpt2", PROSE, size=420, specials=["<|end|>"])


def write_byte_level_tokenizer(folder: Path) -> int:
    """Write it into a folder -> its size."""
    inner = byte_level_tokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture(scope="session")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a byte-level vocabulary."""
    folder = tmp_path_factory.mktemp("with_text")
    size = write_byte_level_tokenizer(folder) + 3
    return write_hf(
        hf_model(**{**META_SHAPE, "vocab_size": size, "max_position_embeddings": 96}), folder
    )


def gpt2_model(**changes: Any) -> GPT2LMHeadModel:
    """A random GPT-2 of transformers; all sizes differ."""
    shape: dict[str, Any] = {
        "n_embd": 30, "n_layer": 3, "n_head": 5, "vocab_size": 131, "n_positions": 67,
        "n_inner": 77, "attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**shape, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
        if parameter.ndim == 1:
            parameter.data += 0.5
    return model


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with a byte-level vocabulary."""
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2_model(vocab_size=write_byte_level_tokenizer(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def with_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a SentencePiece vocabulary, as Llama 2 had."""
    folder = tmp_path_factory.mktemp("with_pieces")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()), model_writer=written, model_type="bpe",
        vocab_size=400, byte_fallback=True, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return write_hf(hf_model(**{**META_SHAPE, "vocab_size": 400}), folder)


@pytest.fixture
def tiny_walk(tmp_path: Path) -> Iterator[Walkthrough]:
    """Layer 1, head 4 of a model in Hugging Face's format; its weights may be changed."""
    walk = open_walkthrough(write_checkpoint("hf", tmp_path), IDS, layer=1, head=4)
    yield walk
    walk.checkpoint.close()


def run_all_steps(walk: Walkthrough) -> list[Step]:
    """Run every step and check the properties that all steps have."""
    steps = [run_step(walk, number) for number in range(len(STEPS))]
    assert [step.number for step in steps] == list(range(18))
    assert len({step.name for step in steps}) == 18
    for step in steps:
        assert step.checks or (walk.prompt is None and step.number in WITHOUT_A_CHECK)
        for check in step.checks:
            assert check.relative <= check.allowed
        assert step.sources
        assert sum(len(found.lines) for found in step.sources) <= 12
        assert all(1 <= len(found.lines) <= 9 for found in step.sources), step.name
        for width in (80, 120):
            for line in render(step, Layout(width)).splitlines():
                assert cell_len(line) <= width, line
    return steps


def warned(step: Step) -> list[str]:
    """Assert that the checks of a step fail, in its text, in its object and in the page."""
    found = [check.what for check in step.checks if check.warns]
    text = render(step, Layout(200))
    flat = " ".join(text.split())
    assert flat.count("warning: differs by") == len(found)
    assert all(f"({what})" in flat for what in found)
    assert ("warning" in text) == bool(found)
    listed = step_to_json(step)["checks"]
    assert [c["what"] for c in listed if c["relative"] > c["allowed"]] == found
    return found
