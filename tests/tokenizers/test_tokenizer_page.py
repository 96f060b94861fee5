"""Runs the examples of docs/tokenizers.md."""

from __future__ import annotations

import doctest
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "tokenizers.md"


def test_examples_of_the_page(default_model: Path) -> None:
    assert default_model.is_file()  # what the page downloads
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert tried >= 10
    assert failed == 0
