"""The rules of the house, checked: floors, sizes, words. See docs/map.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "glassllama"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "base": -1,
    "tokenizers": 0, "formats": 0, "nn": 0,
    "models": 1,
    "native": 2,
    "weights": 3, "generation": 3, "hub": 3,
    "train": 4, "walkthrough": 4,
    "llm": 5,
    "server": 6,
    "cli": 7, "__init__": 7,
    "__main__": 8,
}  # fmt: skip
# weights joins a file's vocabulary to a Tokenizer and may ask the hub's cache: one way only.
NO_TORCH = {"base", "formats", "tokenizers", "native", "generation", "hub", "cli", "server"}
TORCH_IN_WEIGHTS = {"load.py", "stream.py", "save.py"}
FORBIDDEN = re.compile(r"utils?|helpers?|common|misc|manager|handler", re.IGNORECASE)
LONGEST_FUNCTION, LONGEST_FILE, WIDEST, MODEL_IFS = 60, 500, 100, 20


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Every module a file imports, at the top or later, as dotted names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def eager_imports(tree: ast.Module) -> set[str]:
    """What importing the module itself brings in: statements outside functions."""
    body = [n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)]
    kept = [n for n in body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    return set().union(*(imports(n) for n in kept)) if kept else set()


def docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        value = body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines |= set(range(body[0].lineno, body[0].end_lineno + 1))
    return lines


def code_lines(source: str, tree: ast.AST, first: int = 1, last: int | None = None) -> int:
    skip = docstring_lines(tree)
    numbered = list(enumerate(source.splitlines(), 1))[first - 1 : last]
    return sum(
        1 for n, line in numbered
        if n not in skip and line.strip() and not line.lstrip().startswith("#")
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    here = part_of(path)
    for name in imports(ast.parse(path.read_text())):
        if not name.startswith("glassllama."):
            continue
        there = name.split(".")[1]
        if there == here or there == "__version__":
            continue
        assert there in FLOORS, f"{name}: a part without a floor"
        if (here, there) == ("tokenizers", "native"):
            continue  # until the encoder is handed in
        assert FLOORS[there] < FLOORS[here], f"{here} may not import {there} ({name})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_stays_in_its_rooms(path: Path) -> None:
    here = part_of(path)
    names = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    eager = {name.split(".")[0] for name in eager_imports(ast.parse(path.read_text()))}
    oracles = {"transformers", "tokenizers", "tiktoken", "gguf", "sentencepiece", "llama_models"}
    assert not names & oracles, f"{here} imports an oracle: {names & oracles}"
    assert "llama_cpp" not in names or path == PACKAGE / "cli" / "bench.py"
    training = path.parent == PACKAGE / "native" / "training"
    if (here in NO_TORCH and not training) or (
        here == "weights" and path.name not in TORCH_IN_WEIGHTS
    ):
        assert "torch" not in names
    if here in {"__init__", "__main__", "cli", "llm", "hub"}:
        assert not eager & {"torch", "numba"}, "heavy imports wait until they are needed"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_small_by_measure(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert code_lines(source, tree) <= LONGEST_FILE
    assert max((len(line) for line in source.splitlines()), default=0) <= WIDEST
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = code_lines(source, tree, node.lineno, node.end_lineno)
            assert size <= LONGEST_FUNCTION, f"{node.name}: {size} lines"
    if part_of(path) == "models":
        ifs = sum(isinstance(node, ast.If | ast.IfExp) for node in ast.walk(tree))
        assert ifs <= MODEL_IFS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_say_what_they_hold(path: Path) -> None:
    for word in path.relative_to(PACKAGE).parts:
        assert not FORBIDDEN.fullmatch(word.removesuffix(".py"))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts = re.split(r"_|(?<=[a-z])(?=[A-Z])", node.name)
            assert not any(FORBIDDEN.fullmatch(part) for part in parts if part), node.name
