"""`glassllama next`: what the model thinks comes next."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glassllama.base.errors import GlassError
from glassllama.cli.console import (
    MOST_PROMPT,
    is_terminal,
    note,
    print_json,
    print_table,
    text_or_stdin,
)
from glassllama.cli.errors import failed
from glassllama.cli.options import How, Json, Specials, Which, note_specials

if TYPE_CHECKING:
    from glassllama.llm import LLM

WIDEST_BAR = 24  # characters, for probability 1
ROUNDED = (
    "\nrounded as the engine rounds, to be fast; 'next --exact' shows what the walkthrough shows"
)


def next_tokens(
    which: Which,
    how: How,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text so far. Left out: asks for prompts on a terminal, else reads stdin.",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", "-k", min=1, metavar="N", help="Show the N likeliest tokens.")
    ] = 10,
    specials: Specials = False,
    json: Json = False,
) -> None:
    """Show the likeliest next tokens of a text, with their probabilities."""
    asking = prompt is None and is_terminal(sys.stdin) and not json
    if not asking:
        prompt = text_or_stdin(prompt, "PROMPT", MOST_PROMPT)
    llm = how.load(which)
    if prompt is None:
        ask_on(llm, top, specials)
        return
    show_next(llm, prompt, top, json, specials)
    if llm.backend == "engine" and not how.exact and not json:
        note(ROUNDED)


def ask_on(llm: LLM, top: int, specials: bool) -> None:
    """One prompt after the other, until Ctrl-D."""
    from glassllama.cli.history import line_editing

    note("write the beginning of a text; Ctrl-D leaves")
    with line_editing():
        while True:
            try:
                show_next(llm, input("text> "), top, False, specials)
            except GlassError as error:
                failed(str(error))
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
    rows = [
        (f"{t['probability']:.1%}", bar(t["probability"]), repr(t["piece"]), t["id"])
        for t in tokens
    ]
    print_table(["probability>", "", "token", "id>"], rows)
    if prompt.endswith(" "):
        note("\nthe text ends with a blank, but tokens bring their own: try it without")


def bar(probability: float) -> str:
    return "█" * round(probability * WIDEST_BAR)
