"""Reasoning: what a model writes before its answer, between marks such as `<think>`.

    <think>
    Six times seven is 42.        reasoning_content
    </think>

    42                            content

The split works on text while it is generated: a mark may be one token or come in several pieces.
Line ends beside a mark belong to the mark, as in the chat templates of Qwen 3 and SmolLM3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["reasoning_content", "content"]


class Piece(NamedTuple):
    """New text, and the field of the message to which it belongs."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class ReasoningMarks:
    """`start` and `end` of the reasoning. Some models write marks around the answer, too.

    `spaces` are characters beside a mark that belong to it.
    """

    start: str
    end: str
    answer: tuple[str, str] = ("", "")
    spaces: str = "\n"

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.start, self.end, *self.answer)))


# Qwen 3, DeepSeek-R1, SmolLM3, OLMo; Granite 3.3, 3.2; Magistral. Those with an answer mark first.
MARKS = (
    ReasoningMarks("<think>", "</think>", ("<response>", "</response>")),
    ReasoningMarks("<think>", "</think>"),
    ReasoningMarks("[THINK]", "[/THINK]"),
    ReasoningMarks("Here is my thought process:", "Here is my response:", spaces=" \n"),
)


def marks_in(is_known: Callable[[str], bool]) -> ReasoningMarks | None:
    """The first marks of which all are known: written in the template, or in the vocabulary."""
    for marks in MARKS:
        needed = (marks.end, *filter(None, marks.answer))  # a template may lack the start
        if all(map(is_known, needed)):
            return marks
    return None


class ReasoningSplitter:
    """Text while it is generated → pieces of reasoning and of the answer, without the marks.

    `is_open`: the prompt ends with the start mark. Otherwise there is reasoning only if the text
    begins with that mark; later in an answer it is ordinary text.
    """

    def __init__(self, marks: ReasoningMarks, is_open: bool) -> None:
        self.marks = marks
        self._text = ""  # not decided yet
        self._first = marks.start  # a mark that may come first, even again
        self._end = marks.end if is_open else ""  # the mark that ends the current part
        self._trim = is_open  # spaces at the start belong to the mark before them
        self.in_reasoning = is_open

    def push(self, text: str, last: bool = False) -> list[Piece]:
        """The pieces that are certain with this text; `last`: no more text follows."""
        self._text += text
        pieces = list[Piece]()
        while self._skip_marks(last) and (part := self._next_piece(last)) is not None:
            pieces += [part] if part.text else []
        return pieces

    def _skip_marks(self, last: bool) -> bool:
        """Skip what comes before the text of a part; False if more text is needed."""
        spaces = self.marks.spaces
        if self._first:
            stripped = self._text.lstrip(spaces)
            if stripped.startswith(self._first):
                self._text, self._trim = stripped[len(self._first) :], True
                self.in_reasoning = self._first == self.marks.start
                self._end = self.marks.end if self.in_reasoning else self.marks.answer[1]
            elif self._first.startswith(stripped) and not last:
                return False
            self._first = ""
        if self._trim:
            self._text = self._text.lstrip(spaces)
            self._trim = not self._text
        return bool(self._text)

    def _next_piece(self, last: bool) -> Piece | None:
        """The text up to the mark that ends this part, or what is certain of it."""
        kind: Kind = "reasoning_content" if self.in_reasoning else "content"
        at = self._text.find(self._end) if self._end else -1
        if at >= 0:
            part = self._text[:at].rstrip(self.marks.spaces)
            self._text = self._text[at + len(self._end) :]
            self._first = self.marks.answer[0] if self.in_reasoning else ""
            self._end, self._trim, self.in_reasoning = "", True, False
            return Piece(kind, part)
        size = self._decided_length(last)
        part, self._text = self._text[:size], "" if last else self._text[size:]
        return Piece(kind, part) if part else None

    def _decided_length(self, last: bool) -> int:
        """How many characters are neither the start of the end mark nor spaces before it."""
        text, end = self._text, self._end
        if not end:
            return len(text)
        cut = 0 if last else max(n for n in range(len(end)) if text.endswith(end[:n]))
        return len(text[: len(text) - cut].rstrip(self.marks.spaces))
