"""Chat formats: messages → ids, with the special tokens that a chat model was trained with.

Special tokens come from the format alone. The text of a message is always encoded as ordinary text,
so that `<|eot_id|>` typed by a user never ends a turn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from glassllama.base.errors import TokenizerError, join_names, named, quoted
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.patterns import with_gaps
from glassllama.tokenizers.reasoning import ReasoningMarks, ReasoningSplitter, marks_in
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

# Variables of templates: which turn reasoning on and off, and which are no options.
THINKING_SWITCHES = ("enable_thinking", "thinking")
RESERVED = frozenset(("messages", "add_generation_prompt"))
PROBES = ("\U000fdddd", "\U000feeee")  # texts that no template writes
MAX_DEPTH = 32  # lists and objects within each other

Content = str | Sequence[Mapping[str, Any]] | None
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user, assistant or tool (the result of a tool).

    `content` is text, or a list of `{"type": "text", "text": …}`; a message with `tool_calls` may
    have none. The chat template decides whether the model sees earlier `reasoning_content`.
    """

    role: str
    content: Content = None
    reasoning_content: str | None = None
    tool_calls: Sequence[Json] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    tools: str | Sequence[Json] | None = None  # of a system message, for templates of Phi-4-mini

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, in the form of chat APIs."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def text(self) -> str:
        """The content as one text; the texts of a list are lines."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part["text"] for part in self.content if part["type"] == "text")


FIELDS = tuple(each.name for each in fields(Message))
MORE = ", ".join(FIELDS[2:])


class ChatFormat:
    """How a model family writes a conversation.

    `options` are variables of a chat template, such as `tools`, `enable_thinking` or `documents`.
    """

    thinking_switch: str | None = None  # the option that turns reasoning on and off

    def encode(
        self,
        messages: Sequence[Message | Json],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        options: Json | None = None,
    ) -> list[int]:
        """The ids of the conversation, after which the model writes the next answer.

        TokenizerError: messages, options or a vocabulary that do not fit the format.
        """
        checked = checked_messages(messages)
        return self._prompt(checked, tokenizer, add_generation_prompt, options or {})[0]

    def begin(
        self, messages: Sequence[Message | Json], tokenizer: Tokenizer, options: Json
    ) -> tuple[list[int], ReasoningSplitter | None]:
        """The ids, and what splits the answer, if this model marks its reasoning."""
        ids, end = self._prompt(checked_messages(messages), tokenizer, True, options)
        marks = self.reasoning_marks(tokenizer)
        splitter = None if marks is None else ReasoningSplitter(marks, end.endswith(marks.start))
        return ids, splitter

    def reasoning_marks(self, tokenizer: Tokenizer) -> ReasoningMarks | None:
        """Those that are tokens of the vocabulary."""
        return marks_in({*tokenizer.specials, *tokenizer.added}.__contains__)

    def _prompt(
        self, messages: list[Message], tokenizer: Tokenizer, prompt: bool, options: Json
    ) -> tuple[list[int], str]:
        """The ids; and the end of their text, as far as the format wrote it, without spaces."""
        for name in (*options, *("tool_calls" for message in messages if message.tool_calls)):
            raise TokenizerError(f"chat: {named(name)}: this model has no template that reads it")
        return self._ids(messages, tokenizer, prompt), ""

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
            parts += [header, role, header_end, "\n\n", message.text, turn_end]
        parts += [header, ASSISTANT, header_end, "\n\n"] if prompt else []
        return tokenizer.encode_parts(parts)


@dataclass(frozen=True)
class ChatML(ChatFormat):
    """ChatML, used by SmolLM, Qwen and many fine-tuned models."""

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, prompt: bool) -> list[int]:
        start, end = special_id(tokenizer, "<|im_start|>"), special_id(tokenizer, "<|im_end|>")
        parts: list[str | int] = [] if tokenizer.bos is None else [tokenizer.bos]
        for message in messages:
            parts += [start, f"{message.role}\n{message.text}", end, "\n"]
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

    @cached_property
    def thinking_switch(self) -> str | None:  # type: ignore[override]
        return next((one for one in THINKING_SWITCHES if one in self._template.variables), None)

    def reasoning_marks(self, tokenizer: Tokenizer) -> ReasoningMarks | None:
        """Those that the template contains."""
        return marks_in(lambda mark: any(mark in text for text in self._template.literals))

    def _prompt(
        self, messages: list[Message], tokenizer: Tokenizer, prompt: bool, options: Json
    ) -> tuple[list[int], str]:
        options = self._checked_options(messages, options)
        rendered = [self._fields(message) for message in messages]
        try:
            text = self._template.render_chat(rendered, prompt, **options)
        except TokenizerError:  # templates of DeepSeek-R1 join the arguments of calls as text
            calls = [call for each in rendered for call in each.get("tool_calls", ())]
            if not calls:
                raise
            for function in (call.get("function", call) for call in calls):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            text = self._template.render_chat(rendered, prompt, **options)
        end = text.masked(_unused_character([text])).rstrip()
        return self._ids_of(text, tokenizer), str.__str__(end)

    def _checked_options(self, messages: list[Message], options: Json) -> dict[str, Any]:
        """The options as plain JSON values. TokenizerError: the template does not read one."""
        template = self._template
        unread = [name for name in options if name not in template.variables - RESERVED]
        fields = template.attributes | template.literals
        for name in ("tool_calls", "tools"):
            if name not in fields and any(getattr(message, name) for message in messages):
                unread.append(f"{name} of a message")
        if unread:
            raise TokenizerError(
                f"chat template: does not read {join_names(unread)}; options that it reads: "
                f"{join_names(template.variables - RESERVED) or 'none'}"
            )
        if not isinstance(options.get("tools"), list | tuple | None):
            raise TokenizerError(f"tools: expected a list, got {quoted(options['tools'])}")
        return {name: plain_json(value, name) for name, value in options.items()}

    def _fields(self, message: Message) -> dict[str, Any]:
        """A message as templates read it: a list of parts only where that is understood.

        `thinking` is another name of `reasoning_content`, as in transformers.
        """
        fields = message.to_dict()
        if message.reasoning_content is not None:
            fields["thinking"] = message.reasoning_content
        if not isinstance(fields.get("content", ""), str) and message.role not in self._part_roles:
            fields["content"] = message.text
        return fields

    @cached_property
    def _part_roles(self) -> frozenset[str]:
        """Roles whose messages are written in full if their content is a list of parts.

        Other templates refuse a list, leave it out, or write it as data.
        """
        parts = [{"type": "text", "text": text} for text in PROBES]
        found = set[str]()
        for role, roles in product(ROLES, SAMPLE_ROLES):
            contents = [parts if each == role else "x" for each in roles]
            sample = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
            with suppress(TokenizerError):
                text = self._template.render_chat(sample, True)
                if all(probe in text and f'"{probe}"' not in text for probe in PROBES):
                    found |= {role} if role in roles else set()
        return frozenset(found)

    def _ids_of(self, text: TemplateText, tokenizer: Tokenizer) -> list[int]:
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
                sample = [{"role": role, "content": "x"} for role in roles]
                samples.append(self._template.render_chat(sample, prompt))
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


def checked_messages(messages: Sequence[Message | Json]) -> list[Message]:
    """Messages, or mappings with the fields of Message, → Messages. TokenizerError: what is wrong.

    Only the first may be a system message: formats treat later ones differently, or drop them. As
    in transformers, a field that is None counts as missing.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        came = quoted(messages)
        raise TokenizerError(f"messages: expected a list of at least one message, got {came}")
    return [_checked_message(message, n) for n, message in enumerate(messages)]


