"""Messages → ids: what a chat model was trained to see around every turn.

Control tokens come from the format alone. The text of a message is always encoded as plain text, so
that `<|eot_id|>` typed by a user is a few characters of prose and never the end of a turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from glassllama.base.errors import TokenizerError, named, quoted
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.bpe import alternatives
from glassllama.tokenizers.written import Written, without_foreign, written

ROLES = SYSTEM, USER, ASSISTANT, TOOL = ("system", "user", "assistant", "tool")
# Conversations that a template is rendered with to find its marks of roles. Together they have
# every role; a template that refuses one of them accepts another.
SAMPLE_ROLES = (
    (USER,), (SYSTEM, USER), (USER, ASSISTANT), (USER, ASSISTANT, USER),
    (USER, ASSISTANT, TOOL), (SYSTEM, USER, ASSISTANT, TOOL, ASSISTANT, USER),
)  # fmt: skip


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


class TemplateChat:
    """The file's own `chat_template`, in its sandbox; ids as transformers makes them.

    Every character of the rendered text knows whether the template wrote it (written.py). A control
    token is one where the template wrote all of it; whatever a message holds stays text. Control
    tokens for this purpose are the tokenizer's own, and added tokens that the template writes, such
    as the marks of roles, whether the file calls them special or not. The template alone decides
    whether the conversation begins with bos: none is added to it.

    `bos_token`, `eos_token` and other `tokens` are what the template knows by these names; None
    leaves them undefined, as transformers does for a model that has none.
    """

    def __init__(self, template: str, **tokens: str | None) -> None:
        from glassllama.tokenizers.chat_template import (
            ChatTemplate,  # jinja2: only for who needs it
        )

        self._template = ChatTemplate(template)
        self._known = {name: written(text) for name, text in tokens.items() if text is not None}

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        text = self._rendered(checked_messages(messages), add_generation_prompt)
        marks = self._marks(text, tokenizer)
        controls = {**tokenizer.specials, **marks}
        pattern, plain = alternatives(controls), str.__str__(text)
        if pattern is None:
            return tokenizer.encode(plain)
        own = without_foreign(text, _unused_character(controls))
        found = [match.span() for match in pattern.finditer(own)]
        expected = [controls[plain[start:end]] for start, end in found]
        if not _holds_foreign(pattern, text):  # then nothing can be mistaken
            ids, all_controls = tokenizer.encode(plain, specials=True), {*controls.values()}
            if Counter(id for id in ids if id in all_controls) <= Counter(expected):
                return ids
        if isinstance(tokenizer, _HasAdded):
            tokenizer = tokenizer.without_added(marks)
        parts: list[str | int] = [*_around(plain, found)]
        for n, id in enumerate(expected):
            parts.insert(2 * n + 1, id)
        return encode_parts([part for part in parts if part != ""], tokenizer)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> Written:
        return self._template.render(
            messages=[{"role": written(one.role), "content": one.content} for one in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._known,
        )

    def _marks(self, text: Written, tokenizer: Tokenizer) -> dict[str, int]:
        """The added tokens that the template writes; blanks and line ends are ordinary text.

        In this conversation, in its literals, or for other roles than those of this conversation.
        """
        if not isinstance(tokenizer, _HasAdded):
            return {}
        added = {text: id for text, id in tokenizer.added.items() if not text.isspace()}
        if not added:
            return {}
        blank = _unused_character(added)
        texts = [without_foreign(one, blank, shorter=True) for one in (text, *self._samples)]
        own = blank.join([*texts, *self._template.literals])
        return {text: id for text, id in added.items() if text in own}

    @cached_property
    def _samples(self) -> list[Written]:
        """The template rendered with SAMPLE_ROLES; conversations that it refuses are left out."""
        samples: list[Written] = []
        for roles in SAMPLE_ROLES:
            for add_generation_prompt in (False, True):
                with suppress(TokenizerError):
                    messages = [Message(role, "x") for role in roles]
                    samples.append(self._rendered(messages, add_generation_prompt))
        return samples


def _unused_character(texts: Iterable[str]) -> str:
    """A character, of those for private use, that is in none of these texts."""
    used = {*"".join(texts)}
    return next(chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in used)


def _holds_foreign(pattern: re.Pattern[str], text: Written) -> bool:
    """Whether anything that reads like a control token has a character of a message in it."""
    at = 0
    while (match := pattern.search(text, at)) is not None:
        if 0 in text.own[match.start() : match.end()]:
            return True
        at = match.start() + 1  # the next may begin within this one
    return False


def _around(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[str]:
    """The text before, between and after these spans."""
    at = 0
    for start, end in spans:
        yield text[at:start]
        at = end
    yield text[at:]


def choose_chat_format(
    template: str | None, tokenizer: Tokenizer, **tokens: str | None
) -> ChatFormat:
    """The file's template if it has one, else the format whose control tokens the vocabulary has.

    `tokens` are for the template, where the file names them: `bos_token`, `eos_token` and others.
    By default the first is the text of `tokenizer.bos`, the second of its stop id, if it is the
    only one. TokenizerError if there is no format: a base model, which can only continue text.
    """
    if template is not None:
        texts = {id: text for text, id in tokenizer.specials.items()}
        if tokens.get("bos_token") is None and tokenizer.bos is not None:
            tokens["bos_token"] = texts.get(tokenizer.bos)
        if tokens.get("eos_token") is None and len(tokenizer.stop_ids) == 1:
            tokens["eos_token"] = texts.get(next(iter(tokenizer.stop_ids)))
        return TemplateChat(template, **tokens)
    if "<|im_start|>" in tokenizer.specials:
        return ChatML()
    if "<|start_header_id|>" in tokenizer.specials:
        return Llama3Chat()
    raise TokenizerError(
        "chat: this model has no chat template and no control tokens of a known chat format; "
        "it continues text: use generate"
    )


@runtime_checkable
class _JoinsParts(Protocol):
    """A tokenizer for which a text's ids depend on where it stands (SentencePiece's blank)."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]: ...


@runtime_checkable
class _HasAdded(Protocol):
    """A tokenizer that reads some tokens from any text, and can leave them unread."""

    @property
    def added(self) -> Mapping[str, int]: ...

    def without_added(self, texts: Iterable[str]) -> Tokenizer: ...


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
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        came = quoted(messages)
        raise TokenizerError(f"messages: want a list of at least one message, got {came}")
    checked = [_checked_message(message, n) for n, message in enumerate(messages)]
    for n, message in enumerate(checked[1:], 1):
        if message.role == "system":
            raise TokenizerError(f"messages[{n}]: a system message can only be the first")
    return checked


def _checked_message(message: object, n: int) -> Message:
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            fields = named(", ".join(map(str, message)) or "nothing")
            raise TokenizerError(f"messages[{n}]: want role and content, got {fields}")
        message = Message(message["role"], message["content"])
    if not isinstance(message, Message):
        raise TokenizerError(f"messages[{n}]: want role and content, got {quoted(message)}")
    if message.role not in ROLES:
        came = quoted(message.role)
        raise TokenizerError(f"messages[{n}].role: want {' '.join(ROLES)}, got {came}")
    if not isinstance(message.content, str):
        kind = type(message.content).__name__
        raise TokenizerError(f"messages[{n}].content: want text, got {kind}")
    return message
