"""A word of the command line as the value of an option, and one wording for what it cannot be.

The parser's own words differ from version to version, and do not say what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from enum import Enum
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import ParameterInfo

LONGEST_SHOWN = 40  # characters of a word that is no value


def read_by_us(annotation: Any) -> Any:
    """The annotation of a parameter, so that paths, numbers and choices are read by this file."""
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, *rest = get_args(annotation)
    return Annotated[kind, *(_with_reader(kind, item) for item in rest)]


def _with_reader(kind: Any, info: Any) -> Any:
    single = _single(kind)
    if not isinstance(info, ParameterInfo) or not isinstance(single, type):
        return info
    read: Callable[[str], Any] | None = None
    info = copy(info)
    if issubclass(single, Enum):
        read = partial(read_choice, single)
        info.autocompletion = _choices(single)
    elif issubclass(single, Path):
        read = partial(read_path, str(info.metavar))
    elif single in (int, float):
        read = partial(read_number, single, info.min, info.max)
    if read is not None:
        info.parser = _unless_read(read)
    return info


def _single(kind: Any) -> Any:
    """`Path` of `Path`, `Path | None` and `list[Path] | None`."""
    inner = [part for part in get_args(kind) if part is not NoneType]
    return _single(inner[0]) if inner else kind


def _unless_read(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    def value(word: Any) -> Any:
        return read(word) if isinstance(word, str) else word  # a default

    return value


def _choices(kind: type[Enum]) -> Callable[[str], list[str]]:
    """What the shell offers."""

    def offered(incomplete: str) -> list[str]:
        return [choice.value for choice in kind if choice.value.startswith(incomplete)]

    return offered


def read_choice(kind: type[Enum], word: str) -> Enum:
    names = [choice.value for choice in kind]
    if word in names:
        return kind(word)
    wanted = " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    raise refused(wanted, word)


def read_path(metavar: str, word: str) -> Path:
    """An empty name is no path: Python takes it for the current folder."""
    if not word:
        what = metavar.rstrip(".").lower()
        raise typer.BadParameter(f"expected the name of a {what}, got '' (a variable not set?)")
    return Path(word)


def read_number(
    kind: type[int] | type[float], least: float | None, most: float | None, word: str
) -> float:
    """A finite number between both bounds, so far as there are any."""
    whole = "whole" if kind is int else "finite"
    bounds = [
        *([] if least is None else [f"at least {least:g}"]),
        *([] if most is None else [f"at most {most:g}"]),
    ]
    wanted = f"a {whole} number" + (f" of {' and '.join(bounds)}" if bounds else "")
    try:
        value = kind(word)
    except ValueError:
        raise refused(wanted, word) from None
    inside = (least is None or value >= least) and (most is None or value <= most)
    if not inside or (kind is float and not math.isfinite(value)):
        raise refused(wanted, word)
    return value


def refused(wanted: str, word: str) -> typer.BadParameter:
    shown = word if len(word) <= LONGEST_SHOWN else word[:LONGEST_SHOWN] + "…"
    return typer.BadParameter(f"expected {wanted}, got {shown!r}")
