"""`glassllama next`: the most likely next tokens of a text."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glassllama.base.errors import GlassError
from glassllama.cli.console import (
    MAX_PROMPT_BYTES,
    is_terminal,
    note,
    print_json,
    print_table,
    text_or_stdin,
)
from glassllama.cli.errors import print_error
from glassllama.cli.options import BackendOptions, Json, ModelOptions, Specials, note_specials

if TYPE_CHECKING:
    from glassllama.llm import LLM

BAR_WIDTH = 24  # characters for probability 1
ROUNDED = "\nThe engine rounds activations to be fast; 'next --exact' shows exact probabilities."


def next_tokens(
    model_options: ModelOptions,
    backend_options: BackendOptions,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text. Without it: asks for texts on a terminal, else reads stdin.",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", "-k", min=1, metavar="N", help="Show N tokens.")
    ] = 10,
    specials: Specials = False,
    json: Json = False,
) -> None:
    """Show the most likely next tokens of a text, with their probabilities."""
    interactive = prompt is None and is_terminal(sys.stdin) and not json
    if not interactive:
        prompt = text_or_stdin(prompt, "PROMPT", MAX_PROMPT_BYTES)
    llm = backend_options.load(model_options)
    if prompt is None:
        ask_repeatedly(llm, top, specials)
        return
    show_next(llm, prompt, top, json, specials)
    if llm.backend == "engine" and not backend_options.exact and not json:
        note(ROUNDED)


def ask_repeatedly(llm: LLM, top: int, specials: bool) -> None:
    """One text after the other, until Ctrl-D."""
    from glassllama.cli.repl import line_editing

    note("type the beginning of a text; Ctrl-D leaves")
    with line_editing():
        while True:
            try:
                show_next(llm, input("text> "), top, False, specials)
            except GlassError as error:
                print_error(str(error))
            except EOFError:
                print()
                return


def show_next(llm: LLM, prompt: str, top: int, json: bool, specials: bool) -> None:
    note_specials(llm.tokenizer, prompt, specials)
    completion = llm.generate(prompt, max_tokens=1, logprobs=top, specials=specials)
    assert completion.logprobs is not None
    tokens: list[dict[str, Any]] = [
        {
            "id": token.id,
            "piece": llm.tokenizer.token_bytes(token.id).decode("utf-8", errors="replace"),
            "probability": math.exp(token.logprob),
        }
        for token in completion.logprobs[0].top
    ]
    if json:
        print_json({"model": llm.name, "prompt_ids": completion.prompt_ids, "next": tokens})
        return
    bars = ["█" * round(t["probability"] * BAR_WIDTH) for t in tokens]
    rows = [
        (f"{t['probability']:.1%}", bar, repr(t["piece"]), t["id"])
        for t, bar in zip(tokens, bars, strict=True)
    ]
    print_table(["probability>", "", "token", "id>"], rows)
    if prompt.endswith(" "):
        note("\nThe text ends with a space, but tokens begin with one: try it without.")
