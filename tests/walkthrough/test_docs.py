"""The output shown in docs/walkthrough.md is correct, and docs/hooks.md is up to date."""

from __future__ import annotations

import doctest
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.usefixtures("default_model")
def test_examples_of_the_page() -> None:
    failed, tried = doctest.testfile(str(DOCS / "walkthrough.md"), module_relative=False)
    assert tried > 10
    assert not failed


def test_the_page_of_hooks_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_hooks_page", DOCS / "make_hooks_page.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = module.page()
    assert (DOCS / "hooks.md").read_text() == expected, "run docs/make_hooks_page.py"
