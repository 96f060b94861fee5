"""`glassllama chat`: one answer, or a conversation."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassllama.cli.console import is_terminal, note, print_json, prompt_from
from glassllama.cli.options import (
    BackendOptions,
    ChatOptions,
    Json,
    Logprobs,
    ModelOptions,
    require_json,
)
from glassllama.cli.render import completion_json, speed_line

if TYPE_CHECKING:
    from glassllama.cli.session import ChatSession

TOUR_QUESTION = "What is photosynthesis?"
TRY_NEXT = """
Three things to try next:
  {program} chat "Write a limerick about llamas"
  {program} next "The capital of France is"
  {program} show smollm2-135m
"""


def chat(
    model_options: ModelOptions,
    backend_options: BackendOptions,
    sampling: ChatOptions,
    message: Annotated[
        str | None,
        typer.Argument(
            metavar="MESSAGE",
            help="What to say. Piped input follows it after a blank line: chat 'Summarize:' "
            "< FILE. Without it: a conversation on a terminal, else the piped input.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message.")
    ] = None,
    tour: Annotated[
        bool, typer.Option("--tour", help="Start with an example question and suggestions.")
    ] = False,
    logprobs: Logprobs = None,
    json: Json = False,
) -> None:
    """Ask a chat model something, or have a conversation.

    On a terminal and without MESSAGE this is a conversation: /help lists its commands, Ctrl-C stops
    an answer, Ctrl-D leaves.
    """
    require_json(json, logprobs)
    options = sampling.options(logprobs)  # errors in them before the model is loaded
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if message is not None or (not tour and (json or not interactive)):
        message = prompt_from(message, "MESSAGE")
    from glassllama.cli.session import ChatSession, Conversation

    llm = backend_options.load(model_options)
    session = ChatSession(llm, Conversation(system=system), sampling)
    if tour:
        show_tour(session)
    if message is not None and json:
        from glassllama.tokenizers.chat import Message

        messages = [*session.conversation.messages, Message("user", message)]
        print_json(completion_json(llm, llm.chat(messages, **options)))
    elif message is not None:
        completion = session.ask(message)
        if is_terminal(sys.stdout):
            note(f"\n{speed_line(completion)}")
    elif interactive:
        from glassllama.cli.repl import Repl

        Repl(session).run()


def show_tour(session: ChatSession) -> None:
    """An example question, always with the same answer, and what to try next."""
    note(f"> {TOUR_QUESTION}")
    sampling = session.sampling
    session.sampling = replace(sampling, temperature=0.0, repetition_penalty=1.0)
    completion = session.ask(TOUR_QUESTION)
    session.sampling = sampling
    note(f"\n{speed_line(completion)}\n{TRY_NEXT.format(program=program())}")


def program() -> str:
    """How this program can be started again from here."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return "python -m glassllama"
    return "glassllama" if shutil.which("glassllama") else os.path.relpath(started)
