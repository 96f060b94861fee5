"""Normalizers and pre-tokenizers of a tokenizer.json.

A normalizer is text → text. A pre-tokenizer splits the parts that the stage before it made. An
unknown stage is a TokenizerError, because leaving it out would change ids.

Normal forms and lower case are those of Python's `unicodedata`; all else uses unicode_tables.py.
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
    property_points,
    punctuation_points,
    whitespace_points,
    word_points,
)

Normalizer = Callable[[str], str]
Match = tuple[int, int, bool]  # begin, end, whether the pattern matches there
FindMatches = Callable[[str], Iterator[Match]]
Part = tuple[str, bool]  # a part of the text, and whether the text starts with it
PreTokenizer = Callable[[Iterable[Part]], Iterable[Part]]  # lazily: a text may be long

MAX_STAGES = 64
KNOWN_PATTERNS = {p for split in (*SPLITS.values(), *OTHER_SPLITS.values()) for p in split.patterns}
BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
# The characters that the normalizer "Nmt" drops, and those that become spaces.
NMT_DROPPED = (*range(1, 9), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F)
NMT_SPACES = (
    *(0x09, 0x0A, 0x0C, 0x0D, 0x1680, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x2581),
    *(0xFEFF, 0xFFFD),
)
NMT: dict[int, int | None] = {**dict.fromkeys(NMT_DROPPED), **dict.fromkeys(NMT_SPACES, 0x20)}


def normalizer(stages: Sequence[Fields]) -> Normalizer | None:
    """All normalizers of a file as one; None if there are none."""
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
    spans = compiled_pattern(pattern).spans

    def replace(text: str) -> str:
        result = StringIO()  # "".join would make a list of all parts
        result.writelines(content if hit else text[a:b] for a, b, hit in spans(text))
        return result.getvalue()

    return replace


def _strip(text: str, *, left: bool, right: bool) -> str:
    points = whitespace_points()
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
    result = StringIO()
    result.writelines(c for c in text if not marks[ord(c)])
    return result.getvalue()


def as_byte_characters(text: str) -> str:
    """The bytes of a text in GPT-2's characters."""
    return text.encode().decode("latin-1").translate(BYTE_TO_CHARACTER)


NORMALIZERS_WITH_OPTIONS = ("Prepend", "Replace", "Strip")
PLAIN_NORMALIZERS: dict[str, Normalizer] = {
    "Lowercase": str.lower,
    "StripAccents": _without_marks,
    "Nmt": lambda text: text.translate(NMT),
    "ByteLevel": as_byte_characters,
}


def pre_tokenizer(stages: Sequence[Fields]) -> PreTokenizer:
    """All pre-tokenizers of a file as one."""
    steps = [_pre_tokenizer(stage) for stage in stages]

    def split(parts: Iterable[Part]) -> Iterable[Part]:
        for step in steps:
            parts = step(parts)
        return parts

    return split


