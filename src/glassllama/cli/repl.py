"""The interactive chat: a conversation with a model, /commands, and line editing."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from glassllama.base.errors import GlassError, TokenizerError, UntrustedError
from glassllama.base.trust import make_folder
from glassllama.cli.console import note, write_file
from glassllama.cli.errors import print_error, user_message
from glassllama.cli.options import THINKING_TOKENS, SamplingOptions
from glassllama.cli.render import show_stream, speed_line, wrapped
from glassllama.tokenizers.chat import Message, checked_messages
from glassllama.tokenizers.reasoning import Piece

if TYPE_CHECKING:
    from glassllama.llm import LLM, Completion, TemplateOptions

MARK = " 4f1c9a"  # makes messages that occur nowhere else
ANSWER_SHARE = 4  # a quarter of the context stays free for the answer
PROMPT, MORE, QUOTES = "> ", ". ", '"""'
WELCOME = "{name}: type a message, or /help; Ctrl-D leaves"
HELP = """\
/set                 show the options of answers
/set OPTION VALUE    change one: /set temperature 0.2, or /set seed none
/system              show what the model reads first: system message, text of the template
/system TEXT         replace the system message
/think, /nothink     turn reasoning before an answer on or off
/reasoning           show the reasoning of the last answer
/show                show the model and how full its context is
/image FILE          show a picture with the next message
/save FILE           save this conversation
/load FILE           continue a saved one
/clear               delete the conversation
/bye                 leave; so does Ctrl-D
\"\"\"                  begins and ends a message of several lines
Ctrl-C               stops an answer; at the prompt, twice leaves
up, down             earlier lines"""
HISTORY_LINES = 1000
PRIVATE = 0o600  # mode of the history file
OPTION_NAMES = [each.name for each in fields(SamplingOptions)]
SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


