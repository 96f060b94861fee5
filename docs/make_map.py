"""Write docs/map.md: every file, floor by floor, with the first line it says of itself.

python docs/make_map.py          (a test fails while the page is stale)
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "glassllama"
HEAD = """# The map

Three lines run through the package, each visible end to end:

```
text   → Tokenizer.encode → ids → Executor.next_logits → Sampler → id → StreamDecoder → text
path   → open_checkpoint → one tensor at a time → LlamaConfig + weights → torch model, or the engine
corpus → tokens → batches → training step → checkpoint folder → open_checkpoint → …
```

**To understand a forward pass, read three files from top to bottom:**
[`models/llama.py`](../src/glassllama/models/llama.py),
[`nn/attention.py`](../src/glassllama/nn/attention.py),
[`nn/rope.py`](../src/glassllama/nn/rope.py).
Its sizes are [`base/config.py`](../src/glassllama/base/config.py). The same pass without PyTorch is
[`native/engine/model.py`](../src/glassllama/native/engine/model.py).

What each part of a Llama is good for is measured, one change at a time, from a bigram on:
[the ladder](ladder.md).

Imports only go down, and parts on one floor do not know each other (a test checks it).
"""
FLOORS = [
    (7, ("__main__.py", "cli")),
    (5, ("llm.py",)),
    (4, ("train", "walkthrough")),
    (3, ("weights", "generation", "hub")),
    (2, ("native",)),
    (1, ("models",)),
    (0, ("tokenizers", "formats", "nn")),
    ("base", ("base",)),
]


def first_line(path: Path) -> str:
    """What a file says of itself, in one line."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def rows(place: Path, indent: str = "") -> list[str]:
    """A file, or a folder with its files and then its folders, one step further in."""
    if place.is_file():
        link = f"../src/glassllama/{place.relative_to(PACKAGE).as_posix()}"
        return [f"{indent}- [`{place.name}`]({link}): {first_line(place)}"]
    inside = [path for path in sorted(place.glob("*.py")) if path.name != "__init__.py"]
    inside += sorted(path.parent for path in place.glob("*/__init__.py"))
    head = f"{indent}- **`{place.name}/`**: {first_line(place / '__init__.py')}"
    return [head, *(row for path in inside for row in rows(path, indent + "  "))]


def page() -> str:
    parts = [HEAD]
    for floor, names in FLOORS:
        parts.append(f"\n## Floor {floor}\n")
        parts += [row for name in names for row in rows(PACKAGE / name)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "map.md").write_text(page())
