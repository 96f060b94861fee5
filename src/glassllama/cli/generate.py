"""`glassllama generate`: continue a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from glassllama.cli.console import is_terminal, note, print_json, text_and_stdin
from glassllama.cli.options import (
    How,
    Json,
    Logprobs,
    SamplingOptions,
    Specials,
    Which,
    note_specials,
    require_json,
)
from glassllama.cli.render import as_object, show_stream, speed_line


def generate(
    which: Which,
    how: How,
    sampling: SamplingOptions,
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="The text to go on from. What is piped in follows it after a blank line. Left "
            "out: what is piped in.",
        ),
    ] = None,
    specials: Specials = False,
    logprobs: Logprobs = None,
    json: Json = False,
) -> None:
    """Continue a text, as the model would. To ask a chat model something, use 'chat'."""
    require_json(json, logprobs)
    prompt = text_and_stdin(text, "TEXT")
    options = sampling.options(logprobs)
    llm = how.load(which)
    note_specials(llm.tokenizer, prompt, specials)
    options["specials"] = specials
    if json:
        print_json(as_object(llm, llm.generate(prompt, **options)))
        return
    completion = show_stream(lambda bar: llm.stream(prompt, progress=bar, **options), [])
    if is_terminal(sys.stdout):
        note(f"\n{speed_line(completion)}")
