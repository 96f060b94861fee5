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
path   → open_weights → one tensor at a time → LlamaConfig + weights → torch model, or the engine
corpus → tokens → batches → training step → checkpoint folder → open_weights → …
```

**To understand a forward pass, read three files from top to bottom:**
[`models/llama.py`](../src/glassllama/models/llama.py),
[`nn/attention.py`](../src/glassllama/nn/attention.py),
[`nn/rope.py`](../src/glassllama/nn/rope.py).
Its sizes are [`base/config.py`](../src/glassllama/base/config.py). The same pass without PyTorch is
[`engine/model.py`](../src/glassllama/engine/model.py).

Imports only go down, and parts on one floor do not know each other (a test checks it).
"""
FLOORS = [
    (6, ("__main__.py", "cli")),
    (4, ("llm.py",)),
    (3, ("walkthrough",)),
    (2, ("weights", "generation", "hub")),
    (1, ("models", "engine")),
    (0, ("tokenizers", "formats", "nn")),
    ("base", ("base",)),
]


def first_line(path: Path) -> str:
    """What a file says of itself, in one line."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def rows(part: str) -> list[str]:
    place = PACKAGE / part
    if place.is_file():
        return [f"- [`{part}`](../src/glassllama/{part}): {first_line(place)}"]
    head = f"- **`{part}/`**: {first_line(place / '__init__.py')}"
    files = sorted(path for path in place.glob("*.py") if path.name != "__init__.py")
    link = f"../src/glassllama/{part}"
    return [head, *(f"  - [`{f.name}`]({link}/{f.name}): {first_line(f)}" for f in files)]


def page() -> str:
    parts = [HEAD]
    for floor, names in FLOORS:
        parts.append(f"\n## Floor {floor}\n")
        parts += [row for name in names for row in rows(name)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "map.md").write_text(page())
