"""A walkthrough as text for a terminal, as one object for `--json`, and as an HTML page.

Text is as wide as the terminal, with colors if asked for. docs/walkthrough.md describes every field
of the object. Its arrays have no batch axis; large ones are flat, with their shape. Numbers have
four significant digits, enough for any picture; the checks use all. The page is one file with this
object and the style and scripts of page/; it needs no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from rich.cells import cell_len
from torch import Tensor

from glassllama.base.interfaces import Progress
from glassllama.walkthrough.mistakes import Comparison
from glassllama.walkthrough.step import Check, Numbers, Picture, Source, Step, cut, pad
from glassllama.walkthrough.steps import STEPS, run_step
from glassllama.walkthrough.steps.input import embedding_rows
from glassllama.walkthrough.tracing import Predictions, attention_entropy, residual_norms, trace
from glassllama.walkthrough.walkthrough import Walkthrough, bytes_of_token

SCHEMA = "glassllama.walkthrough/2"
DIGITS = 4  # significant
PICTURE_WIDTH = 76
FIRST_NUMBERS = 8
CANDIDATES = 256  # the most probable tokens, listed with their logits; of the others only a sum
TEMPERATURES = [round(0.1 * n, 1) for n in range(1, 21)]  # for which this sum is computed
SCRIPTS = ["widgets.js", "views.js", "page.js"]  # each uses those before it
SLOT = re.compile(r"\{\{(\w+)\}\}")

MAX_TEXT_WIDTH = 100  # columns of sentences; pictures use the whole width
NUMBER_WIDTH, MAX_NUMBERS = 10, 8  # columns of a number; how many are shown of a tensor
REASON = "because kernels add in different orders and every addition rounds"
MARGIN = "  "
BOLD, DIM, RED, GREEN, CYAN, PLAIN = (f"\x1b[{n}m" for n in (1, 2, 31, 32, 36, 0))

Object = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """The width in columns, and whether colors are used."""

    width: int = 80
    color: bool = False

    def paint(self, text: str, style: str) -> str:
        return f"{style}{text}{PLAIN}" if self.color else text

    def wrap(self, text: str) -> list[str]:
        width = min(self.width, MAX_TEXT_WIDTH) - 2 * len(MARGIN)
        return [MARGIN + line for line in textwrap.wrap(text, width)] or [MARGIN]

    def dimmed(self, text: str) -> list[str]:
        return [self.paint(line, DIM) for line in self.wrap(text)]

    def cut(self, line: str) -> str:
        return cut(line, self.width)


def render(shown: Step | Comparison, layout: Layout) -> str:
    """A step or a mistake as text."""
    if isinstance(shown, Step):
        return "\n".join([*step_lines(shown, layout), ""])
    return "\n".join([*comparison_lines(shown, layout), ""])


def step_lines(step: Step, layout: Layout) -> Iterator[str]:
    """Question, shapes, source, text, numbers, pictures, checks, and what to try."""
    yield heading(f"{step.number} · {step.title}", layout)
    yield from layout.wrap(step.question)
    yield ""
    yield layout.paint(layout.cut(MARGIN + step.shapes), CYAN)
    for each in step.sources:
        yield from ("", *source_lines(each, layout))
    for paragraph in step.text.split("\n"):
        yield from ("", *layout.wrap(paragraph))
    if step.numbers:
        yield from ("", *number_lines(step.numbers, layout))
    yield from picture_lines(step.pictures, layout)
    yield from ("", *check_lines(step.checks, layout), "")
    yield layout.cut(MARGIN + "try  " + layout.paint(step.command, BOLD))
    yield from layout.dimmed(step.command_shows)


def comparison_lines(done: Comparison, layout: Layout) -> Iterator[str]:
    """Explanation, source of the mistake, predictions and continuations of both, the check."""
    yield heading(f"Mistake: {done.mistake.title}", layout)
    yield from layout.wrap(done.mistake.explanation)
    yield from ("", *source_lines(done.source, layout))
    yield from picture_lines(done.pictures, layout)
    yield ""
    for name, run in done.runs.items():
        text = "".join(map(done.walkthrough.piece, run.continuation))
        yield from layout.wrap(f"{name} model continues:  {text}")
    yield from ("", *check_lines((done.check,), layout))


def heading(title: str, layout: Layout) -> str:
    line = f"━━ {title} "
    return layout.paint(line + "━" * max(layout.width - cell_len(line), 0), BOLD)


def source_lines(shown: Source, layout: Layout) -> Iterator[str]:
    yield layout.paint(f"{MARGIN}{shown.file}:{shown.line} {shown.name}", DIM)
    width = layout.width - len(MARGIN) - 2
    for line in shown.lines:
        code, mark, comment = line.partition("  # ")
        fits = cell_len(line) <= width or not mark
        indent = " " * (len(code) - len(code.lstrip()) + 4)
        parts = textwrap.wrap(line if fits else code, width, subsequent_indent=indent)
        for part in parts if fits else [*parts, f"{indent}# {comment}"]:
            yield layout.cut(f"{MARGIN}│ {part}")


def number_lines(numbers: Sequence[Numbers], layout: Layout) -> Iterator[str]:
    names = max(cell_len(n.name) for n in numbers)
    count = max((layout.width - names - len(MARGIN) - 3) // NUMBER_WIDTH, 1)
    for shown in numbers:
        values = shown.first(min(count, MAX_NUMBERS))
        more = " …" if shown.values.numel() > len(values) else ""
        row = " ".join(f"{v:{NUMBER_WIDTH - 1}.{'4f' if abs(v) < 1e4 else '3g'}}" for v in values)
        yield f"{MARGIN}{pad(shown.name, names)} {row}{more}"


def picture_lines(pictures: Sequence[Picture], layout: Layout) -> Iterator[str]:
    for picture in pictures:
        if drawn := picture.lines(layout.width - 2 * len(MARGIN)):
            yield from ("", *(MARGIN + line for line in drawn))


def check_lines(checks: Sequence[Check], layout: Layout) -> Iterator[str]:
    width = max((cell_len(check.what) for check in checks), default=0)
    for check in checks:
        sign = layout.paint("!", RED) if check.warns else layout.paint("✓", GREEN)
        result = "not equal" if check.warns else check.result
        yield layout.cut(f"{MARGIN}{sign} {pad(check.what, width)}  {result}")
        if check.warns:
            yield from layout.wrap(f"{check.result} ({check.what})")
    allowed = max((check.allowed for check in checks), default=0.0)
    if allowed > 0:
        bound = f"against the running model; allowed: {allowed:.1e} of the largest number of a row"
        yield from layout.dimmed(f"{bound}, {REASON}")


def to_json(
    walk: Walkthrough,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    mistakes: Sequence[Comparison] = (),
    progress: Progress | None = None,
) -> Object:
    """The walkthrough as an object. All tensors of `layers` are in it (None: of the chosen one).

    `steps` None: all steps. `progress` counts them.
    """
    numbers = range(len(STEPS)) if steps is None else steps
    done = []
    for count, number in enumerate(numbers, start=1):
        done.append(step_to_json(run_step(walk, number)))
        if progress is not None:
            progress(count, len(numbers))
    return {
        "schema": SCHEMA,
        "model": walk.name,
        "prompt": walk.prompt,
        "layer": walk.layer,
        "head": walk.head,
        "config": config_to_json(walk),
        "tokens": [token_to_json(walk, id) for id in walk.ids],
        "steps": done,
        "residual_norms": plain(residual_norms(walk.trace)[:, 0]),
        "attention": attention_to_json(walk),
        "logit_lens": lens_to_json(walk),
        "predictions": predictions_to_json(walk, walk.predictions),
        "probabilities": candidates_to_json(walk),
        "angles": array(walk.angles(walk.positions)[0]) if walk.rope is not None else None,
        "windows": [replace(walk, layer=n).attention.window for n in range(walk.config.n_layers)],
        "layers": layers_to_json(walk, [walk.layer] if layers is None else layers),
        "mistakes": [comparison_to_json(each) for each in mistakes],
    }


def plain(values: Any) -> Any:
    """Numbers, texts, lists and dicts; floats with four significant digits."""
    if isinstance(values, Tensor):
        return plain(values.tolist())
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    return float(f"{values:.{DIGITS}g}") if isinstance(values, float) else values


def array(tensor: Tensor) -> Object:
    """A tensor of any shape, flat: the last index changes fastest."""
    return {"shape": list(tensor.shape), "values": plain(tensor.float().reshape(-1))}


def config_to_json(walk: Walkthrough) -> Object:
    c, values = walk.config, asdict(walk.config)
    if values.get("rope_scaling") is not None:
        values["rope_scaling"]["rule"] = type(c.rope_scaling).__name__
    derived = {"n_kv_heads": c.n_kv_heads, "group_size": walk.group_size, "head_dim": c.head_dim}
    return values | derived


def token_to_json(walk: Walkthrough, id: int) -> Object:
    raw = bytes_of_token(walk.tokenizer, id)
    return {"id": id, "piece": walk.piece(id), "bytes": None if raw is None else list(raw)}


def step_to_json(step: Step) -> Object:
    texts = ("number", "name", "title", "question", "shapes")
    numbers = [
        {"name": shown.name, "hook": shown.hook, "shape": list(shown.values.shape),
         "first": plain(shown.first(FIRST_NUMBERS))} for shown in step.numbers
    ]  # fmt: skip
    return {
        **{name: getattr(step, name) for name in texts},
        "sources": [asdict(source) for source in step.sources],
        "text": step.text.split("\n"),
        "numbers": numbers,
        "picture": [line for p in step.pictures for line in [*p.lines(PICTURE_WIDTH), ""]],
        "checks": [asdict(check) for check in step.checks],
        "what_if": {"command": step.command, "shows": step.command_shows},
        "data": plain(step.data),
    }


def attention_to_json(walk: Walkthrough) -> Object:
    """All heads of every recorded layer: rows of the lower triangle, one after the other."""
    recorded = walk.trace.matching("layers.*.attention.weights")
    weights = {name.split(".")[1]: tensor[0] for name, tensor in recorded.items()}  # (H, T, T)
    rows, columns = torch.tril_indices(len(walk.ids), len(walk.ids))
    return {
        "tokens": len(walk.ids),
        "weights": {n: plain(w[:, rows, columns]) for n, w in weights.items()},
        "entropy_bits": {n: plain(attention_entropy(w)) for n, w in weights.items()},
    }


def predictions_to_json(walk: Walkthrough, predicted: Predictions) -> Object:
    """Predictions (…, k), with the pieces of their ids."""
    ids = predicted.ids.tolist()
    return {"ids": ids, "probabilities": plain(predicted.probs), "pieces": pieces(walk, ids)}


def pieces(walk: Walkthrough, ids: Any) -> Any:
    return [pieces(walk, i) for i in ids] if isinstance(ids, list) else walk.piece(ids)


def lens_to_json(walk: Walkthrough) -> Object:
    """(L + 1, T', k) of the last T' positions."""
    ids, probs = walk.lens.ids[:, 0], walk.lens.probs[:, 0]
    first = {"first_position": len(walk.ids) - ids.shape[1]}
    return first | predictions_to_json(walk, Predictions(ids, probs))


def candidates_to_json(walk: Walkthrough) -> Object:
    """The most probable next tokens with their logits; of all others log Σ exp(logit / T)."""
    logits = walk.logits[0, -1].double()
    top = logits.topk(min(CANDIDATES, len(logits)))
    others = torch.ones_like(logits, dtype=torch.bool).index_fill(0, top.indices, False)
    rest = logits[others]
    sums = (
        [round(float((rest / t).logsumexp(0)), DIGITS) for t in TEMPERATURES] if len(rest) else []
    )
    ids = top.indices.tolist()
    return {
        "ids": ids,
        "pieces": pieces(walk, ids),
        "logits": [round(value, DIGITS) for value in top.values.tolist()],
        "others": {"count": len(rest), "temperatures": TEMPERATURES, "log_sums": sums},
    }


def layers_to_json(walk: Walkthrough, layers: Sequence[int]) -> Object:
    """All tensors of these layers by hook name below `layers.N`, with input and output."""
    others = [f"layers.{n}.*" for n in layers if n != walk.layer]
    recorded = trace(walk.model, walk.ids, hooks=others) if others else {}
    tensors: Mapping[str, Tensor] = {**walk.trace, **recorded}
    found: Object = {}
    for n in layers:
        names = {name: f"layers.{n}.{name}" for name in walk.manual}
        names = {"input": replace(walk, layer=n).block_input_hook} | names
        names["output"] = f"layers.{n}"
        found[str(n)] = {name: array(tensors[hook][0]) for name, hook in names.items()}
    return found


def comparison_to_json(done: Comparison) -> Object:
    walk, mistake = done.walkthrough, done.mistake
    runs = {
        name: {
            "predictions": predictions_to_json(walk, run.predictions),
            "weights": array(run.weights),
            "continuation": {"ids": run.continuation, "pieces": pieces(walk, run.continuation)},
        }
        for name, run in done.runs.items()
    }
    return {
        **{name: getattr(mistake, name) for name in ("name", "title", "explanation")},
        "source": asdict(done.source),
        "divergence_bits": plain(done.divergence),
        "check": asdict(done.check),
        **runs,
    }


def html_page(walk: Walkthrough, walked: Object, start: int = 0) -> str:
    """The page of a walkthrough and its object, opened at step `start`."""
    outside = {name: array(walk.trace[name][0]) for name in [*embedding_rows(walk), "norm"]}
    return render_page({"walk": walked, "outside": outside, "start": start})


def render_page(document: object) -> str:
    """The HTML with this data, under a content security policy that allows nothing else."""
    style, script = asset("page.css"), "\n".join(["'use strict';", *map(asset, SCRIPTS)])
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    slots = {
        "policy": f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}",
        "style": style,
        "data": data.replace("<", "\\u003c"),  # so that no text can end the script element
        "script": script,
    }
    return SLOT.sub(lambda slot: slots[slot[1]], asset("page.html"))


def asset(name: str) -> str:
    return files("glassllama.walkthrough").joinpath("page", name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """The source expression of an inline script or style in a policy (CSP 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
