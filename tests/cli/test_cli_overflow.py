"""Answers beyond the context, at the command line and from Python, with models trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli.conftest import Verb
from glassllama.base.config import LlamaConfig
from glassllama.llm import load
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.llama import Llama
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.weights.save import save_model
from tiny_models import META_SHAPE, hf_model, write_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENIZER = CharTokenizer("\n abcdefghij")
CONTEXT = 32
LENGTH = {"vocab_size": TOKENIZER.vocab_size, "max_seq_len": CONTEXT}
MODELS = {
    "Llama": lambda: Llama(LlamaConfig(
        dim=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=20, norm_eps=1e-5,
        rope_theta=10_000.0, rope_layout="half", **LENGTH,
    )),
    "GPT": lambda: GPT(GPTConfig(dim=12, n_layers=2, n_heads=3, ffn_dim=20, **LENGTH)),
    "bigram": lambda: Bigram(BigramConfig(**LENGTH)),
}  # fmt: skip
LONG = ("abc", "-n", 100, "--seed", 1, "--ignore-eos", "--json")


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A character model with random weights; the folder is named after its content."""
    model = MODELS[request.param]()
    if isinstance(model, Llama):
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    else:
        model.initialize(torch.Generator().manual_seed(0))
    save_model(tmp_path / request.param, model, TOKENIZER)
    return tmp_path / request.param


def test_a_trained_model_continues_beyond_its_context(verb: Verb, folder: Path) -> None:
    answer = json.loads(verb("generate", "-m", folder, *LONG).out)
    assert len(answer["ids"]) == 100
    assert answer["finish_reason"] == "length"
    dropped = answer["usage"]["dropped_tokens"]
    assert dropped == 0 if folder.name == "bigram" else dropped >= 100 - CONTEXT
    llm = load(folder)
    options = {"max_tokens": 100, "seed": 1, "temperature": 0.6, "top_p": 0.9, "ignore_eos": True}
    batch = llm.generate_batch(["abc", "ab" * 10], **options)
    assert batch[0].dropped_tokens == dropped
    stream = llm.stream("abc", **options)
    assert len("".join(stream)) > 0
    assert stream.completion.dropped_tokens == dropped
    if llm.backend == "engine":
        assert batch[0].ids == stream.completion.ids == answer["ids"]


def test_stop_ends_with_the_context(verb: Verb, folder: Path) -> None:
    arguments = ("generate", "-m", folder, "--on-overflow", "stop", *LONG)
    answer = json.loads(verb(*arguments).out)
    capacity = 100 if folder.name == "bigram" else CONTEXT - len(answer["prompt_ids"])
    assert len(answer["ids"]) == capacity
    assert answer["usage"]["dropped_tokens"] == 0


def test_a_prompt_longer_than_the_context_says_what_to_do(verb: Verb, folder: Path) -> None:
    ran = verb("generate", "-m", folder, "abc " * 20, "-n", 5)
    if folder.name == "bigram":
        assert ran.code == 0
        return
    ids = len(TOKENIZER.encode("abc " * 20, bos=True))
    assert ran.code == 1
    error = ran.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert f"{ids} ids and the context holds {CONTEXT}" in error
    assert f"shorten it to at most {CONTEXT - 1}" in error


def test_which_models_shift_the_context_by_default(tmp_path: Path) -> None:
    """Small models of a run and its checkpoints; no others, and no large ones."""
    vocabulary = Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet))

    def written(folder: Path, context: int) -> Path:
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        shape = {**META_SHAPE, "rope_parameters": rope, "max_position_embeddings": context}
        write_hf(hf_model(**{**shape, "vocab_size": len(alphabet)}), folder)
        vocabulary.save(str(folder / "tokenizer.json"))
        return folder

    foreign = written(tmp_path / "foreign", 256)
    assert load(foreign).default_overflow == "stop"
    run = tmp_path / "run"
    for context, expected in ((256, "shift"), (1023, "shift"), (1024, "stop")):
        step = written(run / "checkpoints" / f"step-{context}", context)
        (run / "settings.toml").touch()
        assert load(step).default_overflow == expected
