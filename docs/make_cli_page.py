"""Write docs/cli.md: the help page of every verb.

python docs/make_cli_page.py          (a test fails while the page is stale)
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = """# The command line

Answers go to stdout; notes, progress and errors to stderr, errors as one line. With `--json` the
answer is one line of JSON. Exit codes: 0 success, 1 error, 2 wrong usage, 130 Ctrl-C, 141 closed
output pipe, 143 SIGTERM. `python -m glassllama` is the same program.
"""


def help_page(*verb: str) -> str:
    """What `glassllama VERB --help` prints into a pipe 80 columns wide."""
    from glassllama.cli.app import app

    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        app([*verb, "--help"], prog_name="glassllama")
    return printed.getvalue()


def page() -> str:
    from glassllama.cli.app import app

    os.environ["COLUMNS"] = "80"
    verbs = [str(command.name) for command in app.registered_commands]
    parts = [HEAD, f"```text\n{help_page()}```\n"]
    parts += [f"## {verb}\n\n```text\n{help_page(verb)}```\n" for verb in verbs]
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(page(), encoding="utf-8")
