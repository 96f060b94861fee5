"""The parts of a step: source code, numbers, pictures made of characters, and checks.

A check compares a manual computation with the running model.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size
from torch import Tensor

from glassllama.base.errors import GlassError

PACKAGE = Path(__file__).parent.parent
# Matrix products and sums in sequence from the input of a layer to its output, each of which
# rounds: norm, q k v, scores, softmax, weighted sum, wo, norm, gate and up, down.
LAYER_DEPTH = 9
# Relative difference that rounding cannot explain: a wrong formula, mask, layout or row of weights
# changes numbers by percents. The second number is a multiple of the rounding bound.
LARGEST_DIFFERENCE, LARGEST_OVER_BOUND = 0.01, 4
SHADES = " ·░▒▓█"
EIGHTHS = " ▏▎▍▌▋▊▉"
LABEL = 14  # columns for the name of a row, at most
CELL = 2  # columns of one number of a heat map: about square


class StepMismatchError(GlassError):
    """The manual computation of a step and the running model have different results."""


@dataclass(frozen=True)
class Source:
    """Lines of this package's source code."""

    file: str  # below the package: nn/norm.py
    name: str
    line: int  # number of the first line
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """A tensor of which the first numbers are shown; `hook` is its name in the trace, if any."""

    name: str
    values: Tensor
    hook: str | None = None

    def first(self, count: int) -> list[float]:
        return list(map(float, self.values.reshape(-1)[:count]))


@dataclass(frozen=True)
class Check:
    """Two computations of the same numbers, and their difference.

    `error` is the largest absolute difference; `relative` the largest difference in units of the
    largest number of its row. Rounding explains up to `allowed`; a larger one is a warning.
    """

    what: str
    error: float = 0.0
    relative: float = 0.0
    allowed: float = 0.0

    @property
    def warns(self) -> bool:
        return self.relative > self.allowed

    @property
    def result(self) -> str:
        if self.warns:
            differs = f"warning: differs by {self.relative:.1e} of the largest number of its row"
            return f"{differs}; rounding explains {self.allowed:.1e}"
        return "equal" if self.allowed == 0 else f"equal, max error {self.error:.1e}"


@dataclass(frozen=True)
class Drawing:
    """Ready lines of at most 76 columns."""

    drawn: Sequence[str]

    def lines(self, width: int) -> list[str]:
        return list(self.drawn)


@dataclass(frozen=True)
class HeatMap:
    """Numbers as shades, two columns each: darker up to `top`; negative ones begin with -.

    Where `hidden` is True there is × instead.
    """

    title: str
    values: NDArray[Any]  # (rows, columns)
    labels: Sequence[str]
    top: float | None = None  # None: the largest
    triangle: bool = False  # nothing is above the diagonal
    hidden: NDArray[np.bool_] | None = None

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
            hidden = [False] * columns if self.hidden is None else self.hidden[row]
            cells = "".join(
                "××" if hidden[column] else shade(self.values[row, column], top)
                for column in range(first, min(end, columns))
            )
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
    rows: Sequence[tuple[str, float, str]]  # label, value, note
    top: float | None = None  # None: the largest value

    def share(self, value: float) -> float:
        """The length of a bar, from 0 to 1."""
        top = max(value for _, value, _ in self.rows) if self.top is None else self.top
        return min(max(value / top, 0.0), 1.0) if top > 0 else 0.0

    def lines(self, width: int) -> list[str]:
        label_width = min(2 * LABEL, max((cell_len(label) for label, _, _ in self.rows), default=0))
        note_width = max((cell_len(note) for _, _, note in self.rows), default=0)
        bar_width = max(width - label_width - note_width - 4, 8)
        drawn = [self.title]
        for label, value, note in self.rows:
            full, eighths = divmod(round(self.share(value) * bar_width * 8), 8)
            bar = pad("█" * full + EIGHTHS[eighths].strip(), bar_width)
            drawn.append(f"{pad(label, label_width)} │{bar} {note}")
        return drawn


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns whose title ends in `>` are right-aligned; long lines are cut."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""

    def lines(self, width: int) -> list[str]:
        cells = [
            [title.rstrip(">") for title in self.columns],
            *([*map(str, r)] for r in self.rows),
        ]
        widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
        right = [title.endswith(">") for title in self.columns]
        drawn = [self.title] if self.title else []
        for row in cells:
            parts = [pad(c, w, right=r) for c, w, r in zip(row, widths, right, strict=True)]
            drawn.append(cut("  ".join(parts).rstrip(), width))
        return drawn


Picture = Drawing | HeatMap | Bars | Table