@dataclass
class Conversation:
    """An optional system message and the messages of user and assistant, oldest first."""

    system: str | None = None
    history: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        first = [] if self.system is None else [Message("system", self.system)]
        return first + self.history

    def shorten(self, count: Callable[[Sequence[Message]], int], max_tokens: int) -> int:
        """Drop the oldest messages until `count(messages)` <= `max_tokens` -> number dropped.

        The system message and the last message stay; after the system message comes a user's.
        """
        before = len(self.history)
        while len(self.history) > 1 and count(self.messages) > max_tokens:
            del self.history[0]
            while len(self.history) > 1 and self.history[0].role != "user":
                del self.history[0]
        return before - len(self.history)

    def save(self, path: Path) -> None:
        """Write the messages as JSON, in the form of chat APIs."""
        messages = [message.to_dict() for message in self.messages]
        write_file(path, json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote. Raises GlassError with the file and the message."""
        if path.exists() and not path.is_file():
            raise GlassError(f"{path}: is not a regular file")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise GlassError(f"{path}: not a saved conversation ({error})") from None
        entries = document.get("messages") if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise GlassError(f"{path}: not a saved conversation (no list 'messages')")
        try:
            messages = checked_messages(entries) if entries else []
        except GlassError as error:
            raise GlassError(f"{path}: {error}") from None
        system = [m.text for m in messages if m.role == "system"]
        history = [m for m in messages if m.role != "system"]
        return cls(system=system[0] if system else None, history=history)


@dataclass
class ChatSession:
    """A model, a conversation, and the options for its answers."""

    llm: LLM
    conversation: Conversation
    sampling: SamplingOptions
    think: bool | None = None  # None: as the chat template does it
    images: list[Path] = field(default_factory=list)  # shown with the next message

    def __post_init__(self) -> None:
        defaults = {**self.llm.sampling_defaults}
        if self.think is not False and self.llm.chat_format.reasoning_marks(self.llm.tokenizer):
            defaults["max_tokens"] = THINKING_TOKENS
        self.sampling = self.sampling.with_defaults(defaults)

    @property
    def template(self) -> TemplateOptions:
        """Options of the chat template."""
        return {} if self.think is None else {"enable_thinking": self.think}

    def ask(self, question: str) -> Completion:
        """Print the answer while it is generated; add both to the conversation.

        Of an answer that Ctrl-C stops, the printed part is kept; a question without an answer is
        removed.
        """
        history, shown = self.conversation.history, list[Piece]()
        history.append(Message("user", self.content(question)))
        self._shorten()
        try:
            messages, options = self.conversation.messages, self.sampling.options()
            template = self.template
            return show_stream(
                lambda bar: self.llm.stream_chat(messages, progress=bar, **options, **template),
                shown,
            )
        finally:
            answer = "".join(text for kind, text in shown if kind == "content")
            reasoning = "".join(text for kind, text in shown if kind != "content")
            if answer:
                history.append(Message("assistant", answer, reasoning or None))
            else:
                history.pop()

    def add_image(self, path: Path) -> int:
        """Show a picture with the next message -> the tokens that it takes. Raises GlassError."""
        count = len(self.llm.images.read(path).rows)
        self.images.append(path)
        return count

    def content(self, question: str) -> Any:
        """A message's content: the text, after the pictures that wait."""
        if not self.images:
            return question
        parts = [{"type": "image", "path": str(path)} for path in self.images]
        self.images.clear()
        return [*parts, {"type": "text", "text": question}]

    @property
    def context(self) -> int:
        """Maximum tokens of the conversation and its next answer."""
        return self.llm.executor.config.max_seq_len

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the messages, as the model reads them."""
        return len(self.llm.encode_chat(messages, **self.template))

    def text_before_first_message(self) -> str:
        """What the model reads before the first message, without control tokens.

        That is the system message, and what the chat template puts before, around or in place of
        it. Found by encoding a conversation of two questions: the text before the first that is not
        before the second belongs to the conversation, not to a message.
        """
        roles = ("user", "assistant", "user")
        contents = [f"{role}{MARK}" for role in roles]
        sample = replace(self.conversation, history=[*map(Message, roles, contents)])
        try:
            ids = self.llm.encode_chat(sample.messages, **self.template)
        except TokenizerError:
            return ""  # the template does not accept this conversation
        text = self.llm.tokenizer.decode(ids)
        before, _, rest = text.partition(contents[0])
        between = rest.partition(contents[1])[2].partition(contents[2])[0]
        while before and between and before[-1] == between[-1]:
            before, between = before[:-1], between[:-1]
        for control in sorted(self.llm.tokenizer.specials, key=len, reverse=True):
            before = before.replace(control, "")
        return before.strip().removeprefix("system").strip()

    def _shorten(self) -> None:
        answer = min(self.sampling.max_tokens or self.context, self.context // ANSWER_SHARE)
        dropped = self.conversation.shorten(self.count, self.context - answer)
        if dropped:
            note(
                f"(the context of {self.context:,} tokens is full: the oldest {dropped} messages "
                "were dropped)"
            )


# --- reading lines and commands -------------------------------------------------------------------


class Leave(Exception):
    """Ends the conversation."""


class Repl:
    """Reads and answers until /bye, Ctrl-D, or Ctrl-C twice at the prompt (KeyboardInterrupt)."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        names = "help set system think nothink reasoning show image save load clear bye".split()
        self.commands: dict[str, Callable[[str], None]] = {f"/{n}": getattr(self, n) for n in names}

    def run(self) -> None:
        note(WELCOME.format(name=self.session.llm.name))
        note(f"({limits(self.session.sampling)})")
        if recommended := str(self.session.llm.checkpoint.sampling_defaults):
            note(f"(defaults of this model: {recommended})")
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

    def help(self, _: str) -> None:
        print(HELP)

    def set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        names = [require_option(name)] if name else OPTION_NAMES
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

    def think(self, _: str) -> None:
        self.set_thinking(True)

    def nothink(self, _: str) -> None:
        self.set_thinking(False)

    def set_thinking(self, think: bool) -> None:
        if self.session.llm.chat_format.thinking_switch is None:
            raise GlassError("the chat template of this model has no switch for reasoning")
        self.session.think = think
        print(f"reasoning before answers: {as_typed(think)}")

    def reasoning(self, _: str) -> None:
        answers = [m for m in self.session.conversation.history if m.role == "assistant"]
        text = answers[-1].reasoning_content if answers else None
        print(wrapped(text or "(the last answer has none)", sys.stdout))

    def show(self, _: str) -> None:
        session, messages = self.session, self.session.conversation.messages
        print(f"model      {session.llm.name} ({session.llm.backend}), {session.llm.path}")
        print(f"messages   {len(messages)}")
        used = session.count(messages) if messages else 0
        print(f"context    {used:,} of {session.context:,} tokens")

    def image(self, file: str) -> None:
        path = expanded(file, "/image FILE")
        print(f"{path}: {self.session.add_image(path)} tokens, shown with the next message")

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


def require_option(name: str) -> str:
    """`name` as a field of SamplingOptions. Raises GlassError."""
    name = name.replace("-", "_")
    if name not in OPTION_NAMES:
        raise GlassError(f"{name} is not an option; there are {' '.join(OPTION_NAMES)}")
    return name


def with_option(sampling: SamplingOptions, name: str, typed: str) -> SamplingOptions:
    """`sampling` with one option changed. Raises GlassError for unknown names and bad values."""
    kind = get_type_hints(SamplingOptions)[require_option(name)]
    new = replace(sampling, **{name: read_value(name, kind, typed)})
    new.check()
    return new


READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("on or off", lambda typed: SWITCH[typed.lower()]),
    int: ("a whole number", int),
    float: ("a number", float),
    list[str]: ("texts, in quotes if they contain spaces", lambda t: shlex.split(t) or [t]),
}


def read_value(name: str, kind: Any, typed: str) -> Any:
    """The typed text as a value of type `kind`."""
    kinds = get_args(kind) if NoneType in get_args(kind) else (kind,)
    if typed == "none" and NoneType in kinds:
        return None
    words = get_args(kinds[0]) if get_origin(kinds[0]) is Literal else ()
    choices = (" or ".join(words), {word: word for word in words}.__getitem__)
    expected, read = choices if words else READERS[kinds[0]]
    try:
        return read(typed)
    except (ValueError, KeyError):
        raise GlassError(f"{name}: expected {expected}, got {typed or 'nothing'}") from None


def as_typed(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return shlex.join(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
