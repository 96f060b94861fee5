"""Split patterns of tokenizers, matched with the Unicode tables of this package.

    pattern    \\p{L}+|\\s       text   "né 1"
    classes    letters, whitespace, others beyond ASCII: represented by 0x80, 0x81, 0x82
    matched    [A-Za-z\\x80]+|[\\t-\\r \\x81]   on   "n\\x80 1"

Every class in a pattern (\\p{L}, \\s, [^…]) is a set of code points. Characters beyond ASCII that
belong to the same classes of the pattern are equivalent: one representative replaces them in the
text and in the classes. So the Unicode version of `regex` has no influence. The reduced text has
the same length, so that matches apply to the original.

The syntax is Oniguruma's (Ruby's), as used by tokenizers, as far as split patterns need it; any
other construct is a TokenizerError that names it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped]
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.unicode_tables import (
    N_CODE_POINTS,
    Points,
    of_ranges,
    property_points,
    whitespace_points,
    word_points,
)

MAX_PATTERN = 2**14  # characters
MAX_CLASSES = 62  # of a pattern: one bit each
LONG_TEXT = 2**21  # characters; matches of a longer text are not collected in a list
ASCII = 0x80
# A pattern from a file has a time limit, because a hostile one may never end. The limit makes
# `regex` four times as slow, so known patterns have none.
TOO_SLOW = "pattern: takes too long on this text"
MIN_SECONDS, SECONDS_PER_CHARACTER = 10, 1e-5

CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b"}
OTHER_CASE = {"s": "\u017f", "k": "\u212a"}  # beyond ASCII: long s, kelvin sign
NUMBERS_IN_WORDS = ((0xB2, 0xB3), (0xB9, 0xB9), (0xBC, 0xBE))  # in Oniguruma's \w, not in its [\w]
NOT_IN_WORDS = ((0x200C, 0x200D),)  # in neither
GROUPS = ("(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>")
POSIX: dict[str, Callable[[], Points]] = {
    "digit": lambda: property_points("Nd"),
    "space": whitespace_points,
    "punct": lambda: property_points("P") | property_points("S"),
}


class Pattern:
    """A compiled split pattern; use `compiled`, which caches them."""

    def __init__(self, source: str, *, is_foreign: bool) -> None:
        """TokenizerError: the pattern is too long, damaged, or has an unsupported construct."""
        self._is_foreign = is_foreign
        if len(source) > MAX_PATTERN:
            raise TokenizerError(f"pattern: {len(source)} characters, at most {MAX_PATTERN}")
        self.source = source
        parts = _Reader(source).parts
        self._representatives, reduced = _reduced_pattern(parts)
        try:
            self._compiled: Any = regex.compile(reduced)
            self._find = self._compiled.findall
        except (regex.error, RecursionError, OverflowError) as fault:
            raise TokenizerError(f"pattern {quoted(source)}: {quoted(str(fault))}") from None

    def iter_split(self, text: str) -> Iterable[str]:
        """As `split`, but without a list of all parts of a long text."""
        if len(text) <= LONG_TEXT:
            return self.split(text)
        return (text[begin:end] for begin, end, _ in self.spans(text) if begin < end)

    def split(self, text: str) -> list[str]:
        """The matches and the text between them, in order; none is empty."""
        if len(text) <= 1:
            return [text] if text else []
        if len(text) > LONG_TEXT:
            return [*self.iter_split(text)]
        reduced = self._reduce(text)
        try:
            found: list[str] = self._find(reduced, timeout=self._seconds(text))
        except TimeoutError:
            raise TokenizerError(TOO_SLOW) from None
        if sum(map(len, found)) != len(text) or "" in found:
            return [text[begin:end] for begin, end, _ in self.spans(text, reduced) if begin < end]
        if reduced is text:
            return found
        ends = accumulate(map(len, found), initial=0)
        return [text[begin:end] for begin, end in pairwise(ends)]

    def spans(self, text: str, reduced: str | None = None) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, whether it is a match) of spans that cover the text.

        All matches are found before the first is yielded, so that the time of the caller does not
        count; each takes 16 bytes.
        """
        reduced = self._reduce(text) if reduced is None else reduced
        spans = array("q")
        try:
            for found in self._compiled.finditer(reduced, timeout=self._seconds(text)):
                spans.extend(found.span())
        except TimeoutError:
            raise TokenizerError(TOO_SLOW) from None
        at = 0
        for begin, end in zip(spans[::2], spans[1::2], strict=True):
            if at < begin:
                yield at, begin, False
            yield begin, end, True
            at = end
        if at < len(text):
            yield at, len(text), False

    def _seconds(self, text: str) -> float | None:
        return MIN_SECONDS + SECONDS_PER_CHARACTER * len(text) if self._is_foreign else None

    def _reduce(self, text: str) -> str:
        """The text with every character beyond ASCII replaced by its representative."""
        if text.isascii():
            return text
        parts = (text[at : at + LONG_TEXT] for at in range(0, len(text), LONG_TEXT))
        return "".join(map(self._reduce_part, parts))

    def _reduce_part(self, text: str) -> str:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        result: str = self._representatives[points].tobytes().decode("utf-32-le")
        return result


