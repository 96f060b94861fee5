"""The stages of a tokenizer.json before its model: normalizers and pre-tokenizers.

A normalizer is text → text. A pre-tokenizer splits the pieces that the stage before left. What is
not handled here is a TokenizerError that names it, since leaving it out would change ids.

Normal forms and lower case are those of Python's `unicodedata`; all else has tables of our own.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from io import StringIO
from itertools import groupby, repeat
from typing import Literal

from glassllama.base.errors import TokenizerError
from glassllama.base.fields import Fields
from glassllama.tokenizers.byte_level import BYTE_TO_CHARACTER
from glassllama.tokenizers.patterns import Pattern, compiled
from glassllama.tokenizers.pretokenizer import GPT2, OTHER_SPLITS, SPLITS
from glassllama.tokenizers.unicode_tables import (
    Points,
    blanks,
    property_points,
    punctuation,
    word_points,
)

Normalizer = Callable[[str], str]
Match = tuple[int, int, bool]  # begin, end, whether the pattern matches there
Cut = Callable[[str], Iterator[Match]]
Piece = tuple[str, bool]  # a part of the text, and whether the text begins with it
Stage = Callable[[Iterable[Piece]], Iterable[Piece]]  # piece by piece: a text may be long

MOST_STAGES = 64
KNOWN_PATTERNS = {p for split in (*SPLITS.values(), *OTHER_SPLITS.values()) for p in split.patterns}
BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
# What the normalizer "Nmt" drops, and what becomes a blank.
NMT_DROPPED = (*range(1, 9), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F)
NMT_BLANKS = (
    *(0x09, 0x0A, 0x0C, 0x0D, 0x1680, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x2581),
    *(0xFEFF, 0xFFFD),
)
NMT: dict[int, int | None] = {**dict.fromkeys(NMT_DROPPED), **dict.fromkeys(NMT_BLANKS, 0x20)}


# Normalizers


def normalizer(stages: Sequence[Fields]) -> Normalizer | None:
    """All normalizers of a file as one; None where there are none."""
    steps = [_normalizer(stage) for stage in stages]
    if not steps:
        return None

    def normalize(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return normalize


def _normalizer(stage: Fields) -> Normalizer:
    kind = stage.text("type")
    for form in FORMS:
        if kind == form:
            return partial(unicodedata.normalize, form)
    if kind == "Prepend":
        prefix = stage.text("prepend")
        return lambda text: prefix + text if text else text
    if kind == "Replace":
        return _replace(stage)
    if kind == "Strip":
        return partial(_strip, left=stage.boolean("strip_left"), right=stage.boolean("strip_right"))
    if kind not in PLAIN_NORMALIZERS:
        stage.refuse("type", f"one of {', '.join((*FORMS, *NORMALIZERS_WITH_OPTIONS))}, "
                     f"{', '.join(PLAIN_NORMALIZERS)}")  # fmt: skip
    return PLAIN_NORMALIZERS[kind]


def _replace(stage: Fields) -> Normalizer:
    content = stage.text("content")
    kind, pattern = _pattern(stage)
    if kind == "String":
        return lambda text: text.replace(pattern, content) if pattern else text
    found = foreign(pattern)

    def replace(text: str) -> str:
        written = StringIO()  # "".join would hold a list of all parts
        written.writelines(content if hit else text[a:b] for a, b, hit in found.cut(text))
        return written.getvalue()

    return replace


def _strip(text: str, *, left: bool, right: bool) -> str:
    points = blanks()
    begin, end = 0, len(text)
    while left and begin < end and points[ord(text[begin])]:
        begin += 1
    while right and begin < end and points[ord(text[end - 1])]:
        end -= 1
    return text[begin:end]


def _without_marks(text: str) -> str:
    marks = property_points("M")
    if text.isascii():
        return text
    written = StringIO()
    written.writelines(c for c in text if not marks[ord(c)])
    return written.getvalue()


def as_byte_characters(text: str) -> str:
    """GPT-2's visible characters for the bytes of a text."""
    return text.encode().decode("latin-1").translate(BYTE_TO_CHARACTER)


