"""`glassllama generate`: continue a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from glassllama.cli.console import is_terminal, note, print_json, prompt_from
from glassllama.cli.options import (
    BackendOptions,
    Json,
    Logprobs,
    ModelOptions,
    SamplingOptions,
    Specials,
    note_specials,
    require_json,
)
from glassllama.cli.render import completion_json, show_stream, speed_line


def generate(
    model_options: ModelOptions,
    backend_options: BackendOptions,
    sampling: SamplingOptions,
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="The text to continue. Piped input follows it after a blank line. Without it: "
            "the piped input.",
        ),
    ] = None,
    specials: Specials = False,
    logprobs: Logprobs = None,
    json: Json = False,
) -> None:
    """Continue a text. To ask a chat model something, use 'chat'."""
    require_json(json, logprobs)
    prompt = prompt_from(text, "TEXT")
    options = sampling.options(logprobs)
    llm = backend_options.load(model_options)
    note_specials(llm.tokenizer, prompt, specials)
    options["specials"] = specials
    if json:
        print_json(completion_json(llm, llm.generate(prompt, **options)))
        return
    completion = show_stream(lambda bar: llm.stream(prompt, progress=bar, **options), [])
    if is_terminal(sys.stdout):
        note(f"\n{speed_line(completion)}")
