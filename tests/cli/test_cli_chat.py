"""Chat: text piped in with a message, limits of answers, and /system."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any, ClassVar

import pytest

from cli.conftest import Verb
from cli.programs import Terminal
from glassllama.base.errors import GlassError
from glassllama.cli import console
from glassllama.cli.console import prompt_from
from glassllama.cli.options import ChatOptions, SamplingOptions
from glassllama.cli.repl import ChatSession, Conversation, Repl, limits
from glassllama.llm import LLM
from glassllama.tokenizers.chat import ChatML, TemplateChat
from scripted_models import write_scripted_model

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
    assert "full context. [default: (1024; 8192 if the model thinks first)]" in page
    assert "become less likely. [default: (the model's, else 1.1)]" in page
    plain = SamplingOptions().with_defaults({})
    assert (plain.max_tokens, plain.repetition_penalty) == (None, 1.0)
    assert (plain.temperature, plain.top_p, plain.min_p, plain.top_k) == (0.6, 0.9, 0.0, None)


def session_with(llm: Any, **changes: Any) -> ChatSession:
    return ChatSession(llm, Conversation(), replace(ChatOptions(), **changes))


def test_the_conversation_prints_its_limits() -> None:
    options = ChatOptions().with_defaults({})
    assert "at most 1,024 tokens, repetition penalty 1.1" in limits(options)
    assert "without limit" in limits(replace(options, max_tokens=None))
    assert limits(ChatOptions(max_tokens=9).with_defaults({"max_tokens": 8192})).count(" 9 tokens")


class OtherTemplate:
    """A model with another chat format, for encoding only."""

    sampling_defaults: ClassVar[dict[str, float]] = {}

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


# A model that thinks first

THINKING = ["\n", "<think>", "S", "i", "x", "</think>", "4", "2", ".", "<|im_end|>"]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thinking")
    settings = {"do_sample": True, "temperature": 0.001, "top_k": 3}
    return write_scripted_model(folder, THINKING, **settings)


def test_reasoning_is_no_part_of_piped_output(verb: Verb, thinking: Path) -> None:
    ran = verb("chat", "6 × 7?", "--model", thinking)
    assert (ran.code, ran.out) == (0, "42.\n")
    assert "Six" not in ran.err
    cut = verb("chat", "6 × 7?", "--model", thinking, "-n", "3")
    assert (cut.code, cut.out) == (0, "\n")
    assert "no answer: all tokens went into reasoning" in cut.err


def test_json_has_reasoning_in_a_field_of_its_own(verb: Verb, thinking: Path) -> None:
    answer = json.loads(verb("chat", "6 × 7?", "--model", thinking, "--json").out)
    assert (answer["text"], answer["reasoning_content"]) == ("42.", "Six")
    assert answer["usage"]["reasoning_tokens"] == 4  # with the end mark
    plain = json.loads(verb("chat", "Hi", "--model", thinking, "--json", "--no-think").out)
    thinks = json.loads(verb("chat", "Hi", "--model", thinking, "--json", "--think").out)
    assert len(plain["prompt_ids"]) > len(thinks["prompt_ids"])
    raw = json.loads(verb("generate", "a\n", "--model", thinking, "--json", "-n", "9").out)
    assert (raw["text"], raw["reasoning_content"]) == ("<think>Six</think>42.", None)


def test_a_model_without_a_switch_for_reasoning_says_so(verb: Verb, loaded: LLM) -> None:
    for name in ("--think", "--no-think"):
        ran = verb("chat", "Hi", name)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == (
            "error: chat template: does not read enable_thinking; options that it reads: none\n"
        )


def test_show_and_validate_name_the_recommended_settings(verb: Verb, thinking: Path) -> None:
    expected = "temperature 0.001, top_k 3 (generation_config.json)"
    assert f"sampling {expected}" in " ".join(verb("show", thinking).out.split())
    assert f"sampling: {expected}" in verb("validate", thinking).out
    facts = json.loads(verb("show", thinking, "--json").out)["sampling"]
    assert (facts["temperature"], facts["top_k"], facts["top_p"]) == (0.001, 3, 1.0)


def test_a_bad_setting_is_an_error_of_one_line(verb: Verb, thinking: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(thinking, tmp_path / "bad")
    (folder / "generation_config.json").write_text('{"temperature": -1}')
    words = "temperature must be a finite number from 0 to 1e+06, got -1"
    for line in (["chat", "Hi"], ["generate", "Hi", "-t", "0"]):
        ran = verb(*line, "--model", folder)
        assert (ran.code, ran.out) == (1, "")
        [last] = [line for line in ran.err.splitlines() if line.startswith("error")]
        assert words in last
    assert words in verb("show", folder).out
    assert f"problem  sampling: {folder}" in verb("validate", folder).out


def test_a_setting_without_effect_has_a_note(verb: Verb, thinking: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(thinking, tmp_path / "beams")
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    ran = verb("chat", "Hi", "--model", folder, "-t", "0")
    assert (ran.code, ran.out) == (0, "42.\n")
    assert "note: generation_config.json: num_beams: not supported, no effect\n" in ran.err


def test_options_of_the_command_line_win(verb: Verb, thinking: Path) -> None:
    chat = ("chat", "6 × 7?", "--model", thinking, "-n", "9", "--json")
    for given, greedy in (
        (["-t", "9", "--top-k", "1"], True),
        (["-t", "99", "--top-k", "0"], False),
    ):
        ids = [json.loads(verb(*chat, *given, "--seed", n).out)["ids"] for n in (1, 2)]
        assert (ids[0] == ids[1]) == greedy


def test_reasoning_is_folded_on_a_terminal(thinking: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", "--model", str(thinking))
    terminal.wait_for("at most 8,192 tokens")
    terminal.wait_for("defaults of this model: temperature 0.001, top_k 3 (generation_config.json)")
    terminal.wait_for("> ")

    def say(line: str) -> str:
        terminal.send(line + "\n")
        terminal.wait_for("\n")
        return terminal.wait_for("\r\n> ")

    shown = say("6 × 7?")
    assert "thinking" in shown.split("thought for 4 tokens")[0]
    assert "42." in shown.split("thought for 4 tokens")[1]
    assert "Six" not in shown.split("thought for 4 tokens")[1]
    assert "\x1b[2m" in terminal.raw.split("thought for")[0], "dim"
    assert "Six" in say("/reasoning")
    assert "reasoning before answers: off" in say("/nothink")
    say("/clear")
    assert "(the last answer has none)" in say("/reasoning")
    assert "reasoning before answers: on" in say("/think")
    say("6 × 7?")
    kept = tmp_path / "kept.json"
    say(f"/save {kept}")
    assert json.loads(kept.read_text())["messages"][1] == {
        "role": "assistant", "content": "42.", "reasoning_content": "Six",
    }  # fmt: skip
    assert "2 messages" in say(f"/load {kept}")
    terminal.ctrl_d()
    assert terminal.end() == 0


def test_commands_for_reasoning_of_a_model_without_it(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    repl = Repl(session_with(llm))
    for command in ("/think", "/nothink"):
        repl.handle(command)
        assert "the chat template of this model has no switch for reasoning" in (
            capsys.readouterr().err
        )
