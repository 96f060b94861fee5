"""Hooks of mkdocs: adds pages from outside docs/ and a page for each source file that is linked.

Pages keep links that work in the repository, such as ../src/glassllama/llm.py. The site contains no
repository, so a link to a source file leads to a page with its text (source/…).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from code_size import table

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "record.md": "benchmarks/RECORD.md",
}
LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)]*)?(?=\))")
SIZES = "<!-- sizes of the package -->"
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def repository_path(uri: str, target: str = "") -> str:
    """Path in the repository of a page of the site, or of what the page links to."""
    page = OUTSIDE.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page


def site_uri(path: str) -> str:
    """Where a file or folder of the repository is on the site."""
    for uri, outside in OUTSIDE.items():
        if path == outside:
            return uri
    inside = path.startswith("docs/") and not path.endswith(".py")
    return path.removeprefix("docs/") if inside else f"source/{path}.md"


def source_page(path: Path) -> str:
    """A file in a code block; a folder as all its files."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    parts = [f"{NOT_SEARCHED}# {path.relative_to(ROOT)}\n"]
    for file in files:
        heading = f"## {file.name}\n\n" if path.is_dir() else ""
        language = "python" if file.suffix == ".py" else file.suffix.removeprefix(".")
        parts.append(f"{heading}~~~~~{language}\n{file.read_text(encoding='utf-8')}\n~~~~~\n")
    return "\n".join(parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/ and those of linked source files."""
    from mkdocs.structure.files import File

    for uri, path in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text))
    linked = {
        repository_path(file.src_uri, match[2])
        for file in files.documentation_pages()
        for match in LINK.finditer(file.content_string)
    }
    for path in sorted(linked):
        uri = site_uri(path)
        if uri.startswith("source/") and (ROOT / path).exists():
            files.append(File.generated(config, uri, content=source_page(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links for the site, and insert the sizes of the package."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        target = site_uri(repository_path(uri, match[2]))
        relative = posixpath.relpath(target, posixpath.dirname(uri) or ".")
        return f"{match[1]}{relative}{match[3] or ''}"

    return LINK.sub(rewritten, markdown.replace(SIZES, table()))
