"""The walkthrough as one HTML file: data, style and scripts of page/, no network needed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files

from glassllama.base.interfaces import Progress
from glassllama.walkthrough.mistakes import Comparison
from glassllama.walkthrough.to_json import array, to_json
from glassllama.walkthrough.walkthrough import Walkthrough

SCRIPTS = ["widgets.js", "views.js", "page.js"]  # each uses those before it
SLOT = re.compile(r"\{\{(\w+)\}\}")


def html_page(
    walk: Walkthrough,
    *,
    layers: Sequence[int] | None = None,
    mistakes: Sequence[Comparison] = (),
    start: int = 0,
    progress: Progress | None = None,
) -> str:
    """The page, opened at step `start`.

    All tensors of `layers` are in it (None: of the chosen layer); of the others their attention
    weights and the norm of the residual stream.
    """
    walked = to_json(walk, layers=layers, mistakes=mistakes, progress=progress)
    hooks = [name for name in walk.trace if name.endswith("embeddings")] + ["norm"]
    outside = {name: array(walk.trace[name][0]) for name in hooks}
    return render_page({"walk": walked, "outside": outside, "start": start})


def render_page(document: object) -> str:
    """The HTML with this data, under a content security policy that allows nothing else."""
    script = "\n".join(["'use strict';", *map(asset, SCRIPTS)])
    style = asset("page.css")
    slots = {
        "policy": f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}",
        "style": style,
        "data": script_json(document),
        "script": script,
    }
    return SLOT.sub(lambda slot: slots[slot[1]], asset("page.html"))


def asset(name: str) -> str:
    return files("glassllama.walkthrough").joinpath("page", name).read_text(encoding="utf-8")


def script_json(document: object) -> str:
    """JSON for a script element: `<` is escaped, so that no text can end the element."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def digest(text: str) -> str:
    """The source expression of an inline script or style in a policy (CSP 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
