"""Any BPE pipeline of a tokenizer.json, run stage by stage as the file describes it.

    text → added tokens → normalizer → pre_tokenizer → pretokens → BPE → ids

Slower than bpe.py, whose backend compiles a few patterns. SentencePiece vocabularies (Llama 2,
Mistral, Gemma) write spaces as ▁, byte-level ones write bytes in GPT-2's characters; both are only
stages here. Source: the model BPE of tokenizers; tests compare the ids.

A normalizer is text → text. A pre-tokenizer splits the parts that the stage before it made. An
unknown stage is a TokenizerError, because leaving it out would change ids. Normal forms and lower
case are those of Python's `unicodedata`; all else uses the tables of patterns.py.
"""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from io import StringIO
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from glassllama.base.errors import TokenizerError
from glassllama.base.fields import Fields
from glassllama.tokenizers import patterns
from glassllama.tokenizers.backend import PYTHON, BPEBackend, Merger
from glassllama.tokenizers.bpe import BYTE_TO_CHARACTER
from glassllama.tokenizers.patterns import Match, Pattern, compiled
from glassllama.tokenizers.pretokenizer import GPT2, OTHER_SPLITS, SPLITS
from glassllama.tokenizers.sentencepiece import LONG, SHORT, SegmentEncoder
from glassllama.tokenizers.vocabulary import NEVER, WHITESPACE, AddedTokens, TokenizerBase

Merges = Mapping[tuple[int, int], tuple[int, int]]  # pair of ids → rank, id of the merged token
NO_MERGE = (NEVER, 0)
Normalizer = Callable[[str], str]
Part = tuple[str, bool]  # a part of the text, and whether the text starts with it
PreTokenizer = Callable[[Iterable[Part]], Iterable[Part]]  # lazily: a text may be long


@dataclass(frozen=True, kw_only=True)
class CharacterBPE:
    """BPE on the characters of a pretoken: one pretoken → ids.

    `ids`: the tokens that text may become. `byte_ids`: byte → id, of the bytes that have a token.
    A character without a token becomes the tokens of its bytes, or else `unknown`; None drops it.
    `fuse_unknown`: consecutive unknown characters are one. `ignore_merges`: a pretoken that is a
    token is not merged, but taken as it is.
    """

    ids: Mapping[str, int] = field(repr=False)
    merges: Merges = field(repr=False)
    byte_ids: Mapping[int, int] = field(repr=False)
    unknown: int | None
    fuse_unknown: bool
    ignore_merges: bool
    backend: BPEBackend = field(default=PYTHON, repr=False)

    def without(self, removed: Collection[int]) -> CharacterBPE:
        """The same where no text becomes one of these ids."""
        merges = {pair: made for pair, made in self.merges.items() if made[1] not in removed}
        ids = {text: id for text, id in self.ids.items() if id not in removed}
        return replace(self, ids=ids, merges=merges)

    def id_lists(self, word: str) -> Iterator[list[int]]:
        """The ids of a pretoken, some at a time."""
        if self.ignore_merges and word in self.ids:
            return iter(([self.ids[word]],))
        if len(word) <= SHORT or not self._can_cut:
            lists: Iterator[list[int]] = iter((self._segments.encode_segment(word),))
        else:
            lists = self._segments.id_lists(word)
        return self._fused(lists) if self.fuse_unknown else lists

    def _fused(self, lists: Iterator[list[int]]) -> Iterator[list[int]]:
        """One unknown for consecutive ones, also across segments."""
        last = None
        for ids in lists:
            if ids[:1] == [self.unknown] == [last]:
                ids = ids[1:]
            if ids:
                last = ids[-1]
                yield ids

    @cached_property
    def _can_cut(self) -> bool:
        """Whether all merged tokens are the text that they stand for."""
        other = {*self.byte_ids.values(), self.unknown}
        return not any(left in other or right in other for left, right in self.merges)

    @cached_property
    def _segments(self) -> SegmentEncoder:
        texts = {id: text for text, id in self.ids.items()}
        merged = [texts[id] for _, id in self.merges.values() if id in texts]
        return SegmentEncoder(merged, lambda segment: self._merged(self._symbols(segment)))

    def _symbols(self, word: str) -> list[int]:
        symbols: list[int] = []
        pending: list[int] = []  # unknowns come after bytes that follow them, as in tokenizers
        for char in word:
            if (id := self.ids.get(char)) is not None:
                symbols += [*pending, id]
                pending = []
                continue
            in_bytes = [self.byte_ids.get(byte) for byte in char.encode()] if self.byte_ids else []
            if in_bytes and None not in in_bytes:
                symbols += [id for id in in_bytes if id is not None]
            elif self.unknown is not None and not (self.fuse_unknown and pending):
                symbols += pending
                pending = [self.unknown]
        return symbols + pending

    def _merged(self, symbols: list[int]) -> list[int]:
        """The rule of `bpe.merge` on ids."""
        if len(symbols) > LONG:
            merged: list[int] = self._merger(np.array(symbols, np.int32)).tolist()
            return merged
        found = [self.merges.get(pair, NO_MERGE) for pair in pairwise(symbols)]
        while found and (lowest := min(found)) != NO_MERGE:
            at = found.index(lowest)
            symbols[at : at + 2] = [lowest[1]]
            del found[at]
            for begin in (at - 1, at):
                if 0 <= begin < len(found):
                    pair = symbols[begin], symbols[begin + 1]
                    found[begin] = self.merges.get(pair, NO_MERGE)
        return symbols

    @cached_property
    def _merger(self) -> Merger:
        return self.backend.merger((*pair, *made) for pair, made in self.merges.items())


