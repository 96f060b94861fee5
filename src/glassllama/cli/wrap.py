"""Lines that break between words, for text that arrives in pieces on a terminal."""

from __future__ import annotations

import os
import unicodedata
from typing import IO, Any

UNKNOWN_WIDTH = 80  # columns


def fitted(text: str, stream: IO[Any]) -> str:
    """`text` as `stream` should get it: on a terminal, lines break between words."""
    if not stream.isatty():
        return text
    try:
        width = os.get_terminal_size(stream.fileno()).columns or UNKNOWN_WIDTH
    except (OSError, ValueError):
        width = UNKNOWN_WIDTH
    lines = WordWrap(width)
    return lines.push(text) + lines.finish()


class Unwrapped:
    """The same for output that is no terminal: everything as it comes."""

    def push(self, piece: str) -> str:
        return piece

    def finish(self) -> str:
        return ""


class WordWrap:
    """Pieces of text in, pieces with line breaks in the right places out; nothing else changes.

    A word is held back until its end is known, or until it is as long as a line.
    """

    def __init__(self, width: int) -> None:
        self._width = width  # of a line, in terminal cells
        self._column = 0
        self._word: list[str] = []
        self._word_cells = 0

    def push(self, piece: str) -> str:
        """What can be shown now."""
        return "".join(self._put(character) for character in piece)

    def finish(self) -> str:
        """The word that was held back."""
        cells, word = self._word_cells, "".join(self._word)
        self._word, self._word_cells = [], 0
        if not word:
            return ""
        fits = self._column + cells <= self._width
        self._column = cells + (self._column if fits else 0)
        return word if fits else "\n" + word

    def _put(self, character: str) -> str:
        if character == "\n":
            out = self.finish() + character
            self._column = 0
            return out
        if character == " ":
            return self.finish() + self._blank()
        size = cells(character)  # a wide character is a word of its own: lines may break anywhere
        before = self.finish() if size > 1 or self._word_cells + size > self._width else ""
        self._word.append(character)
        self._word_cells += size
        return before + (self.finish() if size > 1 else "")

    def _blank(self) -> str:
        if self._column >= self._width:  # the line is full: the break takes the blank's place
            self._column = 0
            return "\n"
        self._column += 1
        return " "


def cells(character: str) -> int:
    """Columns that a terminal gives a character: East Asian wide ones take 2."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
