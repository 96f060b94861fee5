"""A walkthrough as text for a terminal, as wide as it is; colours only where they are wanted."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.cells import cell_len, set_cell_size

from glassllama.walkthrough.step import Check, Numbers, Source, Step

WIDEST = 100  # columns for sentences; pictures take all there are
NUMBER, MOST_NUMBERS = 10, 8  # columns of a number, and how many are shown of a tensor
REASON = "because kernels add in different orders and every addition rounds"
MARGIN = "  "
BOLD, DIM, RED, GREEN, CYAN, PLAIN = (f"\x1b[{n}m" for n in (1, 2, 31, 32, 36, 0))


@dataclass(frozen=True)
class Page:
    """How wide, and whether with colours."""

    width: int = 80
    colour: bool = False

    def paint(self, text: str, style: str) -> str:
        return f"{style}{text}{PLAIN}" if self.colour else text

    def wrap(self, text: str) -> list[str]:
        room = min(self.width, WIDEST) - 2 * len(MARGIN)
        return [MARGIN + line for line in textwrap.wrap(text, room)] or [MARGIN]

    def cut(self, line: str) -> str:
        return line if cell_len(line) <= self.width else set_cell_size(line, self.width - 1) + "…"


def render(step: Step, page: Page) -> str:
    """One step: question, shapes, source, numbers, picture, check, what to try."""
    return "\n".join(lines(step, page)) + "\n"


def lines(step: Step, page: Page) -> Iterator[str]:
    yield heading(f"{step.number} · {step.title}", page)
    yield from page.wrap(step.question)
    yield ""
    yield page.paint(page.cut(MARGIN + step.shapes), CYAN)
    for found in step.sources:
        yield ""
        yield from source_lines(found, page)
    for paragraph in step.text:
        yield ""
        yield from page.wrap(paragraph)
    if step.numbers:
        yield ""
        yield from number_lines(step.numbers, page)
    for picture in step.pictures:
        if drawn := picture.lines(page.width - 2 * len(MARGIN)):
            yield from ("", *(MARGIN + line for line in drawn))
    yield ""
    yield from check_lines(step.checks, page)
    yield ""
    yield page.cut(MARGIN + "try  " + page.paint(step.what_if.command, BOLD))
    yield from (page.paint(line, DIM) for line in page.wrap(step.what_if.shows))


def heading(title: str, page: Page) -> str:
    line = f"━━ {title} "
    return page.paint(line + "━" * max(page.width - cell_len(line), 0), BOLD)


def source_lines(found: Source, page: Page) -> Iterator[str]:
    yield page.paint(f"{MARGIN}{found.file}:{found.line} {found.name}", DIM)
    room = page.width - len(MARGIN) - 2
    for line in found.lines:
        code, mark, comment = line.partition("  # ")
        fits = cell_len(line) <= room or not mark
        indent = " " * (len(code) - len(code.lstrip()) + 4)
        parts = textwrap.wrap(line if fits else code, room, subsequent_indent=indent)
        for part in parts if fits else [*parts, f"{indent}# {comment}"]:
            yield page.cut(f"{MARGIN}│ {part}")


def number_lines(numbers: tuple[Numbers, ...], page: Page) -> Iterator[str]:
    names = max(cell_len(n.name) for n in numbers)
    count = max((page.width - names - len(MARGIN) - 3) // NUMBER, 1)
    for shown in numbers:
        values = first_values(shown, min(count, MOST_NUMBERS))
        more = " …" if int(np.prod(shown.shape)) > len(values) else ""
        row = " ".join(
            f"{v:{NUMBER - 1}.4f}" if abs(v) < 1e4 else f"{v:{NUMBER - 1}.3g}" for v in values
        )
        yield f"{MARGIN}{shown.name}{' ' * (names - cell_len(shown.name))} {row}{more}"


def first_values(shown: Numbers, count: int) -> list[float]:
    flat = shown.values.reshape(-1)[:count]
    kept = flat.float().cpu().numpy() if isinstance(flat, torch.Tensor) else flat
    return [float(v) for v in kept]


def check_lines(checks: tuple[Check, ...], page: Page) -> Iterator[str]:
    width = max((cell_len(check.what) for check in checks), default=0)
    for check in checks:
        blanks = " " * (width - cell_len(check.what))
        if check.warns:
            yield page.cut(f"{MARGIN}{page.paint('!', RED)} {check.what}{blanks}  not equal")
            yield from page.wrap(f"warning: {check.what} {check.warning}")
            continue
        found = "equal" if check.allowed == 0 else f"equal, max error {check.error:.1e}"
        yield page.cut(f"{MARGIN}{page.paint('✓', GREEN)} {check.what}{blanks}  {found}")
    allowed = max((check.allowed for check in checks), default=0.0)
    if allowed > 0:
        bound = f"against the running model; allowed: {allowed:.1e} of the largest number of a row"
        yield from (page.paint(line, DIM) for line in page.wrap(f"{bound}, {REASON}"))
