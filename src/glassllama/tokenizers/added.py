"""Added tokens: texts that are a token wherever they stand, found before anything else is done.

Source: the flags of tokenizers' AddedToken; tests hold both to the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from glassllama.tokenizers.unicode_tables import BLANK_RANGES, word_points

BLANK_CLASS = "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in BLANK_RANGES)
BLANKS_BEHIND = re.compile(f"[{BLANK_CLASS}]*")


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A text that is one token. `is_control`: read from text only on request.

    `lstrip`, `rstrip`: it takes the blanks before or behind it; `single_word`: not where a letter,
    digit or the like touches it; `normalized`: looked for in the text as the normalizer leaves it.
    """

    id: int
    text: str
    is_control: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class AddedTokens:
    """Cuts a text at its added tokens: those of the text as it is first, then the normalized."""

    def __init__(
        self, tokens: Iterable[AddedToken], normalize: Callable[[str], str] | None = None
    ) -> None:
        self.tokens = tuple(tokens)
        self.normalize = normalize
        raw = [token for token in self.tokens if not token.normalized]
        normal = [token for token in self.tokens if token.normalized]
        self._raw = _Finder({token.text: token for token in reversed(raw)})
        # tokenizers looks for special tokens first, so of two that are equal then they are found.
        normal.sort(key=lambda token: not token.is_control)
        form = normalize or str
        self._normal = _Finder({form(token.text): token for token in reversed(normal)})

    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def cut(self, text: str, *, specials: bool) -> Iterator[str | int]:
        """Normalized text between tokens, none of it empty, and ids, in order."""
        for piece in self._raw.cut(text, specials):
            if isinstance(piece, int):
                yield piece
            else:
                normal = piece if self.normalize is None else self.normalize(piece)
                yield from self._normal.cut(normal, specials)


class _Finder:
    """Finds tokens by their text: the leftmost, and the longest of those."""

    def __init__(self, tokens: dict[str, AddedToken]) -> None:
        tokens.pop("", None)
        self._tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, longest_first))) if tokens else None
        self._only_controls = all(token.is_control for token in tokens.values())

    def cut(self, text: str, specials: bool) -> Iterator[str | int]:
        begin = 0
        nothing = self._find is None or (self._only_controls and not specials)
        for found in () if nothing or self._find is None else self._find.finditer(text):
            token = self._tokens[found[0]]
            start, stop = found.span()
            if token.is_control and not specials:
                continue
            if token.single_word and (
                is_word(text[start - 1 : start]) or is_word(text[stop : stop + 1])
            ):
                continue
            if token.lstrip:
                start = max(begin, _blanks_begin(text, begin, start))
            if token.rstrip:
                behind = BLANKS_BEHIND.match(text, stop)
                assert behind is not None
                stop = behind.end()
            if begin < start:
                yield text[begin:start]
            if start < stop:  # else the token before took all of it, as blanks
                yield token.id
            begin = stop
        if begin < len(text):
            yield text[begin:] if begin else text


def _blanks_begin(text: str, begin: int, end: int) -> int:
    while end > begin and BLANKS_BEHIND.fullmatch(text, end - 1, end):
        end -= 1
    return end


def is_word(character: str) -> bool:
    """Whether a character is a letter, digit, mark or connector; the empty text is not."""
    return character != "" and bool(word_points()[ord(character)])
