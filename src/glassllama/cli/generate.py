"""`glassllama generate` and `chat`: continue a text; one answer, or a conversation."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from glassllama.cli.console import is_terminal, note, print_json, prompt_from
from glassllama.cli.options import (
    JSON,
    LOGPROBS,
    SPECIALS,
    BackendOptions,
    ChatOptions,
    ModelOptions,
    SamplingOptions,
    note_specials,
    require_json,
)
from glassllama.cli.render import completion_json, show_stream, speed_line

if TYPE_CHECKING:
    from glassllama.cli.repl import ChatSession

TOUR_QUESTION = "What is photosynthesis?"
TRY_NEXT = """
Three things to try next:
  {program} chat "Write a limerick about llamas"
  {program} next "The capital of France is"
  {program} show smollm2-135m
"""


def generate(
    model_options: ModelOptions,
    backend_options: BackendOptions,
    sampling: SamplingOptions,
    text: str | None = typer.Argument(
        None, metavar="TEXT",
        help="The text to continue. Piped input follows it after a blank line. Without it: the "
        "piped input.",
    ),
    specials: bool = SPECIALS,
    logprobs: int | None = LOGPROBS,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Continue a text. To ask a chat model something, use 'chat'."""
    require_json(json, logprobs)
    prompt = prompt_from(text, "TEXT")
    sampling.options()  # errors in them before the model is loaded
    llm = backend_options.load(model_options)
    options = sampling.with_defaults(llm.sampling_defaults).options(logprobs)
    note_specials(llm.tokenizer, prompt, specials)
    options["specials"] = specials
    if json:
        print_json(completion_json(llm, llm.generate(prompt, **options)))
        return
    completion = show_stream(lambda bar: llm.stream(prompt, progress=bar, **options), [])
    if is_terminal(sys.stdout):
        note(f"\n{speed_line(completion)}")


def chat(
    model_options: ModelOptions,
    backend_options: BackendOptions,
    sampling: ChatOptions,
    message: str | None = typer.Argument(
        None, metavar="MESSAGE",
        help="What to say. Piped input follows it after a blank line: chat 'Summarize:' < FILE. "
        "Without it: a conversation on a terminal, else the piped input.",
    ),
    system: str | None = typer.Option(
        None, "--system", "-s", metavar="TEXT", help="System message."
    ),
    think: bool | None = typer.Option(
        None, "--think/--no-think", metavar="", show_default="as the chat template does it",
        help="Reason before the answer, if the model can do both. Reasoning is shown in a terminal "
        "while it is generated, and is never part of the output; --json has it as "
        "reasoning_content.",
    ),
    image: list[Path] | None = typer.Option(
        None, "--image", metavar="FILE",
        help="A picture for the message, for a model that reads pictures; may be repeated.",
    ),
    tour: bool = typer.Option(
        False, "--tour", help="Start with an example question and suggestions."
    ),
    logprobs: int | None = LOGPROBS,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Ask a chat model something, or have a conversation.

    On a terminal and without MESSAGE this is a conversation: /help lists its commands, Ctrl-C stops
    an answer, Ctrl-D leaves.
    """
    require_json(json, logprobs)
    sampling.options()  # errors in them before the model is loaded
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if message is not None or (not tour and (json or not interactive)):
        message = prompt_from(message, "MESSAGE")
    from glassllama.cli.repl import ChatSession, Conversation, Repl

    llm = backend_options.load(model_options)
    session = ChatSession(llm, Conversation(system=system), sampling, think)
    for path in image or ():
        session.add_image(path)
    if tour:
        show_tour(session)
    if message is not None and json:
        from glassllama.tokenizers.chat import Message

        messages = [*session.conversation.messages, Message("user", session.content(message))]
        options = session.sampling.options(logprobs)
        print_json(completion_json(llm, llm.chat(messages, **options, **session.template)))
    elif message is not None:
        completion = session.ask(message)
        if is_terminal(sys.stdout):
            note(f"\n{speed_line(completion)}")
    elif interactive:
        Repl(session).run()


def show_tour(session: ChatSession) -> None:
    """An example question, always with the same answer, and what to try next."""
    note(f"> {TOUR_QUESTION}")
    sampling = session.sampling
    session.sampling = replace(sampling, temperature=0.0, repetition_penalty=1.0)
    completion = session.ask(TOUR_QUESTION)
    session.sampling = sampling
    program = "glassllama" if shutil.which("glassllama") else os.path.relpath(sys.argv[0])
    if Path(sys.argv[0]).name == "__main__.py":
        program = "python -m glassllama"
    note(f"\n{speed_line(completion)}\n{TRY_NEXT.format(program=program)}")