class PipelineTokenizer(TokenizerBase):
    """Text ↔ ids by the stages of a file; a `base.interfaces.Tokenizer`.

    A lone surrogate is a TokenizerError. Bytes that are not UTF-8 decode to U+FFFD. A character
    without a token becomes what the file says: bytes, unknown or nothing. Without `specials` no
    special token is made of text, neither found nor merged.
    """

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        added: AddedTokens,
        pre_tokenizer: PreTokenizer,
        bpe: CharacterBPE,
        *,
        hides_specials: bool,
        drops_prefix: bool,
        drops_spaces: bool,
        bos: int | None,
        stop_ids: Iterable[int],
    ) -> None:
        """`bpe` makes ids of a pretoken. `hides_specials`: decoding leaves out special tokens, and
        with `drops_prefix` the space that a text starts with, as in SentencePiece; with
        `drops_spaces` all spaces of the first token, as the decoder Metaspace."""
        super().__init__(tokens, bos=bos, stop_ids=stop_ids)
        self.specials = MappingProxyType({t.text: t.id for t in added.tokens if t.is_special})
        self._added, self._pre_tokenizer, self._bpe = added, pre_tokenizer, bpe
        self._bpe_without_specials = bpe.without({*self.specials.values()})
        self._hidden = frozenset(self.specials.values()) if hides_specials else frozenset()
        self._drops_prefix, self._drops_spaces = drops_prefix, drops_spaces

    @property
    def added(self) -> Mapping[str, int]:
        return {t.text: t.id for t in self._added.tokens if not t.is_special}

    def without_added(self, texts: Iterable[str]) -> PipelineTokenizer:
        removed, other = {*texts}, copy.copy(self)
        ids = {self.added[text] for text in removed}
        tokens = [token for token in self._added.tokens if token.text not in removed]
        other._added = AddedTokens(tokens, self._added.normalize)
        other._bpe = self._bpe.without(ids)
        other._bpe_without_specials = self._bpe_without_specials.without(ids)
        return other

    def _id_lists(self, text: str, specials: bool, at_start: bool) -> Iterator[list[int]]:
        bpe = self._bpe if specials else self._bpe_without_specials
        for part in self._added.split(text, specials=specials):
            if isinstance(part, int):
                yield [part]
            else:
                for word, _ in self._pre_tokenizer([(part, at_start)]):
                    yield from bpe.id_lists(word)
            at_start = False

    def decode(self, ids: Sequence[int]) -> str:
        tokens = [self.token_bytes(id) for id in ids if id not in self._hidden]
        if self._drops_spaces and tokens:
            tokens[0] = tokens[0].replace(b" ", b"")
        data = b"".join(tokens)
        has_prefix = data.startswith(b" ") and self._drops_prefix
        return data[has_prefix:].decode("utf-8", "replace")


# Stages

