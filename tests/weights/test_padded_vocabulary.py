"""A model with more rows of embeddings than tokens of its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from glassllama import LLM, load
from glassllama.base.errors import GenerationError, TokenizerError
from glassllama.weights.inspection import check_vocabulary
from tiny_models import VARIANTS, hf_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROWS = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose most likely ids are always ids without a token."""
    folder = tmp_path_factory.mktemp("padded")
    shape = {**VARIANTS["plain"], "vocab_size": ROWS, "max_position_embeddings": 128}
    model = hf_model(**shape, bos_token_id=0, eos_token_id=1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=265, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["hello there you"] * 9, trainer)
    size = tokenizer.get_vocab_size()
    with torch.no_grad():  # of two opposite rows one has a logit far above all others
        model.lm_head.weight[size] *= 50
        model.lm_head.weight[size + 1] = -model.lm_head.weight[size]
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["engine", "torch"])
def llm(folder: Path, request: pytest.FixtureRequest) -> LLM:
    return load(folder, backend=request.param, exact=True)


@pytest.mark.parametrize("backend", ["engine", "torch"])
@pytest.mark.parametrize("ends", [[0], [1], [0, 1]])
def test_an_answer_may_end_at_a_row_without_a_token(
    folder: Path, tmp_path: Path, backend: str, ends: list[int]
) -> None:
    """The most likely ids are the first and the second row after the vocabulary."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    size = load(folder).tokenizer.vocab_size
    stops = [1, *(size + n for n in ends)]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    llm = load(copy, backend=backend, exact=True)
    made = llm.generate("hello", max_tokens=24)
    assert made.finish_reason == "stop"
    assert not {size, size + 1} & {*made.ids} - {*stops}
    going_on = llm.generate("hello", max_tokens=24, ignore_eos=True)
    assert {*going_on.ids} & {*stops[1:]}
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ROWS]}))
    with pytest.raises(TokenizerError, match=f"expected ids from 0 to {ROWS - 1}"):
        load(copy, backend=backend).tokenizer  # noqa: B018


@pytest.mark.parametrize(
    "options",
    [
        {}, {"speculation": False}, {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 2},
        {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    ],
)  # fmt: skip
def test_ids_without_a_token_are_never_sampled(llm: LLM, options: dict[str, float]) -> None:
    size = llm.tokenizer.vocab_size
    assert llm.logits([5, 6]).argmax(axis=1).min() >= size, "greedy sampling would select them"
    made = llm.generate("hello", max_tokens=24, ignore_eos=True, logprobs=5, **options)
    assert len(made.ids) == 24
    assert max(made.ids) < size
    assert made.logprobs is not None
    assert max(token.id for step in made.logprobs for token in step.top) < size
    again = llm.generate([*llm.encode("hello"), ROWS - 1], max_tokens=4, **options)
    assert max(again.ids) < size, "even if the prompt contains one"


@pytest.mark.parametrize("backend", ["engine", "torch"])
def test_gaps_between_tokens_are_never_sampled(folder: Path, tmp_path: Path, backend: str) -> None:
    """The same model with a token added at a high id: the ids between are gaps."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    size = len(document["model"]["vocab"])
    added = document["added_tokens"]
    added.append({**added[-1], "id": size + 5, "content": "<|far|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    llm = load(tmp_path, backend=backend, exact=True)
    assert llm.tokenizer.vocab_size == size + 6
    assert [*llm.tokenizer.gaps] == [*range(size, size + 5)]
    assert {*llm.logits([5, 6]).argmax(axis=1)} <= {size, size + 1}, (
        "greedy sampling would select one"
    )
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"speculation": False}):
        made = llm.generate("hello", max_tokens=12, ignore_eos=True, logprobs=5, **options)
        assert made.logprobs is not None
        shown = {token.id for step in made.logprobs for token in step.top}
        assert not {*made.ids, *shown} & {*range(size, size + 5), *range(size + 6, ROWS)}
    [first, *_] = check_vocabulary(llm.tokenizer, ROWS)
    assert f"{size + 1} tokens" in first.text
    assert f"{ROWS - size - 1} have no token and are never chosen" in first.text


def test_ids_without_a_token_decode_to_nothing_and_others_are_an_error(
    llm: LLM, folder: Path
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [*llm.tokenizer.encode("hello"), ROWS - 1, *llm.tokenizer.encode(" you")]
    assert llm.tokenizer.decode(ids) == theirs.decode(ids) == "hello you"
    assert llm.tokenizer.token_bytes(llm.tokenizer.vocab_size) == b""
    for wrong in (ROWS, -1):
        with pytest.raises(TokenizerError, match=f"id {wrong}: .* 0 … {ROWS - 1}"):
            llm.tokenizer.decode([wrong])
        with pytest.raises(GenerationError, match="outside the vocabulary"):
            llm.generate([5, wrong], max_tokens=1)
    assert np.isfinite(llm.logits([ROWS - 1])).all()


def test_validate_reports_rows_without_tokens(llm: LLM) -> None:
    [first, *_] = check_vocabulary(llm.tokenizer, ROWS)
    assert first.ok
    size = llm.tokenizer.vocab_size
    assert f"{ROWS - size} have no token and are never chosen" in first.text
