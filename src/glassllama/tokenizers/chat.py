"""Messages → ids: what a chat model was trained to see around every turn.

Control tokens come from the format alone. The text of a message is always encoded as plain text, so
that `<|eot_id|>` typed by a user is a few characters of prose and never the end of a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user, assistant or tool (the answer of a tool)."""

    role: str
    content: str


class ChatFormat(Protocol):
    """A model family's way of writing a conversation."""

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of the conversation, ready for the model to write the next answer.

        Raises TokenizerError for messages, or a vocabulary, that this format cannot write.
        """
        ...


@dataclass(frozen=True)
class Llama3Chat:
    """Llama 3: a header of role and blank line, the text, end of turn.

    Source: the prompt format of Meta's llama3 model card, in ids as Meta's reference builds it.
    """

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        header, header_end = (
            control_id(tokenizer, "<|start_header_id|>"),
            control_id(tokenizer, "<|end_header_id|>"),
        )
        turn_end = control_id(tokenizer, "<|eot_id|>")

        def opened(role: str) -> list[int]:
            name = "ipython" if role == "tool" else role  # what Llama 3 calls a tool's answer
            blank_line = tokenizer.encode("\n\n")
            return [header, *tokenizer.encode(name), header_end, *blank_line]

        ids = [control_id(tokenizer, "<|begin_of_text|>")]
        for message in checked_messages(messages):
            ids += [*opened(message.role), *tokenizer.encode(message.content), turn_end]
        return ids + opened("assistant") if add_generation_prompt else ids


@dataclass(frozen=True)
class ChatML:
    """ChatML, as SmolLM, Qwen and many fine-tunes speak it."""

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        start, end = control_id(tokenizer, "<|im_start|>"), control_id(tokenizer, "<|im_end|>")
        parts: list[str | int] = [] if tokenizer.bos is None else [tokenizer.bos]
        for message in checked_messages(messages):
            parts += [start, f"{message.role}\n{message.content}", end, "\n"]
        if add_generation_prompt:
            parts += [start, "assistant\n"]
        return encode_parts(parts, tokenizer)


@runtime_checkable
class _JoinsParts(Protocol):
    """A tokenizer for which a text's ids depend on where it stands (SentencePiece's blank)."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]: ...


def encode_parts(parts: Sequence[str | int], tokenizer: Tokenizer) -> list[int]:
    """Plain texts and control ids, in order → ids; nothing in the texts becomes a control id."""
    if isinstance(tokenizer, _JoinsParts):
        return tokenizer.encode_parts(parts)
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
    return ids


def control_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a control token that a format needs; TokenizerError if the vocabulary lacks it."""
    if text not in tokenizer.specials:
        raise TokenizerError(f"chat: this vocabulary has no control token {text}: another format?")
    return tokenizer.specials[text]


def checked_messages(messages: Sequence[Message | Mapping[str, str]]) -> list[Message]:
    """Messages, or mappings with role and content, → Messages; TokenizerError says what is wrong.

    At most one system message, and only as the first: later ones mean different things to
    different formats, or are dropped by them in silence.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise TokenizerError(f"messages: want a list of at least one message, got {messages!r}")
    checked = [_checked_message(message, n) for n, message in enumerate(messages)]
    for n, message in enumerate(checked[1:], 1):
        if message.role == "system":
            raise TokenizerError(f"messages[{n}]: a system message can only be the first")
    return checked


def _checked_message(message: object, n: int) -> Message:
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            fields = ", ".join(map(str, message)) or "nothing"
            raise TokenizerError(f"messages[{n}]: want role and content, got {fields}")
        message = Message(message["role"], message["content"])
    if not isinstance(message, Message):
        raise TokenizerError(f"messages[{n}]: want role and content, got {message!r}")
    if message.role not in ROLES:
        raise TokenizerError(f"messages[{n}].role: want {' '.join(ROLES)}, got {message.role!r}")
    if not isinstance(message.content, str):
        kind = type(message.content).__name__
        raise TokenizerError(f"messages[{n}].content: want text, got {kind}")
    return message
