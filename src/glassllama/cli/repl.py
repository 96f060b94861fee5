"""The conversation on a terminal: reads lines, obeys /commands, shows answers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from glassllama.base.errors import GlassError
from glassllama.cli.console import note
from glassllama.cli.conversation import Conversation
from glassllama.cli.errors import failed, foreseen
from glassllama.cli.history import line_editing
from glassllama.cli.render import speed_line
from glassllama.cli.session import Talk
from glassllama.cli.settings import changed, known, option_names

PROMPT, MORE, QUOTES = "> ", ". ", '"""'
WELCOME = "{name}: write something, or /help; Ctrl-D leaves"
HELP = """\
/set                 show how answers are chosen
/set OPTION VALUE    change it: /set temperature 0.2, or /set seed none
/system              show what the model reads first: your system message, the template's text
/system TEXT         tell it something else
/show                show the model and how full its context is
/save FILE           keep this conversation
/load FILE           go on with one that was kept
/clear               forget what was said
/bye                 leave; so does Ctrl-D
\"\"\"                  begins and ends a message of several lines
Ctrl-C               stops an answer; at the prompt, twice leaves
up, down             earlier lines"""


class Leave(Exception):
    """The user is done."""


class Repl:
    """Reads, answers, until /bye, Ctrl-D, or Ctrl-C twice at the prompt (KeyboardInterrupt)."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
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
        note(f"{WELCOME.format(name=self.talk.llm.name)}\n({self.talk.limits()})")
        with line_editing():
            try:
                while True:
                    self.obey(self.read())
            except (EOFError, Leave):
                print()

    def read(self) -> str:
        """The next message or command. KeyboardInterrupt when Ctrl-C is pressed twice."""
        try:
            return read_message()
        except KeyboardInterrupt:
            note("\n(Ctrl-C again leaves, and so does Ctrl-D)")
        return read_message()

    def obey(self, text: str) -> None:
        """One message or command; what goes wrong is said, and the conversation goes on."""
        try:
            if text.startswith("/"):
                self.command(*text.split(maxsplit=1))
            elif text.strip():
                note("\n" + speed_line(self.talk.ask(text)) + "\n")
        except KeyboardInterrupt:
            note("(stopped)\n")
        except Exception as error:
            if (line := foreseen(error)) is None:
                raise
            failed(line)

    def command(self, name: str, argument: str = "") -> None:
        if name not in self.commands:
            raise GlassError(f"{name} is no command; have {' '.join(self.commands)}")
        self.commands[name](argument.strip())

    def set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        names = [name.replace("-", "_")] if name else option_names()
        if value:
            self.talk.sampling = changed(self.talk.sampling, names[0], value.strip())
        for name in names:
            print(f"{name:<20} {shown(getattr(self.talk.sampling, known(name)))}")

    def system(self, text: str) -> None:
        if text:
            self.talk.conversation.system = text.strip('"')
        print(shown(self.talk.conversation.system))
        opening = self.talk.text_before_first_message()
        if opening not in ("", self.talk.conversation.system):
            print(f"as the model's chat template writes it: {opening}")

    def show(self, _: str) -> None:
        llm, conversation = self.talk.llm, self.talk.conversation
        used = self.talk.count(conversation.messages) if conversation.messages else 0
        print(f"model      {llm.name} ({llm.backend}), {llm.path}")
        print(f"messages   {len(conversation.messages)}")
        print(f"context    {used:,} of {self.talk.context:,} tokens")

    def save(self, file: str) -> None:
        path = named_path(file, "/save FILE")
        self.talk.conversation.save(path)
        print(f"{len(self.talk.conversation.messages)} messages in {path}")

    def load(self, file: str) -> None:
        path = named_path(file, "/load FILE")
        self.talk.conversation = Conversation.load(path)
        print(f"{len(self.talk.conversation.messages)} messages from {path}")

    def clear(self, _: str) -> None:
        self.talk.conversation.turns.clear()
        print("forgotten; the system message stays")

    def bye(self, _: str) -> None:
        raise Leave


def read_message() -> str:
    """One line, or what stands between two times three quotes. Raises EOFError at Ctrl-D."""
    text = input(PROMPT)
    if not text.lstrip().startswith(QUOTES):
        return text
    text = text.lstrip().removeprefix(QUOTES)
    while QUOTES not in text:
        text += "\n" + input(MORE)
    return text[: text.index(QUOTES)].strip("\n")


def named_path(file: str, usage: str) -> Path:
    """The path that was typed, with ~ expanded; ~NAME of an unknown user is left as it is."""
    return Path(os.path.expanduser(required(file, usage)))


def required(value: str, usage: str) -> str:
    if not value:
        raise GlassError(f"which one? {usage}")
    return value


def shown(value: object) -> str:
    """A setting as one would type it."""
    if isinstance(value, list):
        return shlex.join(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
