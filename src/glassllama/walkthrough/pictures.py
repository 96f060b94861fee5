"""Pictures made of characters, as wide as the terminal: heat maps, bars, tables, drawings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size

SHADES = " ·░▒▓█"
EIGHTHS = " ▏▎▍▌▋▊▉"
LABEL = 14  # columns for the name of a row, at most
CELL = 2  # columns of one number of a heat map: about square


class Picture(Protocol):
    """Anything that can be drawn within `width` columns."""

    def lines(self, width: int) -> list[str]: ...


@dataclass(frozen=True)
class Drawing:
    """Ready lines of at most 76 columns."""

    drawn: tuple[str, ...]

    def lines(self, width: int) -> list[str]:
        return list(self.drawn)


@dataclass(frozen=True)
class HeatMap:
    """Numbers as shades, two columns each: darker up to `top`; negative ones begin with -."""

    title: str
    values: NDArray[Any]  # (rows, columns)
    labels: Sequence[str]
    top: float | None = None  # None: the largest
    triangle: bool = False  # nothing is above the diagonal

    def lines(self, width: int) -> list[str]:
        label_width = min(LABEL, max(map(cell_len, self.labels), default=0))
        shown = max((width - label_width - 3) // CELL, 1)
        rows, columns = self.values.shape
        first = max(columns - shown, 0) if self.triangle else 0
        top = float(np.abs(self.values).max()) if self.top is None else self.top
        drawn = [self.title + ("; - is below zero" if (self.values < 0).any() else "")]
        if columns > shown:
            drawn.append(f"(the {'last' if self.triangle else 'first'} {shown} of {columns})")
        for row in range(first, rows):
            end = row + 1 if self.triangle else first + shown
            cells = "".join(shade(v, top) for v in self.values[row, first:end])
            drawn.append(f"{pad(self.labels[row], label_width)} │{cells}")
        return drawn


def shade(value: float, top: float) -> str:
    """Two characters, by the square root of value / top, so that small numbers can be seen."""
    share = math.sqrt(abs(value) / top) if top > 0 else 0.0
    body = SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]
    return ("-" if value < 0 and body != " " else body) + body


@dataclass(frozen=True)
class Bars:
    """One bar per row, the longest as wide as the space allows, and a note behind each."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]
    notes: Sequence[str]
    top: float | None = None

    def lines(self, width: int) -> list[str]:
        label_width = min(2 * LABEL, max(map(cell_len, self.labels), default=0))
        note_width = max(map(cell_len, self.notes), default=0)
        bar_width = max(width - label_width - note_width - 4, 8)
        top = max(self.values, default=0.0) if self.top is None else self.top
        drawn = [self.title] if self.title else []
        for label, value, note in zip(self.labels, self.values, self.notes, strict=True):
            drawn_bar = pad(bar(value / top if top > 0 else 0.0, bar_width), bar_width)
            drawn.append(f"{pad(label, label_width)} │{drawn_bar} {note}")
        return drawn


def bar(share: float, width: int) -> str:
    """A bar of `share` of the width, exact to an eighth of a column."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns whose title ends in `>` are right-aligned; long lines are cut."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""

    def lines(self, width: int) -> list[str]:
        cells = [[str(cell) for cell in row] for row in self.rows]
        titles = [title.rstrip(">") for title in self.columns]
        widths = [
            max(cell_len(row[n]) for row in [titles, *cells]) for n in range(len(self.columns))
        ]
        right = [title.endswith(">") for title in self.columns]
        drawn = [self.title] if self.title else []
        for row in [titles, *cells] if any(titles) else cells:
            parts = [pad(c, w, right=r) for c, w, r in zip(row, widths, right, strict=True)]
            line = "  ".join(parts).rstrip()
            drawn.append(line if cell_len(line) <= width else set_cell_size(line, width - 1) + "…")
        return drawn


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Exactly `width` columns: wide characters count twice, longer texts are cut."""
    if cell_len(text) > width:
        return set_cell_size(text, max(width - 1, 0)) + "…"
    spaces = " " * (width - cell_len(text))
    return spaces + text if right else text + spaces


def visible(raw: bytes) -> str:
    """The bytes of a token as text: ␣ a space, ↵ a line break, ⟨e2⟩ a byte that is no text."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "".join(chr(b) if 0x20 < b < 0x7F else f"⟨{b:02x}⟩" for b in raw)
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c, c if c.isprintable() else f"⟨{ord(c):02x}⟩") for c in text)
