"""Write docs/cli.md: all verbs with their arguments and options, from what the program declares.

python docs/make_cli_page.py          (a test fails while the page is stale)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEAD = """# The command line

`glassllama VERB [OPTIONS] [ARGUMENTS]`; `glassllama VERB -h` shows the same as this page.

Results go to stdout; notes, progress bars and errors to stderr. An error is one line. With `--json`
the result is one line of JSON. `python -m glassllama` is the same program.

Exit codes: 0 done, 1 error, 2 wrong usage, 130 Ctrl-C, 141 broken pipe, 143 SIGTERM.
"""


def escaped(text: str) -> str:
    """Help text as the cell of a Markdown table."""
    return text.replace("\\[", "[").replace("|", "\\|").replace("<", "&lt;")


def names(parameter: Any) -> str:
    """`-n, --max-tokens N`"""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`".replace("|", "\\|")
    options = ", ".join(sorted([*parameter.opts, *parameter.secondary_opts], key=len))
    return f"`{options}`" if parameter.is_flag else f"`{options} {parameter.metavar}`"


def default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return escaped(parameter.show_default)
    value = parameter.default
    shown = value not in (None, (), "") and not isinstance(value, bool) and not callable(value)
    return f"`{getattr(value, 'value', value)}`" if shown else ""


def tables(command: Any) -> list[str]:
    """One table for each panel of the help page."""
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        panel = parameter.rich_help_panel or f"{parameter.param_type_name.capitalize()}s"
        row = f"| {names(parameter)} | {escaped(parameter.help or '')} | {default(parameter)} |"
        panels.setdefault(panel, []).append(row)
    return [
        "\n".join([f"| {panel} | | default |", "|---|---|---|", *rows])
        for panel, rows in sorted(panels.items(), key=lambda item: item[0] != "Arguments")
    ]


def page() -> str:
    from typer.main import get_command

    from glassllama.cli.app import app

    group: Any = get_command(app)
    parts = [HEAD, *tables(group)]
    for name, command in group.commands.items():
        parts += [f"## {name}", command.help.replace("<", "&lt;"), *tables(command)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(page(), encoding="utf-8")
