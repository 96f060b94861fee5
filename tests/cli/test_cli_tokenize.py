"""`tokenize` of long texts: printed in parts, with the same result as in one piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glassllama.cli import tokens
from glassllama.formats.gguf import open_gguf
from glassllama.native.jit import code_cache
from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Any:
    return tokenizer_from_gguf(open_gguf(default_model).metadata)


def test_json_printed_in_parts_is_valid(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokens, "PART", 3)
    text = 'a "quoted" \\ 🦙\n' * 5
    for ids in (tokenizer.encode(text), []):
        pieces = (tokens.piece(tokenizer, id) for id in ids)
        tokens.write_json_parts({"model": "m", "text": text, "ids": ids, "pieces": pieces})
        expected = {"model": "m", "text": text, "ids": ids}
        expected["pieces"] = [tokens.piece(tokenizer, id) for id in ids]
        assert json.loads(capsys.readouterr().out) == expected


def test_a_long_table_has_a_line_for_every_token(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokens, "MAX_TABLE", 5)
    ids = tokenizer.encode("The 42 tallest llamas\n")
    tokens.print_tokens(tokenizer, ids)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == ids
    assert lines[-1].endswith(tokenizer.token_bytes(ids[-1]).hex(" "))


def test_a_notice_says_why_compiled_code_is_not_cached(
    default_model: Path, monkeypatch: pytest.MonkeyPatch, verb: Any
) -> None:
    monkeypatch.setattr(code_cache, "notes", ["compiling in memory"])
    assert verb("tokenize", "-m", default_model, "hi").err.endswith("\ncompiling in memory\n")
