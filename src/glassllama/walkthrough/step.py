"""The parts of a step, the check against the running model, and excerpts of the source code."""

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
# Matrix products and sums in sequence from the input of a layer to its output, each of which
# rounds: norm, q k v, scores, softmax, weighted sum, wo, norm, gate and up, down.
LAYER_DEPTH = 9
# Relative difference that rounding cannot explain: a wrong formula, mask, layout or row of weights
# changes numbers by percents. The second number is a multiple of the rounding bound.
LARGEST_DIFFERENCE, LARGEST_OVER_BOUND = 0.01, 4


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
    values: Tensor | NDArray[Any]
    hook: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def first(self, count: int) -> list[float]:
        flat = self.values.reshape(-1)[:count]
        return [float(value) for value in flat]


@dataclass(frozen=True)
class Check:
    """Two computations of the same numbers, and their difference.

    `error` is the largest absolute difference; `relative` the largest difference in units of the
    largest number of its row. Rounding explains up to `allowed`; a larger one is a warning.
    """

    what: str
    error: float
    relative: float = 0.0
    allowed: float = 0.0

    @property
    def warns(self) -> bool:
        return self.relative > self.allowed

    @property
    def result(self) -> str:
        if self.warns:
            return (
                f"warning: differs by {self.relative:.1e} of the largest number of its row; "
                f"rounding explains {self.allowed:.1e}"
            )
        return "equal" if self.allowed == 0 else f"equal, max error {self.error:.1e}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One of the eighteen steps. `data` has results for programs: plain numbers, texts, lists."""

    number: int = 0  # set by run_step: the order is that of STEPS
    name: str
    title: str
    question: str
    shapes: str
    sources: tuple[Source, ...]
    text: tuple[str, ...] = ()
    numbers: tuple[Numbers, ...] = ()
    pictures: tuple[Picture, ...] = ()
    checks: tuple[Check, ...]
    command: str  # to try
    command_shows: str
    data: Mapping[str, Any] = field(default_factory=dict)


def source(function: Callable[..., Any], *starts: str) -> Source:
    """The statements of a function that begin with `starts`, in the function's order; or its body.

    Raises LookupError if the function has no such statement.
    """
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    texts = textwrap.dedent("".join(lines)).splitlines()
    spans = sorted(statements(ast.parse("\n".join(texts)).body[0]))
    if starts:
        found = {
            start: [s for s in spans if texts[s[0]].lstrip().startswith(start)] for start in starts
        }
        if missing := [start for start, hits in found.items() if not hits]:
            raise LookupError(f"{function.__qualname__} has no statement {missing[0]!r}")
        spans = sorted(hits[0] for hits in found.values())
    excerpt = "\n".join(texts[n] for begin, end in spans for n in range(begin, end))
    file = Path(inspect.getsourcefile(function) or "").relative_to(PACKAGE).as_posix()
    dedented = tuple(textwrap.dedent(excerpt).splitlines())
    return Source(file, function.__qualname__, first + spans[0][0], dedented)


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
    what: str,
    manual: Tensor,
    model: Tensor,
    *,
    terms: int,
    depth: int,
    dtype: torch.dtype = torch.float32,
) -> Check:
    """Check that two tensors are the same except for rounding.

    Rows are those of the last axis. `dtype` is that of the model; `terms` and `depth` are those of
    `rounding_bound`. A difference above that bound is a warning, because the bound holds for random
    signs of errors. Raises StepMismatchError for different shapes, NaN, and a difference that no
    rounding explains.
    """
    if manual.shape != model.shape:
        raise StepMismatchError(
            f"{what}: computed {tuple(manual.shape)}, the running model has {tuple(model.shape)}"
        )
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
        pair = (textwrap.shorten(str(value), 60, placeholder="...") for value in (manual, model))
        raise StepMismatchError("{}: computed {}, the running model has {}".format(what, *pair))
    return Check(what, 0.0)
