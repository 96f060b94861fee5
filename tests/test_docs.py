"""Generated pages are up to date, links lead to files, every file has a docstring."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import glassllama
import make_map
import site_hooks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RECORD.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def test_the_map_is_up_to_date() -> None:
    assert (ROOT / "docs" / "map.md").read_text() == make_map.page(), "run docs/make_map.py"


def test_every_part_is_on_the_map() -> None:
    parts = {path.name for path in make_map.PACKAGE.iterdir() if not path.name.startswith("__py")}
    assert parts - {"__init__.py", "py.typed"} <= set(make_map.PARTS)


def test_every_file_has_a_docstring() -> None:
    files = (ROOT / "src").rglob("*.py")
    assert not [str(path) for path in files if not make_map.first_line(path)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    listed = set(re.findall(r"[\w/-]+\.md", navigation))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | set(site_hooks.OUTSIDE)


def test_the_changelog_is_of_this_version() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    newest = next(line for line in lines if line.startswith("## "))
    assert newest.split()[1] == glassllama.__version__
