"""Steps and mistakes as text for a terminal, as wide as it is, with colors if asked for."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from glassllama.walkthrough.mistakes import Comparison
from glassllama.walkthrough.step import Check, Numbers, Picture, Source, Step, cut, pad

MAX_TEXT_WIDTH = 100  # columns of sentences; pictures use the whole width
NUMBER_WIDTH, MAX_NUMBERS = 10, 8  # columns of a number; how many are shown of a tensor
REASON = "because kernels add in different orders and every addition rounds"
MARGIN = "  "
BOLD, DIM, RED, GREEN, CYAN, PLAIN = (f"\x1b[{n}m" for n in (1, 2, 31, 32, 36, 0))


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
