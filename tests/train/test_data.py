"""A BPE vocabulary is trained once per text and settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from glassllama.tokenizers import train as training
from glassllama.train.corpus import open_corpus, open_data
from glassllama.train.settings import DataSettings
from train.recipes import write_text


@pytest.fixture
def text(tmp_path: Path, romeo_and_juliet: Path) -> Path:
    return write_text(tmp_path, romeo_and_juliet)


def test_a_vocabulary_is_trained_again_for_other_text_or_settings(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_bpe, sizes = training.train_bpe, list[int]()

    def counted(texts: object, size: int, **more: object) -> object:
        sizes.append(size)
        return train_bpe(texts, size, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train_bpe", counted)
    settings = DataSettings(corpus=str(text), tokenizer="bpe:300", context=16, batch=2)
    folder, later = tmp_path / "one", tmp_path / "later"
    assert open_data(settings, folder).vocabulary == folder / "tokenizer"
    assert open_data(settings, later, earlier=folder).vocabulary == folder / "tokenizer"
    moved = text.rename(tmp_path / "moved.txt")  # the same text under another name
    settings = replace(settings, corpus=str(moved))
    assert open_data(settings, folder).tokenizer.vocab_size == 300
    assert sizes == [300]

    larger = open_data(replace(settings, tokenizer="bpe:310"), later, earlier=folder)
    assert (larger.tokenizer.vocab_size, larger.vocabulary) == (310, later / "tokenizer")
    assert sizes == [300, 310]
    open_data(replace(settings, val_fraction=0.3), folder)
    assert sizes == [300, 310, 300]
    moved.write_text(moved.read_text() * 2)
    open_data(replace(settings, val_fraction=0.3), folder)
    assert sizes == [300, 310, 300, 300]
    (folder / "tokenizer" / "made_of.json").write_text("[")
    open_data(replace(settings, val_fraction=0.3), folder)
    assert len(sizes) == 5


def test_the_hash_of_a_corpus_is_of_its_documents(tmp_path: Path) -> None:
    hashes = []
    for name, parts in (("a", ["ab", "c"]), ("b", ["ab", "c"]), ("c", ["a", "bc"]), ("d", ["abc"])):
        folder = tmp_path / name
        folder.mkdir()
        for at, part in enumerate(parts):
            (folder / f"{name}{at}.txt").write_text(part)
        hashes.append(open_corpus(folder).sha256)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
