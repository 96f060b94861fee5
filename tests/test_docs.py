"""Pages that are generated are not stale; every file says what it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import glassllama

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_map_is_not_stale() -> None:
    assert (ROOT / "docs" / "map.md").read_text() == script("make_map").page(), "run make docs"


def test_every_part_is_on_the_map() -> None:
    shown = {name for _, names in script("make_map").FLOORS for name in names}
    there = {
        p.name for p in (ROOT / "src" / "glassllama").iterdir() if not p.name.startswith("__py")
    }
    assert there - {"__init__.py", "py.typed"} == shown


def test_every_file_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "src").rglob("*.py")
        if not script("make_map").first_line(path)
    ]
    assert not silent


def test_the_changelog_is_of_this_version() -> None:
    newest = next(
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    )
    assert newest.split()[1] == glassllama.__version__
