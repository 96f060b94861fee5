"""Chat formats: messages → ids, with the special tokens that a chat model was trained with.

Special tokens come from the format alone. The text of a message is always encoded as ordinary text,
so that `<|eot_id|>` typed by a user never ends a turn.
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
from glassllama.tokenizers.template_text import TemplateText, from_template, mask_other_text
from glassllama.tokenizers.vocabulary import pattern_of

ROLES = SYSTEM, USER, ASSISTANT, TOOL = ("system", "user", "assistant", "tool")
# Conversations with which a template is rendered to find the added tokens that it writes. Together
# they have every role; a template that refuses one of them accepts another.
SAMPLE_ROLES = (
    (USER,), (SYSTEM, USER), (USER, ASSISTANT), (USER, ASSISTANT, USER),
    (USER, ASSISTANT, TOOL), (SYSTEM, USER, ASSISTANT, TOOL, ASSISTANT, USER),
)  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user, assistant or tool (the result of a tool)."""

    role: str
    content: str


class ChatFormat(Protocol):
    """How a model family writes a conversation."""

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of the conversation, after which the model writes the next answer.

        TokenizerError: messages, or a vocabulary, that do not fit the format.
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
        names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
        bos, header, header_end, turn_end = (special_id(tokenizer, f"<|{n}|>") for n in names)

        def start(role: str) -> list[int]:
            name = "ipython" if role == "tool" else role  # Llama 3's name for tool results
            return [header, *tokenizer.encode(name), header_end, *tokenizer.encode("\n\n")]

        ids = [bos]
        for message in checked_messages(messages):
            ids += [*start(message.role), *tokenizer.encode(message.content), turn_end]
        return ids + start("assistant") if add_generation_prompt else ids


@dataclass(frozen=True)
class ChatML:
    """ChatML, used by SmolLM, Qwen and many fine-tuned models."""

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        start, end = special_id(tokenizer, "<|im_start|>"), special_id(tokenizer, "<|im_end|>")
        parts: list[str | int] = [] if tokenizer.bos is None else [tokenizer.bos]
        for message in checked_messages(messages):
            parts += [start, f"{message.role}\n{message.content}", end, "\n"]
        if add_generation_prompt:
            parts += [start, "assistant\n"]
        return encode_parts(parts, tokenizer)


class TemplateChat:
    """A file's own `chat_template`, rendered in a sandbox; the same ids as from transformers.

    Every character of the rendered text has its origin (template_text.py). A special token counts
    only where the template wrote all of it; the text of messages stays text. Special for this
    purpose are the tokenizer's special tokens, and added tokens that the template writes, such as
    marks of roles. The template alone decides whether the conversation starts with bos.

    `bos_token`, `eos_token` and other `tokens` are variables of the template; None leaves them
    undefined, as in transformers.
    """

    def __init__(self, template: str, **tokens: str | None) -> None:
        from glassllama.tokenizers.chat_template import ChatTemplate  # imports jinja2

        self._template = ChatTemplate(template)
        self._tokens = {
            name: from_template(text) for name, text in tokens.items() if text is not None
        }

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        text = self._rendered(checked_messages(messages), add_generation_prompt)
        added = self._added_tokens(text, tokenizer)
        specials = {**tokenizer.specials, **added}
        pattern, plain = pattern_of(specials), str.__str__(text)
        if pattern is None:
            return tokenizer.encode(plain)
        masked = mask_other_text(text, _unused_character(specials))
        found = [match.span() for match in pattern.finditer(masked)]
        expected = [specials[plain[start:end]] for start, end in found]
        if not _has_special_from_message(pattern, text):  # then the text can be encoded as a whole
            ids, special_ids = tokenizer.encode(plain, specials=True), {*specials.values()}
            if Counter(id for id in ids if id in special_ids) <= Counter(expected):
                return ids
        if isinstance(tokenizer, _HasAdded):
            tokenizer = tokenizer.without_added(added)
        parts: list[str | int] = [*_between(plain, found)]
        for n, id in enumerate(expected):
            parts.insert(2 * n + 1, id)
        return encode_parts([part for part in parts if part != ""], tokenizer)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> TemplateText:
        return self._template.render(
            messages=[
                {"role": from_template(one.role), "content": one.content} for one in messages
            ],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._tokens,
        )

    def _added_tokens(self, text: TemplateText, tokenizer: Tokenizer) -> dict[str, int]:
        """The added tokens, except whitespace, that the template writes.

        In this conversation, in its literals, or for roles that this conversation does not have.
        """
        if not isinstance(tokenizer, _HasAdded):
            return {}
        added = {text: id for text, id in tokenizer.added.items() if not text.isspace()}
        if not added:
            return {}
        mask = _unused_character(added)
        texts = [mask_other_text(one, mask, one_per_run=True) for one in (text, *self._samples)]
        of_template = mask.join([*texts, *self._template.literals])
        return {text: id for text, id in added.items() if text in of_template}

    @cached_property
    def _samples(self) -> list[TemplateText]:
        """The template rendered with SAMPLE_ROLES, without conversations that it refuses."""
        samples: list[TemplateText] = []
        for roles in SAMPLE_ROLES:
            for add_generation_prompt in (False, True):
                with suppress(TokenizerError):
                    messages = [Message(role, "x") for role in roles]
                    samples.append(self._rendered(messages, add_generation_prompt))
        return samples


