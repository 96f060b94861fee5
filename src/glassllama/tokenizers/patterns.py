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

Ids depend on which characters are letters and digits. The tables (unicode_data.json) are part of
the package and of one fixed version of Unicode, so that they do not change with the installed
Python or `regex`. They equal those of tiktoken and tokenizers.
"""

from __future__ import annotations

import base64
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped]
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError, quoted

Points = NDArray[np.bool_]  # (N_CODE_POINTS,), a set of code points
Match = tuple[int, int, bool]  # begin, end, whether the pattern matches there

N_CODE_POINTS = 0x110000
# White_Space: unchanged since Unicode 6.3.
WHITESPACE = (0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
WHITESPACE_RANGES = (
    (0x09, 0x0D), (0x2000, 0x200A), *((point, point) for point in WHITESPACE),
)  # fmt: skip
# The script Han of Unicode 16.
HAN_RANGES = (
    (0x2E80, 0x2E99), (0x2E9B, 0x2EF3), (0x2F00, 0x2FD5), (0x3005, 0x3005), (0x3007, 0x3007),
    (0x3021, 0x3029), (0x3038, 0x303B), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFA6D),
    (0xFA70, 0xFAD9), (0x16FE2, 0x16FE3), (0x16FF0, 0x16FF1), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B739), (0x2B740, 0x2B81D), (0x2B820, 0x2CEA1), (0x2CEB0, 0x2EBE0),
    (0x2EBF0, 0x2EE5D), (0x2F800, 0x2FA1D), (0x30000, 0x3134A), (0x31350, 0x323AF),
)  # fmt: skip

MAX_PATTERN = 2**14  # characters
MAX_CLASSES = 62  # of a pattern: one bit each
LONG_TEXT = 2**21  # characters; matches of a longer text are not collected in a list
ASCII = 0x80
# A pattern from a file has a time limit, because a hostile one may never end. The limit makes
# `regex` four times as slow, so known patterns have none.
TOO_SLOW = "pattern: takes too long on this text"
MIN_SECONDS, SECONDS_PER_CHARACTER = 10, 1e-5


class Pattern:
    """A compiled split pattern; use `compiled`, which caches them.

    `parts`: text that is kept, and sets of code points.
    """

    def __init__(
        self, source: str, parts: Sequence[str | Points], *, is_foreign: bool = False
    ) -> None:
        """TokenizerError: the pattern is damaged, or has too many classes."""
        self._is_foreign = is_foreign
        self._representatives, reduced = _reduced_pattern(parts)
        try:
            self._compiled: Any = regex.compile(reduced)
        except (regex.error, RecursionError, OverflowError) as fault:
            raise TokenizerError(f"pattern {quoted(source)}: {quoted(str(fault))}") from None
        self._find = self._compiled.findall

    def iter_split(self, text: str) -> Iterable[str]:
        """As `split`, but without a list of all parts of a long text."""
        if len(text) <= LONG_TEXT:
            return self.split(text)
        return (text[begin:end] for begin, end, _ in self.spans(text) if begin < end)

    def split(self, text: str) -> list[str]:
        """The matches and the text between them, in order; none is empty."""
        if len(text) <= 1:
            return [text] if text else []
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

    def spans(self, text: str, reduced: str | None = None) -> Iterator[Match]:
        """Spans that cover the text: the matches, and what is between them.

        All matches are found before the first is yielded, so that the time of the caller does not
        count; each takes 16 bytes.
        """
        reduced = self._reduce(text) if reduced is None else reduced
        ends = array("q")
        try:
            for found in self._compiled.finditer(reduced, timeout=self._seconds(text)):
                ends.extend(found.span())
        except TimeoutError:
            raise TokenizerError(TOO_SLOW) from None
        return with_gaps(zip(ends[::2], ends[1::2], strict=True), len(text))

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


def with_gaps(spans: Iterable[tuple[int, int]], size: int) -> Iterator[Match]:
    """Spans in order, and between them the rest of a text of this size."""
    at = 0
    for begin, end in spans:
        if at < begin:
            yield at, begin, False
        yield begin, end, True
        at = end
    if at < size:
        yield at, size, False


@cache
def compiled(source: str, *, is_foreign: bool = False) -> Pattern:
    """TokenizerError: the pattern is too long, damaged, or has an unsupported construct."""
    if len(source) > MAX_PATTERN:
        raise TokenizerError(f"pattern: {len(source)} characters, at most {MAX_PATTERN}")
    return Pattern(source, _Reader(source).parts, is_foreign=is_foreign)


def _reduced_pattern(parts: Sequence[str | Points]) -> tuple[NDArray[np.uint32], str]:
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


# Reading a pattern


CONTROLS = dict(zip("tnrfvae0", "\t\n\r\f\v\a\x1b\0", strict=True))
OTHER_CASE = {"s": "\u017f", "k": "\u212a"}  # beyond ASCII: long s, kelvin sign
NUMBERS_IN_WORDS = ((0xB2, 0xB3), (0xB9, 0xB9), (0xBC, 0xBE))  # in Oniguruma's \w, not in its [\w]
NOT_IN_WORDS = ((0x200C, 0x200D),)  # in neither


class _Reader:
    """Parses a pattern into `parts`: text that is kept, and sets of code points."""

    def __init__(self, source: str) -> None:
        self.parts: list[str | Points] = []
        self._source, self._at = source, 0
        self._ignore_case = [False]  # of the open groups
        while self._at < len(source):
            self._next()
        if len(self._ignore_case) != 1:
            raise self._fault("a group is not closed")

    def _fault(self, what: str) -> TokenizerError:
        return TokenizerError(f"pattern {quoted(self._source)}: {what}, at character {self._at}")

    def _read(self, syntax: str) -> Any:
        """Read what matches a regular expression here; None if nothing does."""
        found = regex.match(syntax, self._source, pos=self._at)
        self._at = self._at if found is None else found.end()
        return found

    def _next(self) -> None:
        if found := self._read(r"\((?!\?)|\(\?(?:[:=!>]|<[=!])"):
            self._ignore_case.append(self._ignore_case[-1])
            self.parts.append("(?:" if found[0] == "(" else found[0])
        elif found := self._read(r"\(\?(-?)i([:)])"):
            if found[2] == ":":
                self._ignore_case.append(False)
                self.parts.append("(?:")
            self._ignore_case[-1] = not found[1]
        elif found := self._read(r"\(.{,3}"):
            raise self._fault(f"{found[0]!r} is not supported")
        elif self._read(r"\)"):
            if len(self._ignore_case) == 1:
                raise self._fault("a group is closed that was not opened")
            self._ignore_case.pop()
            self.parts.append(")")
        elif found := self._read(r"\{(\d{1,4},?\d{0,4}|,\d{1,4})\}"):
            if self._read(r"\+"):  # in Ruby not possessive, but a repetition
                raise self._fault("'+' after a count is not supported")
            count = found[1]
            self.parts.append("{" + ("0" if count.startswith(",") else "") + count + "}")
        elif found := self._read(r"[|*+?]"):
            self.parts.append(found[0])
        elif found := self._read(r"[\^$]"):
            self.parts.append(f"(?m:{found[0]})")
        elif self._read(r"\."):
            self.parts.append(~_of_characters("\n"))
        elif found := self._read(r"\\([bBwWAzZ])"):
            self.parts += _anchor(found[1])
        elif self._read(r"\["):
            self.parts.append(self._bracket())
        elif isinstance(member := self._one(), str):
            case = self._cases(member)
            is_plain = len(case) == 1 and case.isascii()
            self.parts.append(regex.escape(case) if is_plain else _of_characters(case))
        else:
            self.parts.append(member)

    def _cases(self, char: str) -> str:
        """The character, and if case is ignored its other forms of one character."""
        if not self._ignore_case[-1]:
            return char
        forms = {char, char.lower(), char.upper(), OTHER_CASE.get(char.lower(), char)}
        return "".join(sorted(form for form in forms if len(form) == 1))

    def _one(self) -> str | Points:
        """A character, or a set: of a bracketed class or an escape."""
        if found := self._read(r"\[:(.*?):\]"):
            if found[1] not in POSIX:
                raise self._fault(f"[:{found[1][:20]}:] is not supported")
            return POSIX[found[1]]()
        if self._read(r"\["):
            return self._bracket()
        if found := self._read(r"\\([pP])\{(\^?)([^}]*)\}"):
            points = property_points(found[3])
            return points if (found[1] == "p") != bool(found[2]) else ~points
        if found := self._read(r"\\(?:x\{([^}]*)\}|x(..)|u(.{4}))"):
            digits = found[found.lastindex]
            try:
                return chr(int(digits, 16))
            except (ValueError, OverflowError):
                raise self._fault(f"{quoted(digits)} is no code point") from None
        found = self._read(r"(\\?)((?s:.))")
        if found is None or found[0] == "\\":
            raise self._fault("it ends too early")
        char: str = found[2]
        if not found[1] or not char.isalnum():
            return char
        if char in CONTROLS:
            return CONTROLS[char]
        if char.lower() in SETS:
            points = SETS[char.lower()]()
            return points if char.islower() else ~points
        raise self._fault(f"'\\{char}' is not supported")

    def _bracket(self) -> Points:
        """The set of a bracketed class, after its opening bracket."""
        negated = self._read(r"\^")
        whole = ~of_ranges(())  # the intersection (&&) so far
        points, first = of_ranges(()), True
        while first or not self._read(r"\]"):
            if self._read("&&"):
                whole, points = whole & points, of_ranges(())
            else:
                points = points | self._member()
            first = False
        return ~(whole & points) if negated else whole & points

    def _member(self) -> Points:
        begin = self._one()
        if not isinstance(begin, str):
            return begin
        if not self._read(r"-(?!\])"):
            return _of_characters(self._cases(begin))
        end = self._one()
        if not isinstance(end, str) or end < begin:
            raise self._fault("a range in a class is damaged")
        if self._ignore_case[-1] and (begin + end).isascii():
            inside = map(self._cases, map(chr, range(ord(begin), ord(end) + 1)))
            return _of_characters("".join(inside))
        return of_ranges(((ord(begin), ord(end)),))


def _anchor(name: str) -> list[str | Points]:
    """What an escape that has no place in a class matches: a position, or \\w."""
    positions = {"A": r"\A", "z": r"\Z", "Z": r"(?=\n?\Z)"}
    if name in positions:
        return [positions[name]]
    word = _oniguruma_words() | of_ranges(NUMBERS_IN_WORDS)
    if name in "wW":
        return [word if name == "w" else ~word]
    here, beyond = "!=" if name == "b" else "=!"  # at a word boundary, or not
    return ["(?:(?<=", word, f")(?{here}", word, ")|(?<!", word, f")(?{beyond}", word, "))"]


def _oniguruma_words() -> Points:
    return word_points() & ~of_ranges(NOT_IN_WORDS)


def _of_characters(characters: str) -> Points:
    return of_ranges((ord(char), ord(char)) for char in characters)


# Tables of Unicode


@cache
def unicode_data() -> dict[str, Any]:
    """The tables of unicode_data.json, written by docs/make_unicode_data.py.

    `runs` is compressed: the category of each run of code points, then its length as a varint.
    """
    data: dict[str, Any] = json.loads(Path(__file__).with_name("unicode_data.json").read_text())
    return data


@cache
def categories() -> NDArray[np.uint8]:
    """(N_CODE_POINTS,): of each code point the index of its category in `categories`."""
    raw = zlib.decompress(base64.b85decode(unicode_data()["runs"]))
    lengths: list[int] = []
    number = shift = 0
    n_runs = sum(byte < 0x80 for byte in raw) // 2  # one byte for a category, one ends a varint
    for byte in raw[n_runs:]:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            lengths.append(number)
            number = shift = 0
    return np.repeat(np.frombuffer(raw[:n_runs], np.uint8), lengths)


@cache
def property_points(name: str) -> Points:
    """The code points of \\p{name}: a category, its first letter, or Han.

    Surrogates are not characters and count as unassigned. TokenizerError: an unknown name.
    """
    if name in ("Han", "IsHan", "Script=Han"):
        return of_ranges(HAN_RANGES)
    names = unicode_data()["categories"]
    indices = [index for index, category in enumerate(names) if name in (category, category[0])]
    if not indices:
        raise TokenizerError(f"pattern: the property {quoted(name)} is not supported")
    points: Points = np.isin(categories(), indices)
    return points


@cache
def whitespace_points() -> Points:
    """\\s"""
    return of_ranges(WHITESPACE_RANGES)


@cache
def word_points() -> Points:
    """\\w, as Unicode defines it."""
    points = of_ranges(unicode_data()["more_word_ranges"])
    for name in ("L", "M", "Nd", "Nl", "Pc"):
        points |= property_points(name)
    return points


@cache
def punctuation_points() -> Points:
    """What the stage Punctuation of tokenizers splits at: ASCII signs and an older category P."""
    return property_points("P") ^ of_ranges(unicode_data()["other_punctuation_ranges"])


def of_ranges(ranges: Iterable[Sequence[int]]) -> Points:
    """The set of the code points in ranges (first, last), both inclusive."""
    points = np.zeros(N_CODE_POINTS, np.bool_)
    for first, last in ranges:
        points[first : last + 1] = True
    return points


SETS: dict[str, Callable[[], Points]] = {
    "s": whitespace_points,
    "d": lambda: property_points("Nd"),
    "w": _oniguruma_words,
    "h": lambda: _of_characters("0123456789abcdefABCDEF"),
}
POSIX: dict[str, Callable[[], Points]] = {
    "digit": SETS["d"],
    "space": whitespace_points,
    "punct": lambda: property_points("P") | property_points("S"),
}