@cache
def compiled(source: str, *, is_foreign: bool = False) -> Pattern:
    return Pattern(source, is_foreign=is_foreign)


def _of_characters(characters: str) -> Points:
    return of_ranges(tuple((ord(char), ord(char)) for char in characters))


def _reduced_pattern(parts: list[str | Points]) -> tuple[NDArray[np.uint32], str]:
    """The representative of every code point, and the pattern on representatives.

    ASCII characters represent themselves; the code points after them represent equivalent others.
    """
    sets = {part.tobytes(): part for part in parts if not isinstance(part, str)}
    if len(sets) > MAX_CLASSES:
        raise TokenizerError(f"pattern: {len(sets)} different classes, at most {MAX_CLASSES}")
    changes = [np.flatnonzero(points[1:] != points[:-1]) + 1 for points in sets.values()]
    starts = np.unique(np.concatenate([np.array([ASCII]), *changes]))
    starts = starts[starts >= ASCII]
    membership = np.zeros(len(starts), np.int64)
    for bit, points in enumerate(sets.values()):
        membership |= points[starts].astype(np.int64) << bit
    _, first_index, group = np.unique(membership, return_index=True, return_inverse=True)
    representatives = np.arange(N_CODE_POINTS, dtype=np.uint32)
    representatives[ASCII:] = np.repeat(ASCII + group, np.diff(starts, append=N_CODE_POINTS))
    firsts = np.concatenate([np.arange(ASCII), starts[first_index]])
    return representatives, "".join(
        p if isinstance(p, str) else _class_pattern(p[firsts]) for p in parts
    )


def _class_pattern(members: Points) -> str:
    """The class of the representatives in `members` (ASCII + groups,), in its shorter form."""
    if members.all() or not members.any():
        return r"[\s\S]" if members.all() else "(?!)"
    forms = []
    for sign, included in (("", members), ("^", ~members)):
        edges = np.flatnonzero(np.diff(included, prepend=False, append=False))
        ranges = [f"\\U{a:08x}-\\U{b - 1:08x}" if b - a > 1 else f"\\U{a:08x}"
                  for a, b in edges.reshape(-1, 2).tolist()]  # fmt: skip
        forms.append(f"[{sign}{''.join(ranges)}]")
    return min(forms, key=len)


