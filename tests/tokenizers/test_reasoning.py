"""Reasoning is split from the answer while both are generated."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from family_templates import FAMILIES
from glassllama.tokenizers.chat import ChatML, TemplateChat
from glassllama.tokenizers.reasoning import MARKS, ReasoningMarks, ReasoningSplitter, marks_in

THINK = MARKS[1]
RESPONSE, _, BRACKETS, SENTENCES = MARKS


def split(marks: ReasoningMarks, is_open: bool, texts: list[str]) -> tuple[str, str]:
    """(reasoning, answer) of texts that are pushed one after the other."""
    splitter = ReasoningSplitter(marks, is_open)
    pieces = [piece for text in texts for piece in splitter.push(text)]
    pieces += splitter.push("", last=True)
    assert all(text for _, text in pieces)
    kinds = [kind for kind, _ in itertools.groupby(pieces, key=lambda piece: piece.kind)]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes first"
    of: dict[str, str] = {"reasoning_content": "", "content": ""}
    for kind, text in pieces:
        of[kind] += text
    return of["reasoning_content"], of["content"]


@pytest.mark.parametrize(
    ("marks", "is_open", "text", "reasoning", "answer"),
    [
        (THINK, False, "<think>\nadd\n\nthem\n</think>\n\n42", "add\n\nthem", "42"),
        (THINK, True, "add\n</think>\n\n42\n", "add", "42\n"),
        (THINK, True, "<think>\nadd</think>42", "add", "42"),
        (THINK, True, "\n\nnever ends </thin", "never ends </thin", ""),
        (THINK, True, "never ends\n", "never ends", ""),
        (THINK, False, "\n <think>x</think>", "", "\n <think>x</think>"),
        (THINK, False, "\n\n<think>x</think>\n", "x", ""),
        (THINK, False, "<think>\n\n</think>\n\n  code", "", "  code"),
        (THINK, False, " Hello <think> x </think>", "", " Hello <think> x </think>"),
        (THINK, False, "<thin", "", "<thin"),
        (THINK, False, "\n<", "", "\n<"),
        (THINK, False, "", "", ""),
        (THINK, False, "<think>a</think>b</think>c", "a", "b</think>c"),
        (THINK, False, "<think>a < b </ c <</think>d", "a < b </ c <", "d"),
        (RESPONSE, False, "<think>a</think>\n<response>\nb\n</response>\n", "a", "b"),
        (RESPONSE, False, "<think>a</think>\nb", "a", "b"),
        (RESPONSE, False, "<response>b</response>", "", "<response>b</response>"),
        (BRACKETS, False, "[THINK]a[/THINK]b", "a", "b"),
        (SENTENCES, False, "Here is my thought process: a\n\nHere is my response: b", "a", "b"),
        (SENTENCES, False, "Here is my answer", "", "Here is my answer"),
    ],
)  # fmt: skip
def test_reasoning_and_answer(
    marks: ReasoningMarks, is_open: bool, text: str, reasoning: str, answer: str
) -> None:
    for size in (1, 2, 3, 7, 99):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert split(marks, is_open, pieces) == (reasoning, answer), size


PARTS = ["<think>", "</think>", "<response>", "</response>", "\n", "a", " ", "<", "</", ">", "é日"]


@given(
    st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.sampled_from(MARKS[:2]),
    st.booleans(), st.data(),
)  # fmt: skip
def test_the_split_does_not_depend_on_the_pieces(
    text: str, marks: ReasoningMarks, is_open: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = split(marks, is_open, [text])
    assert split(marks, is_open, pieces) == whole
    removed = "".join(whole)
    for mark in (*marks.texts, "\n"):
        text, removed = text.replace(mark, ""), removed.replace(mark, "")
    assert removed == text, "nothing but marks and line ends is removed"


@given(st.text("ab\n <", max_size=9), st.text("ab\n <", max_size=9), st.booleans())
def test_the_split_is_that_of_qwens_template(thought: str, answer: str, is_open: bool) -> None:
    """The template splits an answer that has both in its content; for answers that begin so."""
    content = f"<think>\n{thought}\n</think>\n\n{answer}"
    reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    rest = content.split("</think>")[-1].lstrip("\n")
    given_text = content.removeprefix("<think>\n") if is_open else content
    assert split(THINK, is_open, [given_text]) == (reasoning, rest)


def test_nothing_certain_is_held_back() -> None:
    splitter = ReasoningSplitter(THINK, is_open=False)
    assert splitter.push("<th") == []
    assert splitter.push("ink>\nLet") == [("reasoning_content", "Let")]
    assert splitter.push(" me\n</") == [("reasoning_content", " me")]
    assert splitter.push("b>") == [("reasoning_content", "\n</b>")]
    assert splitter.push("</think>\n\nSo") == [("content", "So")]
    assert splitter.push("\n</think>") == [("content", "\n</think>")]


MARKS_OF = {
    "Qwen 3": THINK, "R1 distill": THINK, "SmolLM3": THINK, "Ministral": BRACKETS,
    "Granite 3.2": SENTENCES, "Granite 3.3": RESPONSE,
}  # fmt: skip


class Vocabulary:
    def __init__(self, *added: str) -> None:
        self.specials: dict[str, int] = {"<|im_start|>": 0, "<|im_end|>": 1}
        self.added = {text: n for n, text in enumerate(added, start=2)}


def test_marks_are_found_in_the_template_or_without_one_in_the_vocabulary() -> None:
    with_marks: Any = Vocabulary("<think>", "</think>")
    for name, source in FAMILIES.items():
        assert TemplateChat(source).reasoning_marks(with_marks) == MARKS_OF.get(name), name
    assert ChatML().reasoning_marks(with_marks) == THINK
    without: Any = Vocabulary()
    assert ChatML().reasoning_marks(without) is None
    assert marks_in(lambda _: False) is None


SWITCHES = {
    "Qwen 3": "enable_thinking", "SmolLM3": "enable_thinking", "Granite 3.2": "thinking",
    "Granite 3.3": "thinking",
}  # fmt: skip


def test_the_switch_of_reasoning_is_the_variable_that_the_template_reads() -> None:
    for name, source in FAMILIES.items():
        assert TemplateChat(source).thinking_switch == SWITCHES.get(name), name
