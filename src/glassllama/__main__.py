"""The `glassllama` command, also as `python -m glassllama`."""

from __future__ import annotations

import sys

from glassllama.cli import errors


def main() -> None:
    """Run the command line and leave with its exit code (cli/errors.py)."""
    errors.prepare()
    code = errors.code_of(_run_verb)
    sys.exit(code)


def _run_verb() -> None:
    from glassllama.cli.app import app

    app(prog_name="glassllama")


if __name__ == "__main__":
    main()
