"""The help pages: plain text that fits the window, the same in every version of the parser."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from enum import Enum
from typing import Any

from glassllama.cli.console import is_terminal

WIDEST = 100
LEFT = 28  # columns for the names; what is longer gets a line of its own
NARROWEST = 20  # columns for the explanation, however narrow the window
OTHER = "Other"


def page(command: Any, ctx: Any, sections: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """Usage, what it does, then sections of (name, explanation), and the epilog."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    usage = " ".join(command.collect_usage_pieces(ctx))
    parts = [f"Usage: {ctx.command_path} {usage}", *wrapped(command.help or "", width)]
    for title, rows in sections:
        lines = [line for row in rows for line in two_columns(*row, width)]
        parts.append("\n".join([bold(title), *lines]))
    return "\n\n".join([*parts, *wrapped(command.epilog or "", width)])


def wrapped(text: str, width: int) -> list[str]:
    """The paragraphs of a docstring."""
    paragraphs = textwrap.dedent(text).strip().split("\n\n")
    return [textwrap.fill(" ".join(p.split()), width) for p in paragraphs if p]


def two_columns(name: str, explanation: str, width: int) -> list[str]:
    lines = textwrap.wrap(explanation, max(NARROWEST, width - LEFT)) or [""]
    first = f"  {name}"
    if len(first) >= LEFT:
        return [first, *(" " * LEFT + line for line in lines)]
    return [first.ljust(LEFT) + lines[0], *(" " * LEFT + line for line in lines[1:])]


def bold(title: str) -> str:
    plain = "NO_COLOR" in os.environ or not is_terminal(sys.stdout)
    return title if plain else f"\x1b[1m{title}\x1b[0m"


def parameter_sections(parameters: Sequence[Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Arguments first, then options by their panel, those without one last."""
    arguments, panels = [], {}  # type: list[tuple[str, str]], dict[str, list[tuple[str, str]]]
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            arguments.append((parameter.metavar, parameter.help or ""))
            continue
        panel = parameter.rich_help_panel or OTHER
        panels.setdefault(panel, []).append((option_names(parameter), explained(parameter)))
    others = {OTHER: panels.pop(OTHER)} if OTHER in panels else {}
    first = [("Arguments", arguments)] if arguments else []
    return [*first, *panels.items(), *others.items()]


def option_names(option: Any) -> str:
    """`-n, --max-tokens N`. Of a switch that is on by default, what turns it off."""
    names = ", ".join(sorted(option.secondary_opts or option.opts, key=len))
    return names if option.is_flag else f"{names} {option.metavar}"


def explained(option: Any) -> str:
    """The help text, and the default where there is one.

    A switch that is on by default is explained as what turns it off, so its help has to say that.
    """
    default = option.show_default if isinstance(option.show_default, str) else option.default
    if isinstance(default, Enum):
        default = default.value
    known = default is not True and default not in (None, False, ()) and not callable(default)
    return f"{option.help}" + (f" [default: {default}]" if known else "")
