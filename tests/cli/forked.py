"""The command line in forks of a process that has already imported most modules: see forks.py."""

import sys

import typer.rich_utils  # noqa: F401

import glassllama.cli.app
import glassllama.hub
import glassllama.llm
import glassllama.weights.pack
import glassllama.weights.tokenizer  # noqa: F401
from forks import serve
from glassllama.__main__ import main


def run(arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    main()


serve(run)
