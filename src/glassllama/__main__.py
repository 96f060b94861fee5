"""The `glassllama` command, also as `python -m glassllama`."""

from __future__ import annotations

import sys

from glassllama.cli import errors


def main() -> None:
    """Run the command line and exit with its code (cli/errors.py)."""
    errors.prepare()
    sys.exit(errors.exit_code_of(_run_verb, debug="--debug" in sys.argv))


def _run_verb() -> None:
    from glassllama.cli.app import app

    app(prog_name="glassllama")


if __name__ == "__main__":
    main()
