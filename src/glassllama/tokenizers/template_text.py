"""Text with the origin of each character: written by a chat template, or from elsewhere.

A template joins, cuts and edits texts of its own and of the conversation. A special token counts as
one only if the template wrote all of its characters, so every character carries its origin:

    "<|im_end|>" of the template, "hi" of a user   <|im_end|>hi
                                                   111111111100

Every operation that is not defined here returns an ordinary `str`, which counts as text from
elsewhere: where the origin is lost, nothing can become a special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import SupportsIndex

TEMPLATE, OTHER = b"\1", b"\0"
RUNS = re.compile(TEMPLATE + b"+|" + OTHER + b"+")


class TemplateText(str):
    """A text and the `origin` of its characters: 1 the template, 0 elsewhere."""

    __slots__ = ("origin",)
    origin: bytes

    def __new__(cls, text: str, origin: bytes) -> TemplateText:
        assert len(origin) == len(text), "one origin per character"
        result = super().__new__(cls, text)
        result.origin = origin
        return result

    def __str__(self) -> str:
        return self

    def __getitem__(self, at: SupportsIndex | slice) -> str:
        if isinstance(at, slice):
            return TemplateText(str.__getitem__(self, at), self.origin[at])
        return _character(str.__getitem__(self, at), self.origin[at])

    def __iter__(self) -> Iterator[str]:
        return map(_character, str.__iter__(self), self.origin)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None, /) -> str:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(str.rsplit(self, sep, maxsplit), sep)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        first, between, last = self._parts(str.partition(self, sep), "")
        return first, between, last

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        first, between, last = self._parts(str.rpartition(self, sep), "")
        return first, between, last

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._parts(str.splitlines(self, True), "")
        if keepends:
            return whole
        lengths = map(len, str.splitlines(self))
        return [line[:length] for line, length in zip(whole, lengths, strict=True)]

    def _parts(self, parts: Iterable[str], sep: str | None) -> list[str]:
        """The parts with their origin; `sep` is between them (None: whitespace)."""
        found: list[str] = []
        at = 0
        for n, part in enumerate(parts):
            # A part after whitespace starts with none, so it is found where the whitespace ends.
            at = self.index(part, at) if sep is None else at + len(sep) * (n > 0)
            found.append(self[at : at + len(part)])
            at += len(part)
        return found

    def __add__(self, other: str, /) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str, /) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex, /) -> str:
        return TemplateText(str.__mul__(self, times), self.origin * times)

    __rmul__ = __mul__

    def join(self, texts: Iterable[str], /) -> str:
        return joined(texts, self)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        text, limit = str.replace(self, old, new, count), int(count)
        origins, at = list[bytes](), 0
        while limit and (found := self.find(old, at + (not old and origins != []))) >= 0:
            origins.append(self.origin[at:found])
            at, limit = found + len(old), limit - 1
        return TemplateText(text, origin_of(new).join([*origins, self.origin[at:]]))

    def upper(self) -> str:
        return self.with_case(str.upper(self))

    def lower(self) -> str:
        return self.with_case(str.lower(self))

    def title(self) -> str:
        return self.with_case(str.title(self))

    def capitalize(self) -> str:
        return self.with_case(str.capitalize(self))

    def swapcase(self) -> str:
        return self.with_case(str.swapcase(self))

    def with_case(self, changed: str) -> str:
        """`changed` is this text in another case; it may be longer: ß becomes SS."""
        if len(changed) == len(self):
            return TemplateText(changed, self.origin)
        return changed if 0 in self.origin else from_template(changed)


@lru_cache(2**10)
def _character(text: str, is_template: int) -> TemplateText:
    return TemplateText(text, TEMPLATE if is_template else OTHER)


def from_template(text: str) -> TemplateText:
    """A text that the template wrote."""
    return TemplateText(text, TEMPLATE * len(text))


def tracked(text: str) -> TemplateText:
    """A text with origins; those of an ordinary `str` are elsewhere."""
    return text if isinstance(text, TemplateText) else TemplateText(text, bytes(len(text)))


def origin_of(text: str) -> bytes:
    """1 for every character that the template wrote, 0 for all others."""
    return text.origin if isinstance(text, TemplateText) else bytes(len(text))


def joined(texts: Iterable[str], separator: str = "") -> TemplateText:
    """The texts joined, each character with its origin."""
    texts = [*texts]
    return TemplateText(
        str.join(separator, texts), origin_of(separator).join(map(origin_of, texts))
    )


def replace_characters(text: str, table: Mapping[str, str]) -> TemplateText:
    """Replace single characters by texts of the same origin."""
    parts = [table.get(character, character) for character in str.__iter__(text)]
    origins = [bytes((one,)) * len(part) for one, part in zip(origin_of(text), parts, strict=True)]
    return TemplateText("".join(parts), b"".join(origins))


def mask_other_text(text: TemplateText, mask: str, *, one_per_run: bool = False) -> str:
    """The template's characters, and `mask` for each other one, or for each run of them."""
    parts = []
    for run in RUNS.finditer(text.origin):
        part = text[run.start() : run.end()]
        masked = mask * (1 if one_per_run else len(part))
        parts.append(part if text.origin[run.start()] else masked)
    return "".join(parts)
