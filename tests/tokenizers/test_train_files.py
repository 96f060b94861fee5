"""Files of trained vocabularies give the same ids in this package, tiktoken, tokenizers and
transformers."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from byte_level_families import LLAMA3, mixed_text
from glassllama.base.errors import TokenizerError
from glassllama.native.tokenizers import COMPILED
from glassllama.tokenizers import train
from glassllama.tokenizers.bpe import BytePairTokenizer
from glassllama.tokenizers.tiktoken_file import read_meta_tokenizer, special_token_names
from glassllama.tokenizers.train import TrainedBPE, train_bpe, visible
from glassllama.weights.tokenizer import tokenizer_from_folder
from tokenizers import Tokenizer

DOCS = Path(train.__file__).parents[3] / "docs"
ENDS = ("<|begin_of_text|>", "<|end_of_text|>")
SEEDS = 100


PAGES = [page.read_text("utf-8") for page in sorted(DOCS.glob("*.md"))]


def texts() -> list[str]:
    return [*map(mixed_text, range(SEEDS)), *PAGES]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [*PAGES, *map(mixed_text, range(1000, 1010))]


@pytest.fixture(scope="module")
def learned(corpus: list[str]) -> TrainedBPE:
    return train_bpe(corpus, 1500, ENDS, backend=COMPILED)


@pytest.fixture(scope="module")
def metas(corpus: list[str]) -> TrainedBPE:
    return train_bpe(corpus, 1500, special_token_names(), backend=COMPILED)


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.identical("ids of a vocabulary we learned and wrote", "tokenizers, transformers")
def test_hugging_faces_format(learned: TrainedBPE, tmp_path: Path) -> None:
    paths = learned.save(tmp_path / "new" / "folder")
    names = ["tokenizer.json", "tokenizer_config.json", "vocabulary.tsv"]
    assert [path.name for path in paths] == names
    folder = paths[0].parent
    assert sorted(path.name for path in folder.iterdir()) == names  # no partial file is left
    ours = tokenizer_from_folder(folder)
    assert (ours.vocab_size, ours.bos, ours.stop_ids) == (1500, 1498, {1499})
    assert dict(ours.specials) == dict(learned.tokenizer.specials)
    theirs = Tokenizer.from_file(str(paths[0]))
    theirs.encode_special_tokens = True
    auto = transformers_tokenizer(folder)
    assert (len(auto), auto.bos_token, auto.eos_token) == (1500, *ENDS)
    for text in texts():
        ids = learned.tokenizer.encode(text)
        assert ours.encode(text) == ids
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    text = "a text <|end_of_text|> and more"
    assert auto(text)["input_ids"] == ours.encode(text, bos=True, specials=True)


@pytest.mark.parametrize("split", ["gpt2", "smollm", "qwen2"])
@pytest.mark.identical("ids of a vocabulary with another split", "tokenizers")
def test_other_splits(corpus: list[str], tmp_path: Path, split: str) -> None:
    learned = train_bpe(corpus, 900, split=split, backend=COMPILED)
    learned.save(tmp_path)
    ours = tokenizer_from_folder(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.bos is None
    for text in texts():
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids == learned.tokenizer.encode_array(text).tolist()


@pytest.mark.identical("ids of a vocabulary we learned and wrote", "tiktoken")
def test_metas_format(metas: TrainedBPE, tmp_path: Path) -> None:
    paths = metas.save(tmp_path, "both")
    path = tmp_path / "tokenizer.model"
    assert path in paths
    ours = read_meta_tokenizer(path)
    assert ours.vocab_size == metas.tokenizer.vocab_size == 1500
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in path.read_text().splitlines())
    }
    theirs = tiktoken.Encoding(
        "own", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=dict(ours.specials)
    )
    from_json = tokenizer_from_folder(tmp_path)  # reads tokenizer.json
    assert dict(from_json.specials) == dict(ours.specials)
    for text in texts():
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == from_json.encode(text) == metas.tokenizer.encode(text) == ids
    assert ours.encode("x<|eot_id|>", bos=True, specials=True) == [
        *theirs.encode("<|begin_of_text|>x<|eot_id|>", allowed_special="all")
    ]
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizer_from_folder(tmp_path).vocab_size == 1500


def test_metas_format_has_its_own_special_tokens(learned: TrainedBPE, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"256 special tokens of its own, got .* 2 s"):
        learned.save(tmp_path / "none", "meta")
    assert not (tmp_path / "none").exists()


def from_visible(written: str) -> bytes:
    """The bytes of a token in the table."""
    assert (written[0], written[-1]) == ('"', '"')
    parts = re.split(r"\\x([0-9a-f]{2})", written[1:-1])
    return b"".join(
        bytes.fromhex(part) if at % 2 else part.encode() for at, part in enumerate(parts)
    )


def test_the_readable_table(learned: TrainedBPE, tmp_path: Path) -> None:
    learned.save(tmp_path)
    lines = (tmp_path / "vocabulary.tsv").read_text("utf-8").splitlines()
    head, *rows = [line.split("\t") for line in lines]
    assert head == ["id", "token", "left", "right", "count", "examples"]
    assert [int(row[0]) for row in rows] == [*range(1500)]
    tokenizer = learned.tokenizer
    for id, token, left, right, count, examples in rows:
        assert from_visible(token) == tokenizer.token_bytes(int(id))
        if left:
            assert from_visible(left) + from_visible(right) == from_visible(token)
            assert int(count) >= 2
            words = re.findall(r'"[^"]*"', examples)
            assert words
            assert all(from_visible(token) in from_visible(word) for word in words)
    assert [row[4] for row in rows[-2:]] == ["special token"] * 2


def test_tokens_are_visible_in_the_table() -> None:
    assert visible(b" low") == '" low"'
    assert visible("é😀".encode()) == '"é😀"'
    assert visible(b'\n\t\\"\xff') == r'"\x0a\x09\x5c\x22\xff"'
    assert visible("\u200b".encode()) == r'"\xe2\x80\x8b"'


def test_errors_name_damaged_files(learned: TrainedBPE, tmp_path: Path) -> None:
    learned.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"][3] = "no such pair"
    path.write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match="merges: number 3"):
        tokenizer_from_folder(tmp_path)


def test_it_is_a_tokenizer_without_special_tokens(corpus: list[str], tmp_path: Path) -> None:
    train_bpe(corpus, 300, backend=COMPILED).save(tmp_path)
    read = tokenizer_from_folder(tmp_path)
    assert isinstance(read, BytePairTokenizer)
    assert (read.vocab_size, read.bos, read.stop_ids) == (300, None, frozenset())
    assert transformers_tokenizer(tmp_path)("hello")["input_ids"] == read.encode("hello")