@dataclass
class _Reader:
    """Parses a pattern into `parts`: text that is kept, and sets of code points."""

    source: str
    at: int = 0
    parts: list[str | Points] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ignore_case = [False]
        while self.at < len(self.source):
            self._next()
        if len(self._ignore_case) != 1:
            raise self._fault("a group is not closed")

    def _fault(self, what: str) -> TokenizerError:
        return TokenizerError(f"pattern {quoted(self.source)}: {what}, at character {self.at}")

    def _read(self, size: int = 1) -> str:
        taken = self.source[self.at : self.at + size]
        if len(taken) < size:
            raise self._fault("it ends too early")
        self.at += size
        return taken

    def _until(self, end: str) -> str:
        stop = self.source.find(end, self.at)
        if stop < 0:
            raise self._fault(f"{end!r} is missing")
        taken = self.source[self.at : stop]
        self.at = stop + len(end)
        return taken

    def _next(self) -> None:
        char = self._read()
        if char == "(":
            self._open()
        elif char == ")":
            if len(self._ignore_case) == 1:
                raise self._fault("a group is closed that was not opened")
            self._ignore_case.pop()
            self.parts.append(")")
        elif char == "[":
            self.parts.append(self._bracket())
        elif char == "\\":
            self._escape()
        elif char == ".":
            self.parts.append(~_of_characters("\n"))
        elif char in "^$":
            self.parts.append(f"(?m:{char})")
        elif char == "{":
            self._count()
        elif char in "|*+?":
            self.parts.append(char)
        else:
            self._literal(char)

    def _literal(self, char: str) -> None:
        case = self._cases(char)
        plain = len(case) == 1 and char.isascii()
        self.parts.append(regex.escape(char) if plain else _of_characters(case))

    def _cases(self, char: str) -> str:
        """The character, and if case is ignored its other forms of one character."""
        if not self._ignore_case[-1]:
            return char
        forms = {char, char.lower(), char.upper(), OTHER_CASE.get(char.lower(), char)}
        return "".join(sorted(form for form in forms if len(form) == 1))

    def _open(self) -> None:
        begin = self.at - 1
        group = next((g for g in GROUPS if self.source.startswith(g, begin)), None)
        if group is not None:
            self.at = begin + len(group)
        elif self.source.startswith("?", self.at):
            flags = regex.match(r"\?(-?i)([:)])", self.source, pos=self.at)
            if flags is None:
                raise self._fault(f"{self.source[begin : begin + 4]!r} is not supported")
            self.at = flags.end()
            if flags[2] == ")":
                self._ignore_case[-1] = flags[1] == "i"
                return
            self._ignore_case.append(flags[1] == "i")
            self.parts.append("(?:")
            return
        self._ignore_case.append(self._ignore_case[-1])
        self.parts.append(group or "(?:")

    def _count(self) -> None:
        found = regex.match(r"(\d{1,4})(,?)(\d{0,4})\}|,(\d{1,4})\}", self.source, pos=self.at)
        if found is None:
            self._literal("{")
            return
        self.at = found.end()
        if self.source.startswith("+", self.at):  # in Ruby not possessive, but a repetition
            raise self._fault("'+' after a count is not supported")
        self.parts.append("{" + (found[0] if found[1] else f"0{found[0]}"))

    def _escape(self) -> None:
        char = self.source[self.at : self.at + 1]
        if char in ("b", "B"):
            self.at += 1
            word = _oniguruma_words() | of_ranges(NUMBERS_IN_WORDS)
            signs = "!=" if char == "b" else "=!"  # at a word boundary, or not
            self.parts += ["(?:(?<=", word, f")(?{signs[0]}", word]
            self.parts += [")|(?<!", word, f")(?{signs[1]}", word, "))"]
        elif char in ("w", "W"):
            self.at += 1
            word = _oniguruma_words() | of_ranges(NUMBERS_IN_WORDS)
            self.parts.append(word if char == "w" else ~word)
        elif char in ("A", "z", "Z"):
            self.at += 1
            self.parts.append({"A": r"\A", "z": r"\Z", "Z": r"(?=\n?\Z)"}[char])
        else:
            found = self._escaped()
            if isinstance(found, str):
                self._literal(found)
            else:
                self.parts.append(found)

    def _escaped(self) -> str | Points:
        """What follows a backslash, in a class or outside: a character, or a set of code points."""
        char = self._read()
        if char in CONTROLS:
            return CONTROLS[char]
        if char.lower() in SETS:
            points = SETS[char.lower()]()
            return points if char.islower() else ~points
        if char in "pP":
            if self._read() != "{":
                raise self._fault("'{' is expected after \\p")
            name = self._until("}")
            points = property_points(name.removeprefix("^"))
            return points if (char == "p") != name.startswith("^") else ~points
        if char == "x" and self.source.startswith("{", self.at):
            self._read()
            return self._code_point(self._until("}"))
        if char in "xu":
            return self._code_point(self._read(2 if char == "x" else 4))
        if char == "0":
            return "\0"
        if char.isalnum():
            raise self._fault(f"'\\{char}' is not supported")
        return char

    def _code_point(self, digits: str) -> str:
        try:
            return chr(int(digits, 16))
        except (ValueError, OverflowError):
            raise self._fault(f"{quoted(digits)} is no code point") from None

    def _bracket(self) -> Points:
        """The set of a bracketed class, after its opening bracket."""
        negated = self.source.startswith("^", self.at)
        self.at += negated
        whole: Points | None = None  # the intersection (&&) so far
        points, first = of_ranges(()), True
        while first or not self.source.startswith("]", self.at):
            if self.source.startswith("&&", self.at):
                self.at += 2
                whole = points if whole is None else whole & points
                points = of_ranges(())
            else:
                points = points | self._member()
            first = False
        self.at += 1
        points = points if whole is None else whole & points
        return ~points if negated else points

    def _member(self) -> Points:
        begin = self._one()
        is_range = self.source.startswith("-", self.at) and self.source[self.at + 1 :][:1] != "]"
        if isinstance(begin, str) and is_range:
            self.at += 1
            end = self._one()
            if not isinstance(end, str) or end < begin:
                raise self._fault("a range in a class is damaged")
            if self._ignore_case[-1] and (begin + end).isascii():
                inside = "".join(map(self._cases, map(chr, range(ord(begin), ord(end) + 1))))
                return _of_characters(inside)
            return of_ranges(((ord(begin), ord(end)),))
        return _of_characters(self._cases(begin)) if isinstance(begin, str) else begin

    def _one(self) -> str | Points:
        """A character of a class, or a set in it."""
        char = self._read()
        if char == "\\":
            return self._escaped()
        if char == "[" and self.source.startswith(":", self.at):
            self._read()
            name = self._until(":]")
            if name not in POSIX:
                raise self._fault(f"[:{name[:20]}:] is not supported")
            return POSIX[name]()
        return self._bracket() if char == "[" else char


def _oniguruma_words() -> Points:
    return word_points() & ~of_ranges(NOT_IN_WORDS)


SETS: dict[str, Callable[[], Points]] = {
    "s": whitespace_points,
    "d": lambda: property_points("Nd"),
    "w": _oniguruma_words,
    "h": lambda: _of_characters("0123456789abcdefABCDEF"),
}
