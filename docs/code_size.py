"""Print how many code lines each part of the package has, beside its budget (`make size`).

Code lines are lines that are neither blank, nor a comment, nor a docstring, of .py, .js, .css and
.html files: explanations cost nothing.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "glassllama"
SUFFIXES = (".py", ".js", ".css", ".html")
BUDGETS = {  # parts of the package: code lines
    ("native",): 7500,
    ("tokenizers", "formats", "nn", "models", "base"): 5000,
    ("weights", "generation", "hub", "llm"): 4500,
    ("train",): 2700,
    ("walkthrough", "doctor"): 4300,
    ("cli", "server", "vision", "__init__", "__main__"): 3500,
}
BUDGET = 27_500


@cache
def docstring_lines(path: Path) -> set[int]:
    """Numbers of the lines of a Python file that belong to docstrings."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        value = body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    return lines


def code_lines(path: Path, first: int = 1, last: int | None = None) -> int:
    """Number of code lines of a file, or of its lines `first` to `last`."""
    source = path.read_text(encoding="utf-8")
    skipped = docstring_lines(path) if path.suffix == ".py" else set()
    numbered = list(enumerate(source.splitlines(), 1))[first - 1 : last]
    return sum(
        1 for number, line in numbered
        if number not in skipped and line.strip() and not line.lstrip().startswith("#")
    )  # fmt: skip


def part(path: Path) -> str:
    """The part of the package that a file belongs to: its top folder or file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def table() -> str:
    """The sizes as a Markdown table."""
    files = [path for path in PACKAGE.rglob("*") if path.suffix in SUFFIXES]
    rows = [("part", "files", "code lines", "budget"), ("---", "--:", "--:", "--:")]
    for parts, budget in BUDGETS.items():
        inside = [path for path in files if part(path) in parts]
        existing = [name for name in parts if any(part(path) == name for path in inside)]
        shown = ", ".join(name for name in existing if not name.startswith("_"))
        rows.append((shown, str(len(inside)), f"{sum(map(code_lines, inside)):,}", f"{budget:,}"))
    total = sum(map(code_lines, files))
    rows.append(("**all**", f"**{len(files)}**", f"**{total:,}**", f"**{BUDGET:,}**"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")