def _pre_tokenizer(stage: Fields) -> PreTokenizer:
    kind = stage.text("type")
    if kind not in PRE_TOKENIZERS:
        stage.refuse("type", f"one of {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[kind](stage)


def _split(stage: Fields) -> PreTokenizer:
    behavior = stage.text("behavior")
    if behavior not in BEHAVIORS:
        stage.refuse("behavior", f"one of {', '.join(BEHAVIORS)}")
    kind, pattern = _pattern(stage)
    find: FindMatches = (
        partial(_literal_matches, pattern) if kind == "String" else compiled_pattern(pattern).spans
    )
    return partial(_split_all, find, behavior, stage.boolean("invert", False))


def compiled_pattern(pattern: str) -> Pattern:
    """The pattern of a file, with a time limit unless it is a known one."""
    return compiled(pattern, is_foreign=pattern not in KNOWN_PATTERNS)


def _pattern(stage: Fields) -> tuple[str, str]:
    """("String" or "Regex", the text) of a field `pattern`."""
    pattern = stage.object("pattern")
    kinds = [kind for kind in ("String", "Regex") if kind in pattern.values]
    if len(kinds) != 1 or len(pattern.values) != 1:
        stage.refuse("pattern", "an object with a String or a Regex")
    return kinds[0], pattern.text(kinds[0])


def _literal_matches(literal: str, text: str) -> Iterator[Match]:
    at, size = 0, len(literal)
    while literal and (found := text.find(literal, at)) >= 0:
        if at < found:
            yield at, found, False
        yield found, found + size, True
        at = found + size
    if at < len(text):
        yield at, len(text), False


def _points_matches(points: Points, text: str) -> Iterator[Match]:
    """Every character of a set is one match."""
    at = 0
    for is_member, run in groupby(text, key=lambda char: points[ord(char)]):
        size = sum(1 for _ in run)
        for step in repeat(1, size) if is_member else (size,):
            yield at, at + step, bool(is_member)
            at += step


def _split_all(
    find: FindMatches, behavior: str, invert: bool, parts: Iterable[Part]
) -> Iterator[Part]:
    for part, is_first in parts:
        matches = ((begin, end, hit != invert) for begin, end, hit in find(part))
        for begin, end in _joined(matches, behavior):
            if begin < end:
                yield part[begin:end], is_first and begin == 0
                is_first = False


def _joined(matches: Iterable[Match], behavior: str) -> Iterator[tuple[int, int]]:
    """The spans that a behavior makes of matches and the text between them."""
    if behavior in ("Isolated", "Removed"):
        yield from ((a, b) for a, b, hit in matches if behavior == "Isolated" or not hit)
        return
    first = last = 0
    before = None  # whether the span before was a match; None: there is none
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


def _byte_level(stage: Fields) -> PreTokenizer:
    prefix = stage.boolean("add_prefix_space", True)
    pattern: Pattern | None = compiled(GPT2) if stage.boolean("use_regex", True) else None

    def split(parts: Iterable[Part]) -> Iterator[Part]:
        for part, is_first in parts:
            text = f" {part}" if prefix and not part.startswith(" ") else part
            for word in [text] if pattern is None else pattern.iter_split(text):
                yield as_byte_characters(word), is_first
                is_first = False

    return split


def _digits(stage: Fields) -> PreTokenizer:
    each = stage.boolean("individual_digits", False)
    find = partial(_points_matches, property_points("N"))
    return partial(_split_all, find, "Isolated" if each else "Contiguous", False)


def _punctuation(stage: Fields) -> PreTokenizer:
    behavior = stage.text("behavior", "Isolated")
    if behavior not in BEHAVIORS:
        stage.refuse("behavior", f"one of {', '.join(BEHAVIORS)}")
    return partial(_split_all, partial(_points_matches, punctuation_points()), behavior, False)


def _whitespace(stage: Fields) -> PreTokenizer:
    words, whitespace = word_points(), whitespace_points()

    def char_class(char: str) -> int:
        return 2 if whitespace[ord(char)] else int(words[ord(char)])

    def find(text: str) -> Iterator[Match]:
        at = 0
        for found, run in groupby(text, key=char_class):
            size = sum(1 for _ in run)
            yield at, at + size, found == 2
            at += size

    return partial(_split_all, find, "Removed", False)


def _whitespace_split(stage: Fields) -> PreTokenizer:
    return partial(_split_all, partial(_points_matches, whitespace_points()), "Removed", False)


def _delimiter(stage: Fields) -> PreTokenizer:
    find = partial(_literal_matches, stage.text("delimiter"))
    return partial(_split_all, find, "Removed", False)


def _metaspace(stage: Fields) -> PreTokenizer:
    symbol = stage.text("replacement")
    old_name = "always" if stage.boolean("add_prefix_space", True) else "never"
    scheme = stage.text("prepend_scheme", old_name)
    if len(symbol) != 1 or scheme not in ("always", "first", "never"):
        field = "replacement" if len(symbol) != 1 else "prepend_scheme"
        stage.refuse(field, "one character" if len(symbol) != 1 else "always, first or never")
    splits = stage.boolean("split", True)
    find = partial(_literal_matches, symbol)

    def with_symbol(parts: Iterable[Part]) -> Iterator[Part]:
        for part, is_first in parts:
            text = part.replace(" ", symbol)
            prepends = scheme == "always" or (scheme == "first" and is_first)
            yield symbol + text if prepends and not text.startswith(symbol) else text, is_first

    def split(parts: Iterable[Part]) -> Iterator[Part]:
        return _split_all(find, "MergedWithNext", False, with_symbol(parts))

    return split if splits else with_symbol


PRE_TOKENIZERS: dict[str, Callable[[Fields], PreTokenizer]] = {
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
    """The stages of a field of tokenizer.json: none, one, or those of a Sequence."""
    stage = document.object(name, None)
    if stage is None:
        return []
    if stage.text("type") != "Sequence":
        return [stage]
    found: list[Fields] = []
    for value in stage.items(inner):
        found += stage_list(Fields(stage.place, {inner: value}, TokenizerError), inner, inner)
    if len(found) > MAX_STAGES:
        raise TokenizerError(f"{stage.place}: {len(found)} stages, at most {MAX_STAGES}")
    return found