def _checked_message(message: object, n: int) -> Message:
    where = f"messages[{n}]"
    if isinstance(message, Mapping):
        names = {name for name, value in message.items() if value is not None}
        has_content = "content" in message or bool(message.get("tool_calls"))
        if not ({"role"} <= names <= {*FIELDS} and has_content):
            came = named(", ".join(map(str, message)) or "nothing")
            raise TokenizerError(f"{where}: expected role and content (or {MORE}), got {came}")
        values: dict[str, Any] = {name: message.get(name) for name in FIELDS}
        message = Message(**values)
    if not isinstance(message, Message):
        raise TokenizerError(f"{where}: expected role and content, got {quoted(message)}")
    if message.role not in ROLES:
        came = quoted(message.role)
        raise TokenizerError(f"{where}.role: expected {' '.join(ROLES)}, got {came}")
    for name in ("reasoning_content", "tool_call_id", "name"):
        value = getattr(message, name)
        if not isinstance(value, str | None):
            raise TokenizerError(f"{where}.{name}: expected text, got {type(value).__name__}")
    calls = _checked_calls(message.tool_calls, f"{where}.tool_calls")
    if message.role != ASSISTANT and (calls or message.reasoning_content is not None):
        raise TokenizerError(f"{where}: only an assistant has tool_calls or reasoning_content")
    if n > 0 and message.role == SYSTEM:
        raise TokenizerError(f"{where}: a system message can only be the first")
    content = message.content
    if content is not None or not calls:
        content = _checked_content(content, f"{where}.content")
    tools = plain_json(message.tools, f"{where}.tools")
    return replace(message, content=content, tool_calls=calls, tools=tools)


def _checked_content(content: Any, where: str) -> Content:
    """Text, or a list of parts that are text or the place of a picture, `{"type": "image"}`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise TokenizerError(f"{where}: expected text, got {type(content).__name__}")
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and {*part} <= {"type", "path"}:
            continue
        if kind != "text" or {*part} != {"type", "text"} or not isinstance(part["text"], str):
            raise TokenizerError(
                f"{where}[{n}]: expected {{'type': 'text', 'text': …}}, got {quoted(part)}"
            )
    return [{**part} for part in content]


def _checked_calls(calls: Any, where: str) -> list[Json] | None:
    """Calls of tools as templates expect them: `arguments` is an object.

    A call is `{"name": …, "arguments": …}`, or has these in `function`; arguments may be the JSON
    text of an object, as in OpenAI's API.
    """
    if not isinstance(calls, list | tuple | None):
        raise TokenizerError(f"{where}: expected a list, got {type(calls).__name__}")
    checked = list[Json]()
    for n, call in enumerate(plain_json(calls or [], where)):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise TokenizerError(f"{where}[{n}]: expected name and arguments, got {quoted(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise TokenizerError(
                f"{where}[{n}].arguments: expected an object, got {quoted(arguments)}"
            )
        function["arguments"] = arguments
        checked.append(call)
    return checked or None


def plain_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON values; templates get no other objects. TokenizerError: what it holds."""
    if depth <= MAX_DEPTH:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str.__str__(value)  # without a subclass's methods, or origins
        if isinstance(value, int | float):
            return int(value) if isinstance(value, int) else float(value)
        if isinstance(value, list | tuple):
            return [plain_json(item, where, depth + 1) for item in value]
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return {str.__str__(k): plain_json(v, where, depth + 1) for k, v in value.items()}
    raise TokenizerError(f"{named(where)}: expected JSON values, got {quoted(value)}")
