"""The walk's object, the style and the script, joined into one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files

from glassllama.base.interfaces import Progress
from glassllama.walkthrough.experiment import Experiment
from glassllama.walkthrough.to_json import array, as_object
from glassllama.walkthrough.walk import Walk

# In this order: each uses what stands before it.
SCRIPTS = [
    "drawing.js", "heatmap.js", "opening.js", "layer.js", "rope.js", "answer.js", "choosing.js",
    "page.js",
]  # fmt: skip
SLOT = re.compile(r"\{\{(\w+)\}\}")


def explorer_page(
    walk: Walk,
    *,
    layers: Sequence[int] | None = None,
    experiments: Sequence[Experiment] = (),
    start: int = 0,
    progress: Progress | None = None,
) -> str:
    """HTML that shows the whole walk, opened at step `start`.

    `layers` are there with all their tensors (None: the walk's own), the others with their
    attention and the length of their residual stream.
    """
    walked = as_object(walk, layers=layers, experiments=experiments, progress=progress)
    ends = {place: array(walk.trace[place][0]) for place in ("tok_embeddings", "norm")}
    return page_of({"walk": walked, "ends": ends, "start": start})


def page_of(document: object) -> str:
    """The page around a document. Its text can end neither the data nor the script."""
    script = "\n".join(["'use strict';", *map(part, SCRIPTS)])
    style = part("page.css")
    slots = {
        "policy": f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}",
        "style": style,
        "data": as_data(document),
        "script": script,
    }
    return SLOT.sub(lambda slot: slots[slot[1]], part("page.html"))


def part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def as_data(document: object) -> str:
    """JSON for a script element: `<` written so that nothing in it looks like markup."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def digest(text: str) -> str:
    """What a content security policy knows an inline script or style by (CSP 3, §2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
