"""Messages → ids: what a chat model was trained to see around every turn.

Control tokens come from the format alone. The text of a message is always encoded as plain text, so
that `<|eot_id|>` typed by a user is a few characters of prose and never the end of a turn.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.bpe import alternatives

ROLES = ("system", "user", "assistant", "tool")
SECRET_DIGITS, NUMBER_DIGITS = 40, 6  # digits: no template's upper, title or tojson changes them


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

    A text in a message that reads like a control token is replaced by a number that nobody can
    guess while the template runs, and put back once the true control tokens have been found. The
    template alone decides whether the conversation begins with bos: none is added to it.

    `bos_token` and `eos_token` are what the template knows by these names; None leaves them
    undefined, as transformers does for a model that has none.
    """

    def __init__(
        self, template: str, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        from glassllama.tokenizers.templates import ChatTemplate  # jinja2: only for who needs it

        self._template = ChatTemplate(template)
        known = {"bos_token": bos_token, "eos_token": eos_token}
        self._known = {name: token for name, token in known.items() if token is not None}

    def encode(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        disguise = _Disguise(tokenizer.specials)
        text = self._template.render(
            messages=[
                {"role": message.role, "content": disguise.hide(message.content)}
                for message in checked_messages(messages)
            ],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._known,
        )
        control = alternatives(tokenizer.specials)
        pieces = [text] if control is None else control.split(text)  # text, control, text, …, text
        parts: list[str | int] = [disguise.reveal(piece) for piece in pieces]
        parts[1::2] = [tokenizer.specials[special] for special in pieces[1::2]]
        return encode_parts([part for part in parts if part != ""], tokenizer)


class _Disguise:
    """Hides what could be read as a control token, and brings it back.

    Also the beginning of one at the end of a text, and the end of one at the beginning, which could
    join with what stands next to them: there, an empty text is hidden.
    """

    def __init__(self, specials: Iterable[str]) -> None:
        self._texts = ["", *specials]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._control = alternatives(self._texts[1:])
        self._beginnings = {text[:end] for text in self._texts for end in range(1, len(text))}
        self._endings = {text[start:] for text in self._texts for start in range(1, len(text))}
        self._longest = max(map(len, self._texts))
        self._secret = f"{secrets.randbelow(10**SECRET_DIGITS):0{SECRET_DIGITS}}"
        self._hidden = re.compile(rf"{self._secret}(\d{{{NUMBER_DIGITS}}})")

    def hide(self, text: str) -> str:
        """`text` with nothing in it, or at its ends, that is or may become a control token."""
        if self._control is None:
            return text
        text = self._control.sub(lambda found: self._stand_in(found[0]), text)
        # A template may trim, so the ends are where the blanks begin.
        blanks = len(text) - len(text.lstrip())
        start, core, end = text[:blanks], text.strip(), text[blanks:][len(text.strip()) :]
        lengths = range(1, min(self._longest, len(core)) + 1)
        if any(core[:length] in self._endings for length in lengths):
            core = self._stand_in("") + core
        if any(core[-length:] in self._beginnings for length in lengths):
            core += self._stand_in("")
        return start + core + end

    def reveal(self, text: str) -> str:
        return self._hidden.sub(lambda found: self._texts[int(found[1])], text)

    def _stand_in(self, text: str) -> str:
        return f"{self._secret}{self._numbers[text]:0{NUMBER_DIGITS}}"


def choose_chat_format(
    template: str | None,
    tokenizer: Tokenizer,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> ChatFormat:
    """The file's template if it has one, else the format whose control tokens the vocabulary has.

    `bos_token` and `eos_token` are for the template, where the file names them; by default the text
    of `tokenizer.bos` and of its stop id, if it is the only one. TokenizerError if there is no
    format: a base model, which can only continue text.
    """
    if template is not None:
        texts = {id: text for text, id in tokenizer.specials.items()}
        if bos_token is None and tokenizer.bos is not None:
            bos_token = texts.get(tokenizer.bos)
        if eos_token is None and len(tokenizer.stop_ids) == 1:
            eos_token = texts.get(next(iter(tokenizer.stop_ids)))
        return TemplateChat(template, bos_token=bos_token, eos_token=eos_token)
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
