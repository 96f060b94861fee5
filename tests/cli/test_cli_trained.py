"""Commands with models that are not Llamas, and training texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli.conftest import Verb
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.weights.save import save_model

TOKENIZER = CharTokenizer("\n abcdefghij")


@pytest.fixture(params=["GPT", "bigram"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with random weights; the folder is named after its content."""
    V = TOKENIZER.vocab_size
    model: GPT | Bigram = Bigram(BigramConfig(vocab_size=V, max_seq_len=32))
    if request.param == "GPT":
        sizes = {"dim": 12, "n_layers": 2, "n_heads": 3, "ffn_dim": 20}
        model = GPT(GPTConfig(**sizes, vocab_size=V, max_seq_len=32))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(tmp_path / request.param, model, TOKENIZER)
    return tmp_path / request.param


def test_show(verb: Verb, folder: Path) -> None:
    shown = verb("show", folder)
    assert shown.code == 0
    assert f"architecture {folder.name}" in " ".join(shown.out.split())
    assert "max seq len" in shown.out
    assert f"note: a {folder.name} runs on the torch backend only" in shown.out
    facts = json.loads(verb("show", folder, "--json").out)
    assert facts["architecture"] == folder.name
    assert facts["config"]["vocab_size"] == facts["tokenizer"]["vocab_size"] == 16
    assert facts["memory"] == []


def test_validate(verb: Verb, folder: Path) -> None:
    found = verb("validate", folder)
    assert (found.code, "problem" in found.out) == (0, False)
    assert "all its characters come back the same" in found.out


def test_generate(verb: Verb, folder: Path) -> None:
    arguments = ("generate", "-m", folder, "abc", "-n", 8, "--seed", 1, "--json")
    made = verb(*arguments)
    assert made.code == 0
    assert f"note: a {folder.name} runs on the torch backend only" in made.err
    answer = json.loads(made.out)
    assert answer["prompt_ids"] == TOKENIZER.encode("abc", bos=True)
    assert 1 <= len(answer["ids"]) <= 8
    assert json.loads(verb(*arguments).out)["ids"] == answer["ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("generate", "--backend", "engine", "abc", "-m"), "a {} runs on the torch backend only")],
)
def test_the_engine_backend_is_refused(
    verb: Verb, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = verb(*arguments, folder)
    assert refused.code == 1
    assert message.format(folder.name) in refused.err
    assert "Traceback" not in refused.err


def test_download_a_text(verb: Verb, shakespeare: Path) -> None:
    fetched = verb("download", "shakespeare", "--offline")
    assert (fetched.code, fetched.out.strip()) == (0, str(shakespeare))
    assert "public domain" in fetched.err
