"""The interactive chat on a terminal: reads lines, runs /commands, prints answers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from glassllama.base.errors import GlassError, UntrustedError
from glassllama.base.trust import make_folder
from glassllama.cli.console import note
from glassllama.cli.errors import print_error, user_message
from glassllama.cli.options import SamplingOptions
from glassllama.cli.render import speed_line
from glassllama.cli.session import ChatSession, Conversation

PROMPT, MORE, QUOTES = "> ", ". ", '"""'
WELCOME = "{name}: type a message, or /help; Ctrl-D leaves"
HELP = """\
/set                 show the options of answers
/set OPTION VALUE    change one: /set temperature 0.2, or /set seed none
/system              show what the model reads first: system message, text of the template
/system TEXT         replace the system message
/show                show the model and how full its context is
/save FILE           save this conversation
/load FILE           continue a saved one
/clear               delete the conversation
/bye                 leave; so does Ctrl-D
\"\"\"                  begins and ends a message of several lines
Ctrl-C               stops an answer; at the prompt, twice leaves
up, down             earlier lines"""
HISTORY_LINES = 1000
PRIVATE = 0o600  # mode of the history file
SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


class Leave(Exception):
    """Ends the conversation."""


class Repl:
    """Reads and answers until /bye, Ctrl-D, or Ctrl-C twice at the prompt (KeyboardInterrupt)."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP),
            "/set": self.set,
            "/system": self.system,
            "/show": self.show,
            "/save": self.save,
            "/load": self.load,
            "/clear": self.clear,
            "/bye": self.bye,
        }

    def run(self) -> None:
        note(WELCOME.format(name=self.session.llm.name))
        note(f"({limits(self.session.sampling)})")
        with line_editing():
            try:
                while True:
                    self.handle(self.read())
            except (EOFError, Leave):
                print()

    def read(self) -> str:
        """The next message or command. KeyboardInterrupt when Ctrl-C is pressed twice."""
        try:
            return read_message()
        except KeyboardInterrupt:
            note("\n(Ctrl-C again leaves, and so does Ctrl-D)")
        return read_message()

    def handle(self, text: str) -> None:
        """Answer a message or run a command; errors are printed."""
        try:
            if text.startswith("/"):
                self.run_command(*text.split(maxsplit=1))
            elif text.strip():
                note("\n" + speed_line(self.session.ask(text)) + "\n")
        except KeyboardInterrupt:
            note("(stopped)\n")
        except Exception as error:
            if (message := user_message(error)) is None:
                raise
            print_error(message)

    def run_command(self, name: str, argument: str = "") -> None:
        if name not in self.commands:
            raise GlassError(f"{name} is not a command; there are {' '.join(self.commands)}")
        self.commands[name](argument.strip())

    def set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        names = [require_option(name)] if name else option_names()
        if value:
            self.session.sampling = with_option(self.session.sampling, names[0], value.strip())
        for name in names:
            print(f"{name:<20} {as_typed(getattr(self.session.sampling, name))}")

    def system(self, text: str) -> None:
        conversation = self.session.conversation
        if text:
            conversation.system = text.strip('"')
        print(as_typed(conversation.system))
        before = self.session.text_before_first_message()
        if before not in ("", conversation.system):
            print(f"as the model's chat template writes it: {before}")

    def show(self, _: str) -> None:
        session, messages = self.session, self.session.conversation.messages
        print(f"model      {session.llm.name} ({session.llm.backend}), {session.llm.path}")
        print(f"messages   {len(messages)}")
        used = session.count(messages) if messages else 0
        print(f"context    {used:,} of {session.context:,} tokens")

    def save(self, file: str) -> None:
        path = expanded(file, "/save FILE")
        self.session.conversation.save(path)
        print(f"{len(self.session.conversation.messages)} messages in {path}")

    def load(self, file: str) -> None:
        path = expanded(file, "/load FILE")
        self.session.conversation = Conversation.load(path)
        print(f"{len(self.session.conversation.messages)} messages from {path}")

    def clear(self, _: str) -> None:
        self.session.conversation.history.clear()
        print("deleted; the system message stays")

    def bye(self, _: str) -> None:
        raise Leave


def read_message() -> str:
    """One line, or several between triple quotes. Raises EOFError at Ctrl-D."""
    text = input(PROMPT)
    if not text.lstrip().startswith(QUOTES):
        return text
    text = text.lstrip().removeprefix(QUOTES)
    while QUOTES not in text:
        text += "\n" + input(MORE)
    return text[: text.index(QUOTES)].strip("\n")


def expanded(file: str, usage: str) -> Path:
    """A typed path with ~ expanded; ~NAME of an unknown user stays as it is."""
    if not file:
        raise GlassError(f"the file is missing: {usage}")
    return Path(os.path.expanduser(file))


@contextmanager
def line_editing() -> Iterator[None]:
    """While the body runs, input() edits lines and keeps a history on disk (with readline)."""
    try:
        import readline
    except ImportError:  # Windows: its console edits lines
        yield
        return
    from glassllama.base.machine import cache_home

    path = cache_home() / "history"
    readline.set_history_length(HISTORY_LINES)
    try:
        make_folder(path.parent)
        path.touch(mode=PRIVATE)
        readline.read_history_file(path)
    except (OSError, UntrustedError) as error:
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
        note(f"(no history is kept: {reason})")
        yield
        return
    try:
        yield
    finally:
        readline.write_history_file(path)


# --- /set -----------------------------------------------------------------------------------------


def limits(sampling: SamplingOptions) -> str:
    """The options that keep an answer from going on forever."""
    most, penalty = sampling.max_tokens, sampling.repetition_penalty
    length = "without limit" if most is None else f"of at most {most:,} tokens"
    return f"answers {length}, repetition penalty {penalty:g}; /set shows and changes this"


def option_names() -> list[str]:
    return [field.name for field in fields(SamplingOptions)]


def require_option(name: str) -> str:
    """`name` as a field of SamplingOptions. Raises GlassError."""
    name = name.replace("-", "_")
    if name not in option_names():
        raise GlassError(f"{name} is not an option; there are {' '.join(option_names())}")
    return name


def with_option(sampling: SamplingOptions, name: str, typed: str) -> SamplingOptions:
    """`sampling` with one option changed. Raises GlassError for unknown names and bad values."""
    kind = get_type_hints(SamplingOptions)[require_option(name)]
    new = replace(sampling, **{name: read_value(name, kind, typed)})
    new.check()
    return new


def read_value(name: str, kind: Any, typed: str) -> Any:
    """The typed text as a value of type `kind`."""
    kinds = get_args(kind) if NoneType in get_args(kind) else (kind,)
    if typed == "none" and NoneType in kinds:
        return None
    kind, expected = kinds[0], "a number"
    try:
        if get_origin(kind) is Literal:
            expected = " or ".join(get_args(kind))
            return {choice: choice for choice in get_args(kind)}[typed]
        if kind is bool:
            expected = "on or off"
            return SWITCH[typed.lower()]
        if kind == list[str]:
            expected = "texts, in quotes if they contain spaces"
            return shlex.split(typed) or [typed]
        if kind is int:
            expected = "a whole number"
            return int(typed)
        return float(typed)
    except (ValueError, KeyError):
        raise GlassError(f"{name}: expected {expected}, got {typed or 'nothing'}") from None


def as_typed(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return shlex.join(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