MAX_STAGES = 64
KNOWN_PATTERNS = {p for split in (*SPLITS.values(), *OTHER_SPLITS.values()) for p in split.patterns}
# Behavior → which spans join the span before: (whether that is a match, whether this one is).
JOINS = {
    "Isolated": (),
    "Removed": (),
    "MergedWithPrevious": ((False, True),),
    "MergedWithNext": ((True, False),),
    "Contiguous": ((False, False), (True, True)),
}
# The characters that the normalizer "Nmt" drops, and those that become spaces.
NMT_DROPPED = (*range(1, 9), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F)
NMT_SPACES = (
    *(0x09, 0x0A, 0x0C, 0x0D, 0x1680, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x2581),
    *(0xFEFF, 0xFFFD),
)
NMT: dict[int, int | None] = {**dict.fromkeys(NMT_DROPPED), **dict.fromkeys(NMT_SPACES, 0x20)}


def stage_list(document: Fields, name: str, inner: str) -> list[Fields]:
    """The stages of a field of tokenizer.json: none, one, or those of a Sequence."""
    stage = document.object(name, None)
    if stage is None:
        return []
    if stage.text("type") != "Sequence":
        return [stage]
    found: list[Fields] = []
    for value in stage.items(inner):
        found += stage_list(Fields(stage.source, {inner: value}, TokenizerError), inner, inner)
    if len(found) > MAX_STAGES:
        raise TokenizerError(f"{stage.source}: {len(found)} stages, at most {MAX_STAGES}")
    return found


def normalizer(stages: Sequence[Fields]) -> Normalizer | None:
    """All normalizers of a file as one; None if there are none."""
    return _in_order(stages, NORMALIZERS) if stages else None


def pre_tokenizer(stages: Sequence[Fields]) -> PreTokenizer:
    """All pre-tokenizers of a file as one."""
    split: PreTokenizer = _in_order(stages, PRE_TOKENIZERS)
    return split


def _in_order(stages: Sequence[Fields], kinds: Mapping[str, Callable[[Fields], Any]]) -> Any:
    """The stages as one function. `kinds`: type → function that makes the stage."""
    steps = [kinds[_choice(stage, "type", kinds)](stage) for stage in stages]
    return lambda value: reduce(lambda made, step: step(made), steps, value)


def _choice(stage: Fields, key: str, choices: Iterable[str], *default: str) -> str:
    value = stage.text(key, *default)
    if value not in choices:
        stage.refuse(key, f"one of {', '.join(choices)}")
    return value


def _pattern(stage: Fields) -> str | Pattern:
    """The field `pattern`: a String, or a Regex, which has a time limit unless it is known."""
    pattern = stage.object("pattern")
    match [*pattern.values]:
        case ["String"]:
            return pattern.text("String")
        case ["Regex"]:
            source = pattern.text("Regex")
            return compiled(source, is_foreign=source not in KNOWN_PATTERNS)
    stage.refuse("pattern", "an object with a String or a Regex")
    raise AssertionError


def _replace(stage: Fields) -> Normalizer:
    pattern, content = _pattern(stage), stage.text("content")
    if isinstance(pattern, str):
        return lambda text: text.replace(pattern, content) if pattern else text
    return partial(_replaced, pattern, content)


def _replaced(pattern: Pattern, content: str, text: str) -> str:
    result = StringIO()  # "".join would make a list of all parts
    result.writelines(content if hit else text[a:b] for a, b, hit in pattern.spans(text))
    return result.getvalue()


def _strip(stage: Fields) -> Normalizer:
    left, right = stage.boolean("strip_left"), stage.boolean("strip_right")

    def strip(text: str) -> str:
        text = text.lstrip(WHITESPACE) if left else text
        return text.rstrip(WHITESPACE) if right else text

    return strip


def _prepend(stage: Fields) -> Normalizer:
    prefix = stage.text("prepend")
    return lambda text: prefix + text if text else text


def as_byte_characters(text: str) -> str:
    """The bytes of a text in GPT-2's characters."""
    return text.encode().decode("latin-1").translate(BYTE_TO_CHARACTER)


NORMALIZERS: dict[str, Callable[[Fields], Normalizer]] = {
    "NFC": lambda _: partial(unicodedata.normalize, "NFC"),
    "NFD": lambda _: partial(unicodedata.normalize, "NFD"),
    "NFKC": lambda _: partial(unicodedata.normalize, "NFKC"),
    "NFKD": lambda _: partial(unicodedata.normalize, "NFKD"),
    "Prepend": _prepend,
    "Replace": _replace,
    "Strip": _strip,
    "Lowercase": lambda _: str.lower,
    "StripAccents": lambda _: partial(_replaced, compiled(r"\p{M}"), ""),
    "Nmt": lambda _: lambda text: text.translate(NMT),
    "ByteLevel": lambda _: as_byte_characters,
}


