"""The parts that can be looked at alone: line breaks, conversations, settings, help, output."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.conftest import Verb
from glassllama.base.errors import GlassError
from glassllama.cli.console import AfterAWhile, amount
from glassllama.cli.conversation import Conversation
from glassllama.cli.errors import foreseen
from glassllama.cli.help import two_columns
from glassllama.cli.options import SamplingOptions
from glassllama.cli.render import speed_line
from glassllama.cli.session import Talk
from glassllama.cli.settings import changed
from glassllama.cli.tokenize import read_ids
from glassllama.cli.wrap import WordWrap, cells
from glassllama.llm import LLM
from glassllama.tokenizers.chat import Message

TEXTS = st.text(alphabet="ab \n,日🙂é\u0301", max_size=120)


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap(width)
    return "".join(map(wrap.push, pieces)) + wrap.finish()


@given(text=TEXTS, cuts=st.lists(st.integers(0, 120)), width=st.integers(2, 20))
def test_wrapping_changes_only_blanks_into_breaks(text: str, cuts: list[int], width: int) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    lines = wrapped(pieces, width)
    assert lines == wrapped([text], width)  # however it comes
    assert all(sum(map(cells, line)) <= width for line in lines.split("\n"))
    assert [c for c in lines if c not in " \n"] == [c for c in text if c not in " \n"]


def test_wrapping_keeps_words_whole() -> None:
    assert wrapped(["the quick br", "own fox jum", "ps"], 10) == "the quick \nbrown fox \njumps"
    assert wrapped(["a" * 25], 10) == "a" * 10 + "\n" + "a" * 10 + "\n" + "a" * 5
    assert wrapped(["日本語日本語"], 4) == "日本\n語日\n本語"


def turns(*roles: str) -> list[Message]:
    return [Message(role, f"{role} {n}") for n, role in enumerate(roles)]


def test_a_long_conversation_loses_its_oldest_turns_but_never_the_system_message() -> None:
    talk = Conversation(system="be brief", turns=turns(*["user", "assistant"] * 3, "user"))
    assert talk.shorten(len, room=8) == 0
    assert talk.shorten(len, room=5) == 4
    assert [m.role for m in talk.messages] == ["system", "user", "assistant", "user"]
    assert talk.turns[-1].content == "user 6"
    assert talk.shorten(len, room=1) == 2  # the question itself stays, come what may
    assert [m.role for m in talk.messages] == ["system", "user"]


def test_talking_on_in_a_small_context_goes_on(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    class SmallContext(Talk):
        context = 128  # type: ignore[assignment]

    talk = SmallContext(
        llm, Conversation(system="Be brief."), SamplingOptions(temperature=0.0, max_tokens=8)
    )
    for number in range(6):
        talk.ask(f"What comes after the number {number}, please, and why do you think so?")
    assert talk.count(talk.conversation.messages[:-1]) <= 128 - 8
    assert talk.conversation.messages[0].role == "system"
    assert "oldest 2 messages are forgotten" in capsys.readouterr().err


def test_a_saved_conversation_comes_back(tmp_path: Path) -> None:
    talk = Conversation(system="sé\n", turns=turns("user", "assistant"))
    talk.save(tmp_path / "talk.json")
    assert Conversation.load(tmp_path / "talk.json") == talk
    Conversation().save(tmp_path / "empty.json")
    assert Conversation.load(tmp_path / "empty.json") == Conversation()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"messages": 3}', '{"messages": [3]}', "[" * 9999]
)
def test_what_is_no_conversation_names_the_file(tmp_path: Path, text: str) -> None:
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
    assert getattr(changed(SamplingOptions(), name, typed), name) == value


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("temperature", "hot"), ("temperature", "-1"), ("temperature", "nan"), ("top_k", "0"),
        ("top_k", "1.5"), ("top_p", "none"), ("max_tokens", "0"), ("ignore_eos", "maybe"),
        ("presence_penalty", "3"), ("colour", "red"), ("stop", "'open"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(name: str, typed: str) -> None:
    with pytest.raises(GlassError, match=name):
        changed(SamplingOptions(), name, typed)


def test_foreseen_faults_are_lines_and_others_are_not() -> None:
    assert foreseen(GlassError("x: y")) == "x: y"
    assert foreseen(FileNotFoundError(2, "No such file", "f.txt")) == "f.txt: No such file"
    assert "memory" in str(foreseen(MemoryError()))
    assert foreseen(ValueError("ours")) is None


def test_amounts_are_what_people_read() -> None:
    assert amount(12e6, 98.4e6, 9.14e6, "bytes") == "12.0/98.4 MB 9.1/s"
    assert amount(512, 2048, None, "tokens") == "512/2,048 tokens"


def test_help_columns_fit() -> None:
    lines = two_columns("--an-option-with-a-long-name N", "word " * 40, 80)
    assert all(len(line) <= 80 for line in lines)
    assert lines[0] == "  --an-option-with-a-long-name N"
    assert two_columns("-n N", "words", 80) == ["  -n N".ljust(28) + "words"]


@pytest.mark.parametrize("columns", [1, 25, 28, 29])
def test_help_in_a_window_too_narrow_for_it(columns: int) -> None:
    assert two_columns("-n N", "two words", columns) == ["  -n N".ljust(28) + "two words"]


def test_a_switch_that_is_on_is_explained_as_what_turns_it_off(
    verb: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    page = verb("train", "--help").out
    assert re.search("--no-preflight +Leave out the checks", page)
    from glassllama.cli.app import app

    for command in app.registered_commands:
        assert "[default: True]" not in verb(command.name, "--help").out
    assert "[default: 1.0]" in verb("generate", "--help").out  # 1.0 == True


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
    ("option", "typed", "wanted"),
    [
        ("--temperature", "inf", "a finite number of at least 0"),
        ("--temperature", "nan", "a finite number of at least 0"),
        ("--temperature", "hot", "a finite number of at least 0"),
        ("--top-p", "1.5", "a finite number of at least 0 and at most 1"),
        ("--presence-penalty", "-3", "a finite number of at least -2 and at most 2"),
        ("--max-tokens", "0", "a whole number of at least 1"),
        ("--seed", "1.5", "a whole number of at least 0"),
        ("--backend", "x", "auto, engine or torch"),
        ("--dtype", "int8", "float32 or bfloat16"),
    ],
)
def test_usage_errors_say_what_came_and_what_was_expected(
    option: str, typed: str, wanted: str, verb: Verb
) -> None:
    ran = verb("generate", "hi", option, typed)
    assert (ran.code, ran.out) == (2, "")
    last = ran.err.splitlines()[-1]
    assert option in last
    assert f": expected {wanted}, got '{typed}' (see 'glassllama generate -h')" in last


def test_a_number_that_no_option_can_have_is_wrong_usage_too(verb: Verb) -> None:
    """What the sampler alone knows, it says before a model is loaded."""
    for name in ("generate", "chat"):
        ran = verb(name, "hi", "--repetition-penalty", "0")
        assert ran.code == 2
        assert "repetition_penalty must be" in ran.err.splitlines()[-1]


def test_drawings_are_drawn_with_what_the_output_has() -> None:
    from glassllama.cli import ascii_fallback

    drawing = "✓ ███▊ ░▒▓ ▁▂█ → … 日é"
    assert drawing.encode("ascii", ascii_fallback.NAME) == b"+ #### .+# _.# > . ??"
    assert "█░ é√".encode("cp437", ascii_fallback.NAME).decode("cp437") == "█░ é√"
    assert drawing.encode("utf-8", ascii_fallback.NAME).decode() == drawing


def test_ids_are_read_in_every_usual_form() -> None:
    assert read_ids("1 2 3") == read_ids("1,2,3") == read_ids("[1, 2, 3]\n") == [1, 2, 3]
    assert read_ids("") == []


def test_an_answer_that_was_cut_says_so(llm: LLM) -> None:
    assert "cut off" in speed_line(llm.generate("Once", max_tokens=2))
    assert "cut off" not in speed_line(llm.chat("What is photosynthesis?"))


def test_a_bar_comes_only_to_work_that_lasts() -> None:
    told: list[tuple[int, int]] = []
    arrived = Event()

    def show(done: int, total: int) -> None:
        told.append((done, total))
        arrived.set()

    soon_over = AfterAWhile(show, 60)
    soon_over(0, 9)
    soon_over(9, 9)
    soon_over.stop()
    assert told == []
    lasting = AfterAWhile(show, 0.01)
    lasting(0, 9)
    assert arrived.wait(30), "it shows itself, although nothing more was told"
    lasting(5, 9)
    lasting.stop()
    lasting(6, 9)
    assert told == [(0, 9), (5, 9)]
