"""A chat's messages: kept, cut to the context, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glassllama.base.errors import GlassError
from glassllama.cli.files import write_file
from glassllama.tokenizers.chat import Message, checked_messages

Count = Callable[[Sequence[Message]], int]


@dataclass
class Conversation:
    """An optional system message, then turns of user and assistant, oldest first."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        opening = [] if self.system is None else [Message("system", self.system)]
        return opening + self.turns

    def shorten(self, count: Count, room: int) -> int:
        """Drop the oldest turns until `count(messages)` ids fit into `room` -> turns dropped.

        The system message and the last turn always stay. What is left begins with the user.
        """
        dropped = 0
        while len(self.turns) > 1 and count(self.messages) > room:
            del self.turns[0]
            dropped += 1
            while len(self.turns) > 1 and self.turns[0].role != "user":
                del self.turns[0]
                dropped += 1
        return dropped

    def save(self, path: Path) -> None:
        """Write the messages as JSON, in the form chat APIs take them."""
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        text = json.dumps({"messages": messages}, ensure_ascii=False, indent=1)
        write_file(path, text + "\n")

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """What `save` wrote. Raises GlassError that names the file and the message."""
        if path.exists() and not path.is_file():
            raise GlassError(f"{path}: is not a regular file")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise GlassError(f"{path}: no saved conversation ({error})") from None
        listed = document.get("messages") if isinstance(document, dict) else None
        if not isinstance(listed, list):
            raise GlassError(f"{path}: no saved conversation (a list 'messages' is missing)")
        try:
            messages = checked_messages(listed) if listed else []
        except GlassError as error:
            raise GlassError(f"{path}: {error}") from None
        system = [m.content for m in messages if m.role == "system"]
        turns = [m for m in messages if m.role != "system"]
        return cls(system=system[0] if system else None, turns=turns)