def _unused_character(texts: Iterable[str]) -> str:
    """A private-use character that is in none of these texts."""
    used = {*"".join(texts)}
    return next(chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in used)


def _has_special_from_message(pattern: re.Pattern[str], text: TemplateText) -> bool:
    """Whether a text that looks like a special token has a character of a message in it."""
    at = 0
    while (match := pattern.search(text, at)) is not None:
        if 0 in text.origin[match.start() : match.end()]:
            return True
        at = match.start() + 1  # matches may overlap
    return False


def _between(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[str]:
    """The text before, between and after these spans."""
    at = 0
    for start, end in spans:
        yield text[at:start]
        at = end
    yield text[at:]


def choose_chat_format(
    template: str | None, tokenizer: Tokenizer, **tokens: str | None
) -> ChatFormat:
    """The file's template if it has one, else the format whose special tokens the vocabulary has.

    `tokens` are variables of the template: `bos_token`, `eos_token` and others that the file names.
    By default the first is the text of `tokenizer.bos`, the second that of the stop id if there is
    only one. TokenizerError: no format is known (a base model, which can only continue text).
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
        "chat: this model has no chat template and no special tokens of a known chat format; "
        "it continues text: use generate"
    )


@runtime_checkable
class _JoinsParts(Protocol):
    """A tokenizer for which the ids of a text depend on its position (SentencePiece's prefix)."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]: ...


@runtime_checkable
class _HasAdded(Protocol):
    """A tokenizer with added tokens that it can treat as ordinary text."""

    @property
    def added(self) -> Mapping[str, int]: ...

    def without_added(self, texts: Iterable[str]) -> Tokenizer: ...


def encode_parts(parts: Sequence[str | int], tokenizer: Tokenizer) -> list[int]:
    """Texts and special ids in order → ids; nothing in the texts becomes a special id."""
    if isinstance(tokenizer, _JoinsParts):
        return tokenizer.encode_parts(parts)
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
    return ids


def special_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a special token that a format needs. TokenizerError: the vocabulary lacks it."""
    if text not in tokenizer.specials:
        raise TokenizerError(f"chat: this vocabulary has no special token {text}: another format?")
    return tokenizer.specials[text]


def checked_messages(messages: Sequence[Message | Mapping[str, str]]) -> list[Message]:
    """Messages, or mappings with role and content, → Messages. TokenizerError: what is wrong.

    Only the first may be a system message: formats treat later ones differently, or drop them.
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
