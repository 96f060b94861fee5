"""Chat formats: messages → ids, with the special tokens that a chat model was trained with.

Special tokens come from the format alone. The text of a message is always encoded as ordinary text,
so that `<|eot_id|>` typed by a user never ends a turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

from glassllama.base.errors import TokenizerError, named, quoted
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.patterns import with_gaps
from glassllama.tokenizers.vocabulary import TokenTrie, pattern_of

if TYPE_CHECKING:
    from glassllama.tokenizers.chat_template import TemplateText  # imports jinja2

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


class ChatFormat:
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
        return self._ids(checked_messages(messages), tokenizer, add_generation_prompt)

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, prompt: bool) -> list[int]:
        raise NotImplementedError


@dataclass(frozen=True)
class Llama3Chat(ChatFormat):
    """Llama 3: a header of role and blank line, the text, end of turn.

    Source: the prompt format of Meta's llama3 model card, in ids as Meta's reference builds it.
    """

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, prompt: bool) -> list[int]:
        names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
        bos, header, header_end, turn_end = (special_id(tokenizer, f"<|{n}|>") for n in names)
        parts: list[str | int] = [bos]
        for message in messages:
            role = "ipython" if message.role == TOOL else message.role  # the name of tool results
            parts += [header, role, header_end, "\n\n", message.content, turn_end]
        parts += [header, ASSISTANT, header_end, "\n\n"] if prompt else []
        return tokenizer.encode_parts(parts)


@dataclass(frozen=True)
class ChatML(ChatFormat):
    """ChatML, used by SmolLM, Qwen and many fine-tuned models."""

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, prompt: bool) -> list[int]:
        start, end = special_id(tokenizer, "<|im_start|>"), special_id(tokenizer, "<|im_end|>")
        parts: list[str | int] = [] if tokenizer.bos is None else [tokenizer.bos]
        for message in messages:
            parts += [start, f"{message.role}\n{message.content}", end, "\n"]
        parts += [start, "assistant\n"] if prompt else []
        return tokenizer.encode_parts(parts)


class TemplateChat(ChatFormat):
    """A file's own `chat_template`, rendered in a sandbox; the same ids as from transformers.

    Every character of the rendered text has its origin (chat_template.py). A special token counts
    only where the template wrote all of it; the text of messages stays text. Special for this
    purpose are the tokenizer's special tokens, and added tokens that the template writes, such as
    marks of roles. The template alone decides whether the conversation starts with bos.

    `bos_token`, `eos_token` and other `tokens` are variables of the template; None leaves them
    undefined, as in transformers.
    """

    def __init__(self, template: str, **tokens: str | None) -> None:
        from glassllama.tokenizers.chat_template import ChatTemplate  # imports jinja2

        self._template = ChatTemplate(template, **tokens)

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, prompt: bool) -> list[int]:
        text = self._template.render_chat([(m.role, m.content) for m in messages], prompt)
        added = self._added_tokens(text, tokenizer)
        specials = {**tokenizer.specials, **added}
        pattern, plain = pattern_of(specials), str.__str__(text)
        masked = text.masked(_unused_character(specials))
        spans = [match.span() for match in pattern.finditer(masked)]
        if not _has_special_from_message(pattern, text):  # then the text can be encoded as a whole
            ids, special_ids = tokenizer.encode(plain, specials=True), {*specials.values()}
            expected = Counter(specials[plain[start:end]] for start, end in spans)
            if Counter(id for id in ids if id in special_ids) <= expected:
                return ids
        parts = [
            specials[plain[start:end]] if is_special else plain[start:end]
            for start, end, is_special in with_gaps(spans, len(plain))
        ]
        return tokenizer.without_added(added).encode_parts(parts)

    def _added_tokens(self, text: TemplateText, tokenizer: Tokenizer) -> dict[str, int]:
        """The added tokens, except whitespace, that the template writes.

        In this conversation, in its literals, or for roles that this conversation does not have.
        """
        added = {text: id for text, id in tokenizer.added.items() if not text.isspace()}
        if not added:
            return {}
        mask = _unused_character(added)
        texts = [one.masked(mask, one_per_run=True) for one in (text, *self._samples)]
        of_template = mask.join([*texts, *self._template.literals])
        return {text: id for text, id in added.items() if text in of_template}

    @cached_property
    def _samples(self) -> list[TemplateText]:
        """The template rendered with SAMPLE_ROLES, without conversations that it refuses."""
        samples: list[TemplateText] = []
        for roles, prompt in product(SAMPLE_ROLES, (False, True)):
            with suppress(TokenizerError):
                samples.append(self._template.render_chat([(role, "x") for role in roles], prompt))
        return samples


def _unused_character(texts: Iterable[str]) -> str:
    """A private-use character that is in none of these texts."""
    used = {*"".join(texts)}
    return next(chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in used)


def _has_special_from_message(pattern: TokenTrie, text: TemplateText) -> bool:
    """Whether a text that looks like a special token has a character of a message in it."""
    at = 0
    while (match := pattern.search(text, at)) is not None:
        if 0 in text.origin[match.start() : match.end()]:
            return True
        at = match.start() + 1  # matches may overlap
    return False


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
    return [_checked_message(message, n) for n, message in enumerate(messages)]


def _checked_message(message: object, n: int) -> Message:
    where = f"messages[{n}]"
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            fields = named(", ".join(map(str, message)) or "nothing")
            raise TokenizerError(f"{where}: want role and content, got {fields}")
        message = Message(message["role"], message["content"])
    if not isinstance(message, Message):
        raise TokenizerError(f"{where}: want role and content, got {quoted(message)}")
    if message.role not in ROLES:
        came = quoted(message.role)
        raise TokenizerError(f"{where}.role: want {' '.join(ROLES)}, got {came}")
    if not isinstance(message.content, str):
        raise TokenizerError(f"{where}.content: want text, got {type(message.content).__name__}")
    if n > 0 and message.role == SYSTEM:
        raise TokenizerError(f"{where}: a system message can only be the first")
    return message