def _splitter(pattern: str | Pattern, behavior: str, *, invert: bool = False) -> PreTokenizer:
    """Splits at the matches of a pattern. Each span keeps its place in the text."""
    find = partial(_literal_matches, pattern) if isinstance(pattern, str) else pattern.spans

    def split(parts: Iterable[Part]) -> Iterator[Part]:
        for part, is_first in parts:
            for begin, end in _joined(find(part), behavior, invert):
                if begin < end:
                    yield part[begin:end], is_first and begin == 0
                    is_first = False

    return split


def _literal_matches(literal: str, text: str) -> Iterator[Match]:
    found = re.finditer(re.escape(literal), text) if literal else ()
    return patterns.with_gaps(map(re.Match.span, found), len(text))


def _joined(matches: Iterable[Match], behavior: str, invert: bool) -> Iterator[tuple[int, int]]:
    """The spans that a behavior makes of matches and the text between them."""
    first, last, before = 0, 0, None
    for begin, end, hit in matches:
        is_match = hit != invert
        if behavior == "Removed" and is_match:
            continue
        if (before, is_match) not in JOINS[behavior]:
            yield first, last
            first = begin
        last, before = end, is_match
    yield first, last


def _split(stage: Fields) -> PreTokenizer:
    behavior = _choice(stage, "behavior", JOINS)
    return _splitter(_pattern(stage), behavior, invert=stage.boolean("invert", False))


def _byte_level(stage: Fields) -> PreTokenizer:
    prefix = stage.boolean("add_prefix_space", True)
    pattern = compiled(GPT2) if stage.boolean("use_regex", True) else None

    def split(parts: Iterable[Part]) -> Iterator[Part]:
        for part, is_first in parts:
            text = f" {part}" if prefix and not part.startswith(" ") else part
            for word in [text] if pattern is None else pattern.iter_split(text):
                yield as_byte_characters(word), is_first
                is_first = False

    return split


def _digits(stage: Fields) -> PreTokenizer:
    each = stage.boolean("individual_digits", False)
    return _splitter(compiled(r"\p{N}"), "Isolated" if each else "Contiguous")


def _punctuation(stage: Fields) -> PreTokenizer:
    behavior = _choice(stage, "behavior", JOINS, "Isolated")
    return _splitter(Pattern("Punctuation", [patterns.punctuation_points()]), behavior)


def _whitespace(stage: Fields) -> PreTokenizer:
    words, whitespace = patterns.word_points(), patterns.whitespace_points()
    parts: list[str | patterns.Points] = [words & ~whitespace, "+|", ~(words | whitespace), "+"]
    return _splitter(Pattern("Whitespace", parts), "Removed", invert=True)


def prepend_scheme(stage: Fields) -> str:
    """Where Metaspace adds a space: "always", "first" or "never". Old files have a boolean."""
    old_name = "always" if stage.boolean("add_prefix_space", True) else "never"
    scheme = _choice(stage, "prepend_scheme", ("always", "first", "never"), old_name)
    if old_name == "never" != scheme:
        stage.refuse("add_prefix_space", f"true with the prepend_scheme {scheme}")
    return scheme


def _metaspace(stage: Fields) -> PreTokenizer:
    symbol = stage.text("replacement")
    if len(symbol) != 1:
        stage.refuse("replacement", "one character")
    scheme = prepend_scheme(stage)

    def with_symbol(parts: Iterable[Part]) -> Iterator[Part]:
        for part, is_first in parts:
            text = part.replace(" ", symbol)
            prepends = scheme == "always" or (scheme == "first" and is_first)
            yield symbol + text if prepends and not text.startswith(symbol) else text, is_first

    splitter = _splitter(symbol, "MergedWithNext")
    return (
        (lambda parts: splitter(with_symbol(parts)))
        if stage.boolean("split", True)
        else with_symbol
    )


PRE_TOKENIZERS: dict[str, Callable[[Fields], PreTokenizer]] = {
    "Split": _split,
    "ByteLevel": _byte_level,
    "Digits": _digits,
    "Punctuation": _punctuation,
    "Whitespace": _whitespace,
    "WhitespaceSplit": lambda _: _splitter(compiled(r"\s"), "Removed"),
    "CharDelimiterSplit": lambda stage: _splitter(stage.text("delimiter"), "Removed"),
    "Metaspace": _metaspace,
}
