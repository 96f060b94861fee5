"""What a step of the walkthrough consists of, and the check that it equals the running model."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from glassllama.base.errors import GlassError
from glassllama.walkthrough.pictures import Picture

PACKAGE = Path(__file__).parent.parent
# Matrix products and sums in a row, from a layer's input to its output, each of which rounds: norm,
# q k v, scores, softmax, weighted sum, wo, norm, gate and up, down.
LAYER_DEPTH = 9
# What no rounding explains: the largest difference, in units of the largest number of its row. A
# wrong formula, mask, layout or row of weights changes numbers by percents.
GROSS, GROSS_OVER_ROUNDING = 0.01, 4


class StepMismatchError(GlassError):
    """A step worked out by hand is not what the running model has: one of them is wrong."""


@dataclass(frozen=True)
class Source:
    """Lines of this package, as they stand there."""

    file: str  # below the package: nn/norm.py
    name: str
    line: int  # of the first line
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """A tensor to show some numbers of; `place` is its name in the trace, if it has one."""

    name: str
    values: Tensor | NDArray[Any]
    place: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class Check:
    """Two ways to the same numbers, and how far apart they came out.

    `error` is the largest difference; `relative` the largest difference in units of the largest
    number of its row. Rounding explains at most `allowed`; more than that is shown as a warning.
    """

    what: str
    error: float
    relative: float = 0.0
    allowed: float = 0.0

    @property
    def warns(self) -> bool:
        return self.relative > self.allowed

    @property
    def warning(self) -> str:
        return (
            f"differs by {self.relative:.1e} of the largest number of its row; rounding explains "
            f"{self.allowed:.1e}"
        )


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """A command to try, and what it shows."""

    command: str
    shows: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """One of the eighteen steps. `data` is what only a program wants: plain numbers and texts."""

    number: int
    name: str
    title: str
    question: str
    shapes: str
    sources: tuple[Source, ...]
    text: tuple[str, ...] = ()
    numbers: tuple[Numbers, ...] = ()
    pictures: tuple[Picture, ...] = ()
    checks: tuple[Check, ...]
    what_if: WhatIf
    data: Mapping[str, Any] = field(default_factory=dict)


def source(function: Callable[..., Any], *starts: str) -> Source:
    """The statements of a function that begin so, in its own order; without `starts`, its body.

    Raises LookupError where the source no longer has such a statement.
    """
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    texts = textwrap.dedent("".join(lines)).splitlines()
    spans = sorted(statements(tree.body[0], texts))
    if starts:
        found = {
            start: [s for s in spans if texts[s[0]].lstrip().startswith(start)] for start in starts
        }
        if missing := [start for start, hits in found.items() if not hits]:
            raise LookupError(f"{function.__qualname__} has no statement {missing[0]!r}")
        spans = sorted(hits[0] for hits in found.values())
    wanted = [texts[at] for begin, end in spans for at in range(begin, end)]
    path = Path(inspect.getsourcefile(function) or "")
    shown = textwrap.dedent("\n".join(wanted)).splitlines()
    file = str(path.relative_to(PACKAGE).as_posix())
    return Source(file, function.__qualname__, first + spans[0][0], tuple(shown))


def statements(function: ast.AST, texts: list[str]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) line of every statement; of a loop or condition, its head only."""
    for node in ast.walk(function):
        if node is function or not isinstance(node, ast.stmt):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        end = node.end_lineno or node.lineno
        if (body := getattr(node, "body", None)) is not None:
            end = body[0].lineno - 1
        yield node.lineno - 1, end


def rounding_bound(terms: int, depth: int, dtype: torch.dtype) -> float:
    """How far two computations of the same numbers may be apart, relative to a row's largest.

    Each of the two is off the exact result: kernels add in different orders, and every addition
    rounds by up to half a unit in the last place (eps / 2) of a partial sum, which is of the size
    of the row's largest number. The roundings of a sum of `terms` products are as often up as down,
    so they grow with √terms; `depth` such sums, each on the results of the one before, add up:
    2 · eps / 2 · √terms · depth. In bfloat16 and float16 sums are kept in float32, and only each
    result is rounded: 2 · eps / 2 · depth.
    """
    sums = terms**0.5 if dtype == torch.float32 else 1.0
    return torch.finfo(dtype).eps * sums * depth


def compare(
    what: str,
    ours: Tensor,
    theirs: Tensor,
    *,
    terms: int,
    depth: int,
    dtype: torch.dtype = torch.float32,
) -> Check:
    """Check that two tensors are the same but for rounding.

    Rows are those of the last axis. `dtype` is what the model computes in; `terms` and `depth` are
    those of `rounding_bound`, above which the check warns: the bound is one for errors that are as
    often up as down, and processors are many. Raises StepMismatchError for other shapes, NaN, and
    a gross difference.
    """
    if ours.shape != theirs.shape:
        raise StepMismatchError(
            f"{what}: by hand {tuple(ours.shape)}, the running model has {tuple(theirs.shape)}"
        )
    allowed = rounding_bound(terms, depth, dtype)
    a, b = ours.detach().cpu().float(), theirs.detach().cpu().float()
    apart = (a - b).abs()
    largest = b.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    check = Check(what, float(apart.max()), float((apart / largest).max()), allowed)
    gross = max(GROSS, GROSS_OVER_ROUNDING * allowed)
    if not check.relative <= gross:  # NaN is no small difference
        raise StepMismatchError(
            f"{what}: by hand it differs from the running model by {check.error:.3g}, which is "
            f"{check.relative:.3g} of the largest number of its row; rounding explains "
            f"{allowed:.3g}, and above {gross:.3g} one of them is wrong"
        )
    return check


def same(what: str, ours: object, theirs: object) -> Check:
    """Check that two things are equal, or raise StepMismatchError."""
    if ours != theirs:
        raise StepMismatchError(f"{what}: by hand {brief(ours)}, the running model {brief(theirs)}")
    return Check(what, 0.0)


def brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
