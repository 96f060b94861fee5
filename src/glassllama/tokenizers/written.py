"""Text that knows which of its characters a chat template wrote itself.

A template joins, cuts and edits texts of its own and of the conversation. A control token is one
only if the template wrote every character of it, so each character carries its origin with it:

    "<|im_end|>" of the template, "hi" of a user   <|im_end|>hi
                                                   111111111100

Every operation that is not defined here returns an ordinary `str`, and ordinary text counts as
foreign. Where the origin is lost, nothing can become a control token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import SupportsIndex

OWN, FOREIGN = b"\1", b"\0"
RUNS = re.compile(OWN + b"+|" + FOREIGN + b"+")


class Written(str):
    """A text and the origin of its characters: in `own`, 1 is the template's, 0 is foreign."""

    __slots__ = ("own",)
    own: bytes

    def __new__(cls, text: str, own: bytes) -> Written:
        made = super().__new__(cls, text)
        assert len(own) == len(text), "one origin per character"
        made.own = own
        return made

    def __str__(self) -> str:
        return self

    # Parts

    def __getitem__(self, at: SupportsIndex | slice) -> str:
        if isinstance(at, slice):
            return Written(str.__getitem__(self, at), self.own[at])
        return _character(str.__getitem__(self, at), self.own[at])

    def __iter__(self) -> Iterator[str]:
        return map(_character, str.__iter__(self), self.own)

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
        """The parts that follow each other in this text, `sep` (None: blanks) between them."""
        found: list[str] = []
        at = 0
        for n, part in enumerate(parts):
            # A part after blanks begins with none, so that it is found where the blanks end.
            at = self.index(part, at) if sep is None else at + len(sep) * (n > 0)
            found.append(self[at : at + len(part)])
            at += len(part)
        return found

    # Sums

    def __add__(self, other: str, /) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str, /) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex, /) -> str:
        return Written(str.__mul__(self, times), self.own * times)

    __rmul__ = __mul__

    def join(self, texts: Iterable[str], /) -> str:
        return joined(texts, self)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        text, limit = str.replace(self, old, new, count), int(count)
        origins, at = list[bytes](), 0
        while limit and (found := self.find(old, at + (not old and origins != []))) >= 0:
            origins.append(self.own[at:found])
            at, limit = found + len(old), limit - 1
        return Written(text, origin(new).join([*origins, self.own[at:]]))

    # Letters

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
        """`changed` is this text in other letters. None becomes shorter, but ß becomes SS."""
        if len(changed) == len(self):
            return Written(changed, self.own)
        return changed if 0 in self.own else written(changed)


@lru_cache(2**10)
def _character(text: str, own: int) -> Written:
    return Written(text, OWN if own else FOREIGN)


def written(text: str) -> Written:
    """A text of the template."""
    return Written(text, OWN * len(text))


def foreign(text: str) -> Written:
    """A text that knows its origin; ordinary text becomes foreign."""
    return text if isinstance(text, Written) else Written(text, bytes(len(text)))


def origin(text: str) -> bytes:
    """1 for every character that the template wrote, 0 for every other."""
    return text.own if isinstance(text, Written) else bytes(len(text))


def joined(texts: Iterable[str], separator: str = "") -> Written:
    """The texts in a row, each character with its origin."""
    texts = [*texts]
    return Written(str.join(separator, texts), origin(separator).join(map(origin, texts)))


def replaced_characters(text: str, table: Mapping[str, str]) -> Written:
    """Single characters become other text, of the same origin."""
    parts = [table.get(character, character) for character in str.__iter__(text)]
    origins = [bytes((own,)) * len(part) for own, part in zip(origin(text), parts, strict=True)]
    return Written("".join(parts), b"".join(origins))


def without_foreign(text: Written, blank: str, *, shorter: bool = False) -> str:
    """The template's characters, and `blank` for each foreign one, or for each run (`shorter`)."""
    parts = []
    for run in RUNS.finditer(text.own):
        part = text[run.start() : run.end()]
        parts.append(part if text.own[run.start()] else blank * (1 if shorter else len(part)))
    return "".join(parts)
