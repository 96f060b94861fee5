"""`glassllama chat`: one answer, or a conversation."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassllama.cli.console import is_terminal, note, print_json, text_and_stdin
from glassllama.cli.options import ChatOptions, How, Json, Logprobs, Which, require_json
from glassllama.cli.render import as_object, speed_line

if TYPE_CHECKING:
    from glassllama.cli.session import Talk

TOUR_QUESTION = "What is photosynthesis?"
TRY_NEXT = """
Three things to try next:
  {program} chat "Write a limerick about llamas"
  {program} next "The capital of France is"
  {program} show smollm2-135m
"""


def chat(
    which: Which,
    how: How,
    sampling: ChatOptions,
    message: Annotated[
        str | None,
        typer.Argument(
            metavar="MESSAGE",
            help="What to say. What is piped in follows it after a blank line: chat 'Sum this up:' "
            "< FILE. Left out: a conversation on a terminal, else what is piped in.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", "-s", metavar="TEXT", help="Tell the model first how to behave."),
    ] = None,
    tour: Annotated[
        bool,
        typer.Option("--tour", help="Begin with a question of ours, and say what to try next."),
    ] = False,
    logprobs: Logprobs = None,
    json: Json = False,
) -> None:
    """Ask a chat model something, or talk with it.

    On a terminal and without MESSAGE this is a conversation: /help lists its commands, Ctrl-C stops
    an answer, Ctrl-D leaves.
    """
    require_json(json, logprobs)
    sampling.options(logprobs)  # what is wrong with them is said before anything is loaded
    alive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if message is not None or (not tour and (json or not alive)):
        message = text_and_stdin(message, "MESSAGE")
    from glassllama.cli.conversation import Conversation
    from glassllama.cli.session import Talk

    talk = Talk(how.load(which), Conversation(system=system), sampling)
    if tour:
        show_tour(talk)
    if message is not None:
        say_once(talk, message, json, logprobs)
    elif alive:
        from glassllama.cli.repl import Repl

        Repl(talk).run()


def say_once(talk: Talk, message: str, json: bool, logprobs: int | None) -> None:
    if json:
        from glassllama.tokenizers.chat import Message

        talk.conversation.turns.append(Message("user", message))
        completion = talk.llm.chat(talk.conversation.messages, **talk.sampling.options(logprobs))
        print_json(as_object(talk.llm, completion))
        return
    completion = talk.ask(message)
    if is_terminal(sys.stdout):
        note(f"\n{speed_line(completion)}")


def show_tour(talk: Talk) -> None:
    """One question of ours, always with the same answer, and what to try next."""
    note(f"> {TOUR_QUESTION}")
    chosen = talk.sampling
    talk.sampling = replace(chosen, temperature=0.0, repetition_penalty=1.0)
    completion = talk.ask(TOUR_QUESTION)
    talk.sampling = chosen
    note(f"\n{speed_line(completion)}\n{TRY_NEXT.format(program=program())}")


def program() -> str:
    """What to type to start this program again from here."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return "python -m glassllama"
    return "glassllama" if shutil.which("glassllama") else os.path.relpath(started)
