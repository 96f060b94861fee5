"""The command line, as forks of a process that has imported what most verbs import: forks.py."""

import sys

import glassllama.cli.app
import glassllama.engine.executor  # noqa: F401
from forks import serve
from glassllama.__main__ import main


def run(arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    main()


serve(run)
