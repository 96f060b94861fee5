"""Chat: text piped in with a message, limits of answers, and /system."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from threading import Timer
from typing import Any

import pytest

from cli.conftest import Verb
from glassllama.base.errors import GlassError
from glassllama.cli import console
from glassllama.cli.console import prompt_from
from glassllama.cli.options import ChatOptions, SamplingOptions
from glassllama.cli.repl import ChatSession, Conversation, Repl, limits
from glassllama.llm import LLM
from glassllama.tokenizers.chat import ChatML, TemplateChat

DATES = (
    "{{ '<|im_start|>system\n\nKnowledge: 2023\n\n' }}{% set first = messages[0] %}"
    "{% if first.role == 'system' %}{{ first.content }}{% endif %}{{ '<|im_end|>' }}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


def piped(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "raw", "whole"),
    [
        ("Sum up:", b"one\ntwo\n", "Sum up:\n\none\ntwo"), ("Sum up:", b"", "Sum up:"),
        ("Sum up:", b"\n", "Sum up:"), ("Sum up:", b"\xef\xbb\xbfa\r\n", "Sum up:\n\na"),
        (None, b"one\n", "one"),
    ],
)  # fmt: skip
def test_piped_text_is_appended_to_the_message(
    monkeypatch: pytest.MonkeyPatch, text: str | None, raw: bytes, whole: str
) -> None:
    piped(monkeypatch, raw)
    assert prompt_from(text, "TEXT") == whole


@pytest.mark.parametrize("text", [None, "Sum up:"])
def test_unreadable_stdin_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    piped(monkeypatch, b"abc\xff")
    with pytest.raises(GlassError, match="standard input: not UTF-8 at byte 3"):
        prompt_from(text, "TEXT")
    monkeypatch.setattr(console, "MAX_PROMPT_BYTES", 8)
    piped(monkeypatch, b"123456789")
    with pytest.raises(GlassError, match="standard input: more than 8 bytes"):
        prompt_from(text, "TEXT")


def test_a_closed_stdin_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, b"lost")
    sys.stdin.close()
    assert prompt_from("Sum up:", "TEXT") == "Sum up:"
    with pytest.raises(GlassError, match="TEXT is missing"):
        prompt_from(None, "TEXT")


def test_a_notice_says_that_stdin_is_awaited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "STDIN_NOTICE_SECONDS", 0.01)
    reader, writer = os.pipe()
    Timer(0.3, os.close, [writer]).start()
    with open(reader, encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert prompt_from("Sum up:", "TEXT") == "Sum up:"
    assert "reading standard input until it ends" in capsys.readouterr().err


def test_chat_and_generate_append_a_file_to_their_argument(verb: Verb, loaded: LLM) -> None:
    for name in ("chat", "generate"):
        options = ("-n", "1", "-t", "0", "--json")
        together = json.loads(verb(name, "Sum up:", *options, stdin="one\ntwo\n").out)
        alone = json.loads(verb(name, "Sum up:\n\none\ntwo", *options).out)
        assert together["prompt_ids"] == alone["prompt_ids"]


def test_chat_has_a_limit_and_a_penalty_and_shows_them(verb: Verb) -> None:
    page = " ".join(verb("chat", "--help").out.replace("│", "").split())
    assert "full context. [default: 1024]" in page
    assert "become less likely. [default: 1.1]" in page
    assert (SamplingOptions().max_tokens, SamplingOptions().repetition_penalty) == (None, 1.0)


def session_with(llm: Any, **changes: Any) -> ChatSession:
    return ChatSession(llm, Conversation(), replace(ChatOptions(), **changes))


def test_the_conversation_prints_its_limits() -> None:
    assert "at most 1,024 tokens, repetition penalty 1.1" in limits(ChatOptions())
    assert "without limit" in limits(ChatOptions(max_tokens=None))


class OtherTemplate:
    """A model with another chat format, for encoding only."""

    def __init__(self, llm: LLM, chat_format: Any) -> None:
        self.tokenizer, self.chat_format = llm.tokenizer, chat_format

    def encode_chat(self, messages: Any) -> list[int]:
        ids: list[int] = self.chat_format.encode(messages, self.tokenizer)
        return ids


@pytest.mark.parametrize(
    ("template", "system", "shown"),
    [
        (None, None, "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        (None, "Be brief.", "Be brief."),
        (ChatML(), None, ""),
        (ChatML(), "Be brief.", "Be brief."),
        (TemplateChat(DATES), None, "Knowledge: 2023"),
        (TemplateChat(DATES), "Be brief.", "Knowledge: 2023\n\nBe brief."),
        (TemplateChat("{{ messages[0].content }}"), None, ""),
        (TemplateChat("{{ raise_exception('no') }}"), None, ""),
    ],
)  # fmt: skip
def test_the_default_system_message_of_a_template(
    llm: LLM, template: Any, system: str | None, shown: str
) -> None:
    session = session_with(OtherTemplate(llm, template or llm.chat_format))
    session.conversation.system = system
    assert session.text_before_first_message() == shown


def test_the_system_command_shows_the_system_message(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    repl = Repl(session_with(llm))
    repl.handle("/system")
    none, template = capsys.readouterr().out.splitlines()
    assert none == "none"
    assert template.endswith("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    repl.handle("/system Be brief.")
    assert capsys.readouterr().out == "Be brief.\n"


def test_a_path_in_the_home_of_an_unknown_user(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    repl = Repl(session_with(llm))
    for command in ("/save", "/load"):
        repl.handle(f"{command} ~nobody-of-that-name/a")
        assert "No such file or directory" in capsys.readouterr().err
