"""Displays steps of the walkthrough in a notebook, with pictures in color.

    show(run_step(walk, 9))        # a step, a comparison with a mistake, or one picture

The HTML contains its own style; its colors are translucent, for light and dark pages. Without HTML,
a notebook shows the same text as a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch
from html import escape

import numpy as np
from rich.cells import cell_len

from glassllama.walkthrough.export import MAX_NUMBERS, Layout, render
from glassllama.walkthrough.mistakes import Comparison
from glassllama.walkthrough.step import (
    Bars,
    Check,
    Drawing,
    HeatMap,
    Numbers,
    Picture,
    Source,
    Step,
    Table,
)

ABOVE, BELOW = "#2f6fde", "#d9622b"  # of zero
CELL = 14  # pixels of one number of a heat map
LETTER = 7.3  # pixels, slightly more than the width of a letter
STYLE = """<style>
.gl{font:14px/1.5 system-ui,sans-serif;max-width:60rem}
.gl p{margin:.6em 0}.gl .ask{font-size:17px;font-weight:600}
.gl code,.gl pre,.gl .mono,.gl table td,.gl svg{font-family:ui-monospace,monospace;font-size:12.5px}
.gl pre{background:rgba(128,128,128,.12);padding:.6em .8em;overflow-x:auto;margin:.4em 0;
border-radius:6px}
.gl small{opacity:.75}.gl .ok{color:#1a9850;font-weight:700}
.gl .wide{overflow-x:auto}.gl svg{max-width:none}
.gl .wide table{border-collapse:collapse;margin:.4em 0}
.gl .wide td,.gl .wide th{border:0;padding:.1em .7em .1em 0;text-align:left;white-space:pre}
.gl .wide .n{text-align:right}
.gl .bar{width:16rem}.gl .bar div{background:#2f6fde;opacity:.75;height:.8em;min-width:1px}
</style>"""


class Shown:
    """HTML for a notebook, text for everything else."""

    def __init__(self, text: str, html: str) -> None:
        self.text, self.html = text, f'{STYLE}<div class="gl">{html}</div>'

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


@singledispatch
def show(thing: object) -> Shown:
    """A Step, a Comparison or a picture -> an object that a notebook displays."""
    raise TypeError(f"expected a step, a comparison or a picture, got {type(thing).__name__}")


@show.register
def _(drawn: Picture) -> Shown:
    return Shown("\n".join(drawn.lines(Layout().width)), picture(drawn))


@show.register
def _(step: Step) -> Shown:
    parts = [
        f'<p class="ask">{escape(step.question)}</p>',
        f'<p class="mono">{escape(step.shapes)}</p>',
        *(code(found) for found in step.sources),
        *(f"<p>{escape(paragraph)}</p>" for paragraph in step.text.split("\n")),
        numbers(step.numbers),
        *(picture(drawn) for drawn in step.pictures),
        checks(step.checks),
        f"<p><small>{escape(step.command_shows)}: <code>{escape(step.command)}</code></small></p>",
    ]
    return Shown(render(step, Layout()), "".join(parts))


@show.register
def _(done: Comparison) -> Shown:
    piece = done.walkthrough.piece
    continuations = "".join(
        f"<p>{name} model continues: "
        f"<code>{escape(''.join(map(piece, run.continuation)))}</code></p>"
        for name, run in done.runs.items()
    )
    parts = [
        f'<p class="ask">Mistake: {escape(done.mistake.title)}</p>',
        f"<p>{escape(done.mistake.explanation)}</p>",
        code(done.source),
        *(picture(drawn) for drawn in done.pictures),
        continuations,
        checks((done.check,)),
    ]
    return Shown(render(done, Layout()), "".join(parts))


def code(found: Source) -> str:
    where = f"<small>{escape(found.file)}:{found.line} {escape(found.name)}</small>"
    return f"<div>{where}<pre>{escape(chr(10).join(found.lines))}</pre></div>"


def numbers(shown: Sequence[Numbers]) -> str:
    rows = [
        (each.name, *(f"{v:.4f}" for v in each.first(MAX_NUMBERS)),
         "…" if each.values.numel() > MAX_NUMBERS else "") for each in shown
    ]  # fmt: skip
    widest = max((len(row) for row in rows), default=0)
    padded = [(*row, *[""] * (widest - len(row))) for row in rows]
    return table_html([""] + [">"] * (widest - 1), padded) if rows else ""


def checks(made: Sequence[Check]) -> str:
    lines = [
        f'<span class="{"bad" if check.warns else "ok"}">{"!" if check.warns else "✓"}</span> '
        f"{escape(check.what)} <small>{escape(check.result)}</small>"
        for check in made
    ]
    return f"<p>{'<br>'.join(lines)}</p>" if lines else ""


@singledispatch
def picture(drawn: object) -> str:
    """One picture as HTML."""
    raise TypeError(f"no picture: {type(drawn).__name__}")


@picture.register
def _(drawn: Drawing) -> str:
    return f"<pre>{escape(chr(10).join(drawn.drawn))}</pre>" if drawn.drawn else ""


@picture.register
def _(drawn: Table) -> str:
    title = f"<p>{escape(drawn.title)}</p>" if drawn.title else ""
    return title + table_html(drawn.columns, drawn.rows)


@picture.register
def _(drawn: Bars) -> str:
    rows = "".join(
        f'<tr><td>{escape(label)}</td><td class="bar"><div style="width:'
        f'{100 * drawn.share(value):.1f}%"></div></td><td>{escape(note)}</td></tr>'
        for label, value, note in drawn.rows
    )
    return f'<p>{escape(drawn.title)}</p><div class="wide"><table>{rows}</table></div>'


@picture.register
def _(drawn: HeatMap) -> str:
    rows, columns = drawn.values.shape
    top = float(np.abs(drawn.values).max()) if drawn.top is None else drawn.top
    title = drawn.title + ("; orange is below zero" if (drawn.values < 0).any() else "")
    left = LETTER * max(map(cell_len, drawn.labels), default=0) + CELL / 2
    labels = "".join(
        f'<text x="0" y="{CELL * row + 11}">{escape(label)}</text>'
        for row, label in enumerate(drawn.labels)
    )
    cells = "".join(cells_of(drawn, top, left))
    return (
        f'<p>{escape(title)}</p><div class="wide"><svg role="img" '
        f'aria-label="{escape(title)}" width="{left + CELL * columns:.0f}" '
        f'height="{CELL * rows + 2}"><g fill="currentColor">{labels}</g>{cells}</svg></div>'
    )


def cells_of(drawn: HeatMap, top: float, left: float) -> Iterator[str]:
    """One square per number; opacity is the square root of the value, to show small ones."""
    for row, values in enumerate(drawn.values.tolist()):
        for column, value in enumerate(values[: row + 1] if drawn.triangle else values):
            strength = (abs(value) / top) ** 0.5 if top > 0 else 0.0
            yield (
                f'<rect x="{left + CELL * column:.0f}" y="{CELL * row}" width="{CELL - 1}" '
                f'height="{CELL - 1}" fill="{ABOVE if value >= 0 else BELOW}" '
                f'fill-opacity="{min(max(strength, 0.04), 1):.2f}">'
                f"<title>{escape(drawn.labels[row])}, {column}: {value:.4g}</title></rect>"
            )


def table_html(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns whose title ends in `>` are aligned to the right."""
    places = [' class="n"' if title.endswith(">") else "" for title in columns]
    head = "".join(
        f"<th{place}>{escape(title.rstrip('>'))}</th>"
        for title, place in zip(columns, places, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{place}>{escape(str(cell))}</td>" for cell, place in zip(row, places, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    named = any(title.rstrip(">") for title in columns)
    return f'<div class="wide"><table>{f"<tr>{head}</tr>" if named else ""}{body}</table></div>'