def cut(text: str, width: int) -> str:
    """At most `width` columns: wide characters count twice."""
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)) + "…"


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Exactly `width` columns; longer texts are cut."""
    spaces = " " * (width - cell_len(text))
    return spaces + text if right else cut(text, width) + spaces


@dataclass(frozen=True, kw_only=True)
class Step:
    """One of the eighteen steps. `data` has results for programs: numbers, texts, tensors."""

    number: int = 0  # set by run_step: the order is that of STEPS
    name: str
    title: str
    question: str
    shapes: str
    sources: tuple[Source, ...]
    text: str = ""  # one line for each paragraph
    numbers: Sequence[Numbers] = ()
    pictures: Sequence[Picture] = ()
    checks: Sequence[Check]
    command: str  # to try
    command_shows: str
    data: Mapping[str, Any] = field(default_factory=dict)


def sources(*excerpts: tuple[Callable[..., Any] | str, ...]) -> tuple[Source, ...]:
    """Excerpts of source code, each (function, *starts of statements) as `source` takes them."""
    return tuple(source(*excerpt) for excerpt in excerpts)  # type: ignore[arg-type]


def calls(cls: type, *names: str) -> tuple[Source, ...]:
    """The statements in which a class's methods call its modules or hook points of these names.

    Raises LookupError if no method calls one of them.
    """
    own = [c for c in cls.__mro__ if not c.__module__.startswith("torch.")]
    methods = [m for c in own for m in vars(c).values() if inspect.isfunction(m)]
    found: dict[Callable[..., Any], list[str]] = {}
    for name in names:
        call = f"self.{name}("
        method = next((m for m in methods if call in inspect.getsource(m)), None)
        if method is None:
            raise LookupError(f"no method of {cls.__name__} calls {name}")
        found.setdefault(method, []).append(call)
    return tuple(source(method, *parts) for method, parts in found.items())


def source(function: Callable[..., Any], *starts: str) -> Source:
    """The statements of a function that begin with `starts`, in the function's order; or its body.

    A start with `self.` may be anywhere in its statement. Raises LookupError if the function has no
    such statement.
    """
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    texts = textwrap.dedent("".join(lines)).splitlines()
    spans = sorted(statements(ast.parse("\n".join(texts)).body[0]))
    found = [[s for s in spans if begins("\n".join(texts[slice(*s)]), start)] for start in starts]
    if [] in found:
        missing = starts[found.index([])]
        raise LookupError(f"{function.__qualname__} has no statement {missing!r}")
    spans = sorted({hits[0] for hits in found}) or spans
    excerpt = "\n".join(texts[n] for begin, end in spans for n in range(begin, end))
    path = Path(inspect.getsourcefile(function) or "")
    file = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
    dedented = tuple(textwrap.dedent(excerpt).splitlines())
    return Source(file, function.__qualname__, first + spans[0][0], dedented)


def begins(statement: str, start: str) -> bool:
    return start in statement if start.startswith("self.") else statement.lstrip().startswith(start)


def statements(function: ast.AST) -> Iterator[tuple[int, int]]:
    """(first, last + 1) line of every statement; of a loop or condition, without its body."""
    for node in ast.walk(function):
        if node is function or not isinstance(node, ast.stmt):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        body = getattr(node, "body", None)
        end = (node.end_lineno or node.lineno) if body is None else body[0].lineno - 1
        yield node.lineno - 1, end


def rounding_bound(terms: int, depth: int, dtype: torch.dtype) -> float:
    """How much two computations of the same numbers may differ, relative to a row's largest.

    Each of the two differs from the exact result: kernels add in different orders, and every
    addition rounds by up to half a unit in the last place (eps / 2) of a partial sum, which is of
    the size of the row's largest number. The roundings of a sum of `terms` products have random
    signs, so they grow with √terms; `depth` such sums, each on the results of the one before, add
    up: 2 · eps / 2 · √terms · depth. In bfloat16 and float16 sums are computed in float32, and only
    each result is rounded: 2 · eps / 2 · depth.
    """
    sums = terms**0.5 if dtype == torch.float32 else 1.0
    return torch.finfo(dtype).eps * sums * depth


def compare(
    what: str, manual: Tensor, model: Tensor, *, terms: int, depth: int,
    dtype: torch.dtype = torch.float32,
) -> Check:  # fmt: skip
    """Check that two tensors are the same except for rounding.

    Rows are those of the last axis. `dtype` is that of the model; `terms` and `depth` are those of
    `rounding_bound`. A difference above that bound is a warning, because the bound holds for random
    signs of errors. Raises StepMismatchError for different shapes, NaN, and a difference that no
    rounding explains.
    """
    if manual.shape != model.shape:
        raise mismatch(what, tuple(manual.shape), tuple(model.shape))
    allowed = rounding_bound(terms, depth, dtype)
    a, b = manual.detach().cpu().float(), model.detach().cpu().float()
    difference = (a - b).abs()
    largest = b.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    check = Check(what, float(difference.max()), float((difference / largest).max()), allowed)
    limit = max(LARGEST_DIFFERENCE, LARGEST_OVER_BOUND * allowed)
    if not check.relative <= limit:  # also true for NaN
        raise StepMismatchError(
            f"{what}: the manual result differs from the running model by {check.error:.3g}, "
            f"{check.relative:.3g} of the largest number of its row; rounding explains "
            f"{allowed:.3g}, and above {limit:.3g} one of the two is wrong"
        )
    return check


def same(what: str, manual: object, model: object) -> Check:
    """Check that two values are equal, or raise StepMismatchError."""
    if manual != model:
        raise mismatch(what, manual, model)
    return Check(what)


def mismatch(what: str, manual: object, model: object) -> StepMismatchError:
    ours, theirs = (textwrap.shorten(str(v), 60, placeholder="...") for v in (manual, model))
    return StepMismatchError(f"{what}: computed {ours}, the running model has {theirs}")
