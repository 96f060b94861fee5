"""The output shown in docs/walkthrough.md is correct, and generated pages are up to date."""

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


@pytest.mark.parametrize(
    ("page", "script"),
    [("hooks", "make_hooks_page"), ("adding-an-architecture", "make_adding_page")],
)
def test_generated_pages_are_up_to_date(page: str, script: str) -> None:
    spec = importlib.util.spec_from_file_location(script, DOCS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / f"{page}.md").read_text() == module.page(), f"run docs/{script}.py"


def test_the_lesson_finds_the_mistake_in_the_first_layer_without_a_window() -> None:
    text = (DOCS / "adding-an-architecture.md").read_text()
    right, wrong = (part.partition("```")[0] for part in text.split("```console\n")[2:])
    assert right == "".join(f"layer {n}: equal\n" for n in range(5))
    assert wrong == right.replace("3: equal\nlayer 4: equal", "3: DIFFERENT\nlayer 4: DIFFERENT")
