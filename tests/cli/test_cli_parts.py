"""Parts of the command line alone: line breaks, conversations, settings, help, output."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from cli.conftest import Verb
from glassllama.base.errors import GlassError
from glassllama.cli.console import ASCII_DRAWING, amount, new_progress
from glassllama.cli.errors import user_message
from glassllama.cli.options import SamplingOptions
from glassllama.cli.render import WordWrap, speed_line
from glassllama.cli.repl import ChatSession, Conversation, with_option
from glassllama.cli.tokens import read_ids
from glassllama.llm import LLM
from glassllama.tokenizers.chat import Message

TEXTS = st.text(alphabet="ab \n,日🙂é\u0301", max_size=120)


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap(width)
    return "".join(map(wrap.push, pieces)) + wrap.finish()


@given(text=TEXTS, cuts=st.lists(st.integers(0, 120)), width=st.integers(2, 20))
def test_wrapping_replaces_only_spaces_by_line_breaks(
    text: str, cuts: list[int], width: int
) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    lines = wrapped(pieces, width)
    assert lines == wrapped([text], width)  # in any division into pieces
    assert all(cell_len(line) <= width for line in lines.split("\n"))
    assert [c for c in lines if c not in " \n"] == [c for c in text if c not in " \n"]


def test_wrapping_keeps_words_whole() -> None:
    assert wrapped(["the quick br", "own fox jum", "ps"], 10) == "the quick \nbrown fox \njumps"
    assert wrapped(["a" * 25], 10) == "a" * 10 + "\n" + "a" * 10 + "\n" + "a" * 5
    assert wrapped(["日本語日本語"], 4) == "日本\n語日\n本語"


def turns(*roles: str) -> list[Message]:
    return [Message(role, f"{role} {n}") for n, role in enumerate(roles)]


def test_a_long_conversation_drops_its_oldest_turns_but_keeps_the_system_message() -> None:
    talk = Conversation(system="be brief", history=turns(*["user", "assistant"] * 3, "user"))
    assert talk.shorten(len, max_tokens=8) == 0
    assert talk.shorten(len, max_tokens=5) == 4
    assert [m.role for m in talk.messages] == ["system", "user", "assistant", "user"]
    assert talk.history[-1].content == "user 6"
    assert talk.shorten(len, max_tokens=1) == 2  # the question itself is always kept
    assert [m.role for m in talk.messages] == ["system", "user"]


def test_a_conversation_continues_in_a_small_context(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    class SmallContext(ChatSession):
        context = 128  # type: ignore[assignment]

    talk = SmallContext(
        llm, Conversation(system="Be brief."), SamplingOptions(temperature=0.0, max_tokens=8)
    )
    for number in range(6):
        talk.ask(f"What comes after the number {number}, please, and why do you think so?")
    assert talk.count(talk.conversation.messages[:-1]) <= 128 - 8
    assert talk.conversation.messages[0].role == "system"
    assert "oldest 2 messages were dropped" in capsys.readouterr().err


def test_a_saved_conversation_is_loaded(tmp_path: Path) -> None:
    talk = Conversation(system="sé\n", history=turns("user", "assistant"))
    talk.save(tmp_path / "talk.json")
    assert Conversation.load(tmp_path / "talk.json") == talk
    Conversation().save(tmp_path / "empty.json")
    assert Conversation.load(tmp_path / "empty.json") == Conversation()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"messages": 3}', '{"messages": [3]}', "[" * 9999]
)
def test_a_file_that_is_not_a_conversation_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(GlassError, match=r"odd\.json"):
        Conversation.load(tmp_path / "odd.json")


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("temperature", "0.2", 0.2), ("top_k", "40", 40), ("top_k", "none", None),
        ("ignore_eos", "on", True), ("seed", "7", 7), ("stop", "'a b' c", ["a b", "c"]),
        ("max_tokens", "none", None),
    ],
)  # fmt: skip
def test_settings_are_read(name: str, typed: str, value: object) -> None:
    assert getattr(with_option(SamplingOptions(), name, typed), name) == value


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("temperature", "hot"), ("temperature", "-1"), ("temperature", "nan"), ("top_k", "-1"),
        ("top_k", "1.5"), ("top_p", "none"), ("max_tokens", "0"), ("ignore_eos", "maybe"),
        ("presence_penalty", "3"), ("colour", "red"), ("stop", "'open"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(name: str, typed: str) -> None:
    with pytest.raises(GlassError, match=name):
        with_option(SamplingOptions(), name, typed)


def test_expected_errors_are_one_line_and_others_are_not() -> None:
    assert user_message(GlassError("x: y")) == "x: y"
    assert user_message(FileNotFoundError(2, "No such file", "f.txt")) == "f.txt: No such file"
    assert "memory" in str(user_message(MemoryError()))
    assert user_message(ValueError("ours")) is None


def test_amounts_are_printed_with_units() -> None:
    assert amount(12e6, 98.4e6, 9.14e6, "bytes") == "12.0/98.4 MB 9.1/s"
    assert amount(512, 2048, None, "tokens") == "512/2,048 tokens"


def test_help_shows_complete_options_and_no_defaults_of_switches(
    verb: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    from glassllama.cli.app import app

    for command in app.registered_commands:
        page = verb(command.name, "--help").out
        assert "[default: True]" not in page
        assert "…" not in re.sub(r"N,…|mps …|train …", "", page), command.name  # cut by the table
    assert "[default: 0.0]" in verb("generate", "--help").out  # 0.0 == False
    assert "org/name[@revision][:FILE.gguf]" in verb("show", "--help").out
    assert "--no-preflight" in verb("train", "--help").out


PATHS = [
    ("train", "bigram-tinyshakespeare", "--data", ""),
    ("train", "bigram-tinyshakespeare", "--out", ""),
    ("train-tokenizer", "", "--vocab-size", "300", "--out", "x"),
    ("train-tokenizer", "x", "--vocab-size", "300", "--out", ""),
    ("perplexity", "smollm2-135m", "--file", ""),
    ("walkthrough", "hi", "--html", ""),
    ("bench", "smollm2-135m", "--out", ""),
]


@pytest.mark.parametrize("line", PATHS, ids=lambda line: f"{line[0]}{line.index('')}")
def test_an_empty_name_is_not_the_current_folder(
    line: tuple[str, ...], verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = verb(*line)
    assert ran.code == 2
    assert "expected the name of a " in ran.err
    assert "got ''" in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "typed", "expected"),
    [
        ("--temperature", "hot", "expected a number, got 'hot'"),
        ("--seed", "1.5", "expected a whole number, got '1.5'"),
        ("--threads", "0", "expected a whole number of at least 1, got '0'"),
        ("--backend", "x", "'x' is not one of 'auto', 'engine', 'torch'"),
        ("--dtype", "int8", "'int8' is not one of 'float32', 'bfloat16'"),
    ],
)
def test_usage_errors_contain_the_given_and_the_expected_value(
    option: str, typed: str, expected: str, verb: Verb
) -> None:
    ran = verb("generate", "hi", option, typed)
    assert (ran.code, ran.out) == (2, "")
    last = ran.err.splitlines()[-1]
    assert option in last
    assert f": {expected} (see 'glassllama generate -h')" in last


@pytest.mark.parametrize(
    ("option", "typed", "message"),
    [
        ("--temperature", "inf", "temperature must be 0 (greedy) or from 1e-06 to 1e+06, got inf"),
        ("--temperature", "nan", "temperature must be"),
        ("--top-p", "1.5", "top_p must be above 0 and at most 1, got 1.5"),
        ("--min-p", "-1", "min_p must be"),
        ("--top-k", "-1", "top_k must be"),
        ("--presence-penalty", "-3", "presence_penalty must be between -2 and 2, got -3.0"),
        ("--frequency-penalty", "3", "frequency_penalty must be"),
        ("--repetition-penalty", "0", "repetition_penalty must be"),
        ("--max-tokens", "0", "max_tokens must be a whole number of at least 1, got 0"),
        ("--seed", "-1", "seed must be"),
    ],
)
def test_invalid_sampling_values_are_wrong_usage(
    option: str, typed: str, message: str, verb: Verb
) -> None:
    """Reported before a model is loaded."""
    for name in ("generate", "chat"):
        ran = verb(name, "hi", option, typed)
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err.splitlines()[-1]


def test_drawings_use_characters_of_the_output_encoding() -> None:
    drawing = "✓ ███▊ ░▒▓ ▁▂█ → … 日é"
    assert drawing.encode("ascii", ASCII_DRAWING) == b"+ #### .+# _.# > . ??"
    assert "█░ é√".encode("cp437", ASCII_DRAWING).decode("cp437") == "█░ é√"
    assert drawing.encode("utf-8", ASCII_DRAWING).decode() == drawing


def test_ids_are_parsed_in_every_usual_form() -> None:
    assert read_ids("1 2 3") == read_ids("1,2,3") == read_ids("[1, 2, 3]\n") == [1, 2, 3]
    assert read_ids("") == []


def test_an_answer_that_was_cut_off_has_a_notice(llm: LLM) -> None:
    assert "cut off" in speed_line(llm.generate("Once", max_tokens=2))
    assert "cut off" not in speed_line(llm.chat("What is photosynthesis?"))


def test_a_delayed_progress_bar_appears_after_the_delay() -> None:
    progress = new_progress()
    progress.add_task("reading", total=9, unit="tokens", after=60)
    assert [*progress.get_renderables()] == []
    progress.add_task("loading", total=9, unit="tensors", after=0)
    [table] = progress.get_renderables()
    assert table.row_count == 1
