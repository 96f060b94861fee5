"""A conversation with a model: its messages, and asking within it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glassllama.base.errors import GlassError, TokenizerError
from glassllama.cli.console import note, write_file
from glassllama.cli.options import SamplingOptions
from glassllama.cli.render import show_stream
from glassllama.tokenizers.chat import Message, checked_messages

if TYPE_CHECKING:
    from glassllama.llm import LLM, Completion

MARK = " 4f1c9a"  # makes messages that occur nowhere else
ANSWER_SHARE = 4  # a quarter of the context stays free for the answer


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
        dropped = 0
        while len(self.history) > 1 and count(self.messages) > max_tokens:
            del self.history[0]
            dropped += 1
            while len(self.history) > 1 and self.history[0].role != "user":
                del self.history[0]
                dropped += 1
        return dropped

    def save(self, path: Path) -> None:
        """Write the messages as JSON, in the form of chat APIs."""
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
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
        system = [m.content for m in messages if m.role == "system"]
        history = [m for m in messages if m.role != "system"]
        return cls(system=system[0] if system else None, history=history)


@dataclass
class ChatSession:
    """A model, a conversation, and the options for its answers."""

    llm: LLM
    conversation: Conversation
    sampling: SamplingOptions

    def ask(self, question: str) -> Completion:
        """Print the answer while it is generated; add both to the conversation.

        Of an answer that Ctrl-C stops, the printed part is kept; a question without an answer is
        removed.
        """
        history, shown = self.conversation.history, list[str]()
        history.append(Message("user", question))
        self._shorten()
        try:
            messages, options = self.conversation.messages, self.sampling.options()
            return show_stream(
                lambda bar: self.llm.stream_chat(messages, progress=bar, **options), shown
            )
        finally:
            if shown:
                history.append(Message("assistant", "".join(shown)))
            else:
                history.pop()

    @property
    def context(self) -> int:
        """Maximum tokens of the conversation and its next answer."""
        return self.llm.executor.config.max_seq_len

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the messages, as the model reads them."""
        return len(self.llm.encode_chat(messages))

    def text_before_first_message(self) -> str:
        """What the model reads before the first message, without control tokens.

        That is the system message, and what the chat template puts before, around or in place of
        it. Found by encoding a conversation of two questions: the text before the first that is not
        before the second belongs to the conversation, not to a message.
        """
        system = self.conversation.system
        first = [] if system is None else [Message("system", system)]
        contents = [f"{role}{MARK}" for role in ("user", "assistant", "user")]
        roles = ("user", "assistant", "user")
        try:
            ids = self.llm.encode_chat([*first, *map(Message, roles, contents)])
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
