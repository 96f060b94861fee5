"""Tiny real checkpoints to walk through, in all three formats, some with a vocabulary."""

from __future__ import annotations

import io
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import PreTrainedTokenizerFast

from cli.conftest import verb  # noqa: F401 -- a fixture
from glassllama.base.config import LlamaConfig
from glassllama.models.llama import Llama
from glassllama.walkthrough.walk import Walk, open_walk
from tiny_models import META_SHAPE, hf_model, write_gguf, write_hf, write_meta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PROSE = pydoc_data.topics.topics["lambda"] + pydoc_data.topics.topics["with"]
WRITERS = {"hf": write_hf, "meta": write_meta}
IDS = [17, 3, 99, 3, 130, 0, 64]


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
def one_thread() -> Iterator[None]:
    """Several threads on cores that others use too wait for each other at every product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def llama() -> Llama:
    return random_llama()


def write_checkpoint(family: str, folder: Path, **shape: Any) -> Path:
    """A tiny random Llama by a foreign writer."""
    model = hf_model(**{**META_SHAPE, **shape})
    if family == "gguf":
        return write_gguf(model, folder / "tiny.gguf")
    return WRITERS[family](model, folder)


@pytest.fixture(scope="session")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a byte-level vocabulary, trained and written by its libraries."""
    folder = tmp_path_factory.mktemp("with_text")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|end|>"]
    )
    inner.train_from_iterator([PROSE], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    shape = {**META_SHAPE, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 96}
    return write_hf(hf_model(**shape), folder)


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
def tiny_walk(tmp_path: Path) -> Iterator[Walk]:
    """Layer 1, head 4 of a model in Hugging Face's format; its weights may be changed."""
    walk = open_walk(write_checkpoint("hf", tmp_path), IDS, layer=1, head=4)
    yield walk
    walk.checkpoint.close()