NORMALIZERS_WITH_OPTIONS = ("Prepend", "Replace", "Strip")
PLAIN_NORMALIZERS: dict[str, Normalizer] = {
    "Lowercase": str.lower,
    "StripAccents": _without_marks,
    "Nmt": lambda text: text.translate(NMT),
    "ByteLevel": as_byte_characters,
}


# Pre-tokenizers


def pre_tokenizer(stages: Sequence[Fields]) -> Stage:
    """All pre-tokenizers of a file as one."""
    steps = [_pre_tokenizer(stage) for stage in stages]

    def split(pieces: Iterable[Piece]) -> Iterable[Piece]:
        for step in steps:
            pieces = step(pieces)
        return pieces

    return split


def _pre_tokenizer(stage: Fields) -> Stage:
    kind = stage.text("type")
    if kind not in PRE_TOKENIZERS:
        stage.refuse("type", f"one of {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[kind](stage)


def _split(stage: Fields) -> Stage:
    behavior = stage.text("behavior")
    if behavior not in BEHAVIORS:
        stage.refuse("behavior", f"one of {', '.join(BEHAVIORS)}")
    kind, pattern = _pattern(stage)
    cut: Cut = partial(_literal_matches, pattern) if kind == "String" else foreign(pattern).cut
    return partial(_cut_all, cut, behavior, stage.boolean("invert", False))


def foreign(pattern: str) -> Pattern:
    """A file's pattern: one that is known here needs no look at the clock."""
    return compiled(pattern, is_foreign=pattern not in KNOWN_PATTERNS)


def _pattern(stage: Fields) -> tuple[str, str]:
    """("String" or "Regex", the text) of a field `pattern`."""
    pattern = stage.object("pattern")
    kinds = [kind for kind in ("String", "Regex") if kind in pattern.values]
    if len(kinds) != 1 or len(pattern.values) != 1:
        stage.refuse("pattern", "an object with a String or a Regex")
    return kinds[0], pattern.text(kinds[0])


def _literal_matches(wanted: str, text: str) -> Iterator[Match]:
    at, size = 0, len(wanted)
    while wanted and (found := text.find(wanted, at)) >= 0:
        if at < found:
            yield at, found, False
        yield found, found + size, True
        at = found + size
    if at < len(text):
        yield at, len(text), False


def _points_matches(points: Points, text: str) -> Iterator[Match]:
    """Every character of a set is a match of its own."""
    at = 0
    for is_member, run in groupby(text, key=lambda char: points[ord(char)]):
        size = sum(1 for _ in run)
        for step in repeat(1, size) if is_member else (size,):
            yield at, at + step, bool(is_member)
            at += step


def _cut_all(cut: Cut, behavior: str, invert: bool, pieces: Iterable[Piece]) -> Iterator[Piece]:
    for piece, is_first in pieces:
        matches = ((begin, end, hit != invert) for begin, end, hit in cut(piece))
        for begin, end in _joined(matches, behavior):
            if begin < end:
                yield piece[begin:end], is_first and begin == 0
                is_first = False


def _joined(matches: Iterable[Match], behavior: str) -> Iterator[tuple[int, int]]:
    """The stretches that a behavior makes of matches and what is between them."""
    if behavior in ("Isolated", "Removed"):
        yield from ((a, b) for a, b, hit in matches if behavior == "Isolated" or not hit)
        return
    first = last = 0
    before = None  # whether the stretch before was a match; None: there is none
    for begin, end, hit in matches:
        if behavior == "Contiguous":
            joins = hit == before
        elif behavior == "MergedWithPrevious":
            joins = hit and before is False
        else:
            joins = before is True and not hit
        if not joins:
            if before is not None:
                yield first, last
            first = begin
        last, before = end, hit
    if before is not None:
        yield first, last


def _byte_level(stage: Fields) -> Stage:
    prefix = stage.boolean("add_prefix_space", True)
    pattern: Pattern | None = compiled(GPT2) if stage.boolean("use_regex", True) else None

    def split(pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece, is_first in pieces:
            text = f" {piece}" if prefix and not piece.startswith(" ") else piece
            for word in [text] if pattern is None else pattern.each_word(text):
                yield as_byte_characters(word), is_first
                is_first = False

    return split


def _digits(stage: Fields) -> Stage:
    each = stage.boolean("individual_digits", False)
    cut = partial(_points_matches, property_points("N"))
    return partial(_cut_all, cut, "Isolated" if each else "Contiguous", False)


def _punctuation(stage: Fields) -> Stage:
    behavior = stage.text("behavior", "Isolated")
    if behavior not in BEHAVIORS:
        stage.refuse("behavior", f"one of {', '.join(BEHAVIORS)}")
    return partial(_cut_all, partial(_points_matches, punctuation()), behavior, False)


def _whitespace(stage: Fields) -> Stage:
    words, gaps = word_points(), blanks()

    def kind(char: str) -> int:
        return 2 if gaps[ord(char)] else int(words[ord(char)])

    def cut(text: str) -> Iterator[Match]:
        at = 0
        for found, run in groupby(text, key=kind):
            size = sum(1 for _ in run)
            yield at, at + size, found == 2
            at += size

    return partial(_cut_all, cut, "Removed", False)


def _whitespace_split(stage: Fields) -> Stage:
    return partial(_cut_all, partial(_points_matches, blanks()), "Removed", False)


def _delimiter(stage: Fields) -> Stage:
    cut = partial(_literal_matches, stage.text("delimiter"))
    return partial(_cut_all, cut, "Removed", False)


def _metaspace(stage: Fields) -> Stage:
    sign = stage.text("replacement")
    old_name = "always" if stage.boolean("add_prefix_space", True) else "never"
    scheme = stage.text("prepend_scheme", old_name)
    if len(sign) != 1 or scheme not in ("always", "first", "never"):
        field = "replacement" if len(sign) != 1 else "prepend_scheme"
        stage.refuse(field, "one character" if len(sign) != 1 else "always, first or never")
    splits = stage.boolean("split", True)
    cut = partial(_literal_matches, sign)

    def with_sign(pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece, is_first in pieces:
            text = piece.replace(" ", sign)
            wanted = scheme == "always" or (scheme == "first" and is_first)
            yield sign + text if wanted and not text.startswith(sign) else text, is_first

    def split(pieces: Iterable[Piece]) -> Iterator[Piece]:
        return _cut_all(cut, "MergedWithNext", False, with_sign(pieces))

    return split if splits else with_sign


PRE_TOKENIZERS: dict[str, Callable[[Fields], Stage]] = {
    "Split": _split,
    "ByteLevel": _byte_level,
    "Digits": _digits,
    "Punctuation": _punctuation,
    "Whitespace": _whitespace,
    "WhitespaceSplit": _whitespace_split,
    "CharDelimiterSplit": _delimiter,
    "Metaspace": _metaspace,
}


def stage_list(document: Fields, name: str, inner: str) -> list[Fields]:
    """The stages of a field: none, one, or those of a Sequence, as objects with a `type`."""
    stage = document.object(name, None)
    if stage is None:
        return []
    if stage.text("type") != "Sequence":
        return [stage]
    found: list[Fields] = []
    for value in stage.items(inner):
        found += stage_list(Fields(stage.place, {inner: value}, TokenizerError), inner, inner)
    if len(found) > MOST_STAGES:
        raise TokenizerError(f"{stage.place}: {len(found)} stages, at most {MOST_STAGES}")
    return found
