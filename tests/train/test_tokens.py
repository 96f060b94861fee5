"""Ids on disk: round trip, damage, and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from glassllama.base.errors import FormatError, GlassError
from glassllama.train.tokens import Piece, Tokens, open_tokens, write_tokens


def written(path: Path, vocab_size: int = 300) -> Tokens:
    """Three documents, the second in two pieces, one of them empty."""
    chance = np.random.default_rng(0)
    draw = [chance.integers(vocab_size, size=n) for n in (5, 7, 2, 0, 9)]
    begins = (True, True, False, True, True)
    pieces = [Piece(ids, first) for ids, first in zip(draw, begins, strict=True)]
    tokens = write_tokens(path, pieces, vocab_size)
    assert tokens.ids.tolist() == np.concatenate(draw).tolist()
    return tokens


@pytest.mark.parametrize(
    ("vocab_size", "width"), [(300, 2), (65_536, 2), (65_537, 4), (128_256, 4)]
)
def test_the_vocabulary_size_determines_the_width_of_ids(
    tmp_path: Path, vocab_size: int, width: int
) -> None:
    path = tmp_path / "a" / "tokens.bin"
    tokens = written(path, vocab_size)
    assert path.stat().st_size == 23 * width
    assert tokens.starts.tolist() == [0, 5, 14]
    assert (len(tokens), tokens.documents) == (23, 3)
    again = open_tokens(path)
    assert isinstance(again.ids, np.memmap)
    assert again.ids.tolist() == np.fromfile(path, f"<u{width}").tolist()
    assert again.starts.tolist() == [0, 5, 14]
    assert sorted(p.name for p in path.parent.iterdir()) == ["tokens.bin", "tokens.json"]


def damage_file(path: Path, name: str) -> None:
    """One kind of damage to tokens.bin or its sidecar."""
    sidecar = path.with_suffix(".json")
    about = json.loads(sidecar.read_text())
    raw = path.read_bytes()
    if name == "short":
        path.write_bytes(raw[:-2])
    elif name == "no bin":
        path.unlink()
    elif name == "no sidecar":
        sidecar.unlink()
    elif name == "cut sidecar":
        sidecar.write_text(sidecar.read_text()[:40])
    else:
        field, value = {
            "other format": ("format", "glassllama tokens 2"),
            "unknown dtype": ("dtype", "float16"),
            "starts": ("starts", [0, 5, 99]),
            "starts order": ("starts", [5, 0]),
            "starts text": ("starts", "0"),
            "count": ("count", "23"),
            "hash": ("sha256", 3),
        }[name]
        sidecar.write_text(json.dumps({**about, field: value}))


DAMAGE = {
    "short": "45|44 bytes|has 44",
    "no bin": "is missing",
    "no sidecar": "No such file",
    "cut sidecar": "not valid JSON",
    "other format": "glassllama tokens 1",
    "unknown dtype": "dtype.*float16",
    "starts": "starts",
    "starts order": "starts",
    "starts text": "starts",
    "count": "count",
    "hash": "sha256",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tokens.bin"
    written(path)
    damage_file(path, damage)
    with pytest.raises(FormatError, match=DAMAGE[damage]) as error:
        open_tokens(path)
    assert "tokenize again" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_corpus_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(GlassError, match="empty"):
        write_tokens(tmp_path / "tokens.bin", [Piece(np.array([], int), True)], 9)
    assert list(tmp_path.iterdir()) == []


def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    for bad in (9, -1):
        with pytest.raises(GlassError, match=f"id {bad} is outside the vocabulary of 9"):
            write_tokens(tmp_path / "tokens.bin", [Piece(np.array([1, bad]), True)], 9)
    assert list(tmp_path.iterdir()) == []


def test_old_files_stay_until_the_new_ones_are_complete(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    before = written(path).ids.tolist()

    def broken() -> Iterator[Piece]:
        yield Piece(np.arange(5), True)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_tokens(path, broken(), 300)
    assert open_tokens(path).ids.tolist() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GlassError, match="cannot be written"):
        write_tokens(tmp_path / "file" / "tokens.bin", [Piece(np.arange(3), True)], 9)
