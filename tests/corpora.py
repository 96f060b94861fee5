"""Texts that tokenizers are compared on: prose and code of this machine, and code points."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from long_mode import LONG

TEXT_SIZE = 10_000_000 if LONG else 300_000  # characters of prose, and of code


def in_context(points: Sequence[str], form: str) -> Iterator[str]:
    """Texts with 64 of the code points each, every one as `form` writes it."""
    for begin in range(0, len(points), 64):
        yield "".join(map(form.format, points[begin : begin + 64]))


@cache
def some(kind: str) -> list[str]:
    """The first texts of a kind, up to a total size."""
    taken: list[str] = []
    for text in code() if kind == "code" else prose():
        taken.append(text)
        if sum(map(len, taken)) > TEXT_SIZE:
            return taken
    pytest.fail(f"only {sum(map(len, taken)):,} characters of {kind} on this machine")


def code() -> Iterator[str]:
    yield from texts(Path(sysconfig.get_paths()["stdlib"]), (".py",))


def prose() -> Iterator[str]:
    packages = Path(sysconfig.get_paths()["purelib"])
    yield from texts(packages, (".md", ".rst", ".txt", "METADATA"))
    for source in texts(packages, (".py",)):
        yield "\n".join(re.findall(r'"""(.+?)"""', source, re.DOTALL))  # documentation


def texts(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(endings) and path.is_file() and path.stat().st_size < 400_000:
            yield path.read_bytes().decode("utf-8", "replace")
