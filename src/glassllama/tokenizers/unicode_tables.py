"""What each code point is, in one fixed version of Unicode (`unicode_data.VERSION`).

Ids depend on what a letter or a digit is. The tables are our own, so that they do not change with
the installed Python or `regex`; they are those of tiktoken and tokenizers.
"""

from __future__ import annotations

import base64
import zlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.unicode_data import (
    CATEGORIES,
    MORE_WORD_RANGES,
    OTHER_PUNCTUATION_RANGES,
    RUNS,
)

Points = NDArray[np.bool_]  # (N_CODE_POINTS,), whether each code point belongs to a set

N_CODE_POINTS = 0x110000
# White_Space: unchanged since Unicode 6.3.
BLANKS = (0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
BLANK_RANGES = ((0x09, 0x0D), (0x2000, 0x200A), *((point, point) for point in BLANKS))
# The script Han of Unicode 16.
HAN_RANGES = (
    (0x2E80, 0x2E99), (0x2E9B, 0x2EF3), (0x2F00, 0x2FD5), (0x3005, 0x3005), (0x3007, 0x3007),
    (0x3021, 0x3029), (0x3038, 0x303B), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFA6D),
    (0xFA70, 0xFAD9), (0x16FE2, 0x16FE3), (0x16FF0, 0x16FF1), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B739), (0x2B740, 0x2B81D), (0x2B820, 0x2CEA1), (0x2CEB0, 0x2EBE0),
    (0x2EBF0, 0x2EE5D), (0x2F800, 0x2FA1D), (0x30000, 0x3134A), (0x31350, 0x323AF),
)  # fmt: skip


@cache
def categories() -> NDArray[np.uint8]:
    """(N_CODE_POINTS,): of each code point the place of its category in CATEGORIES."""
    raw = zlib.decompress(base64.b85decode(RUNS))
    lengths: list[int] = []
    number = shift = 0
    n_runs = sum(byte < 0x80 for byte in raw) // 2  # a category and a varint's last byte each
    for byte in raw[n_runs:]:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            lengths.append(number)
            number = shift = 0
    return np.repeat(np.frombuffer(raw[:n_runs], np.uint8), lengths)


@cache
def property_points(name: str) -> Points:
    """The code points of \\p{name}: a category, its first letter, or Han. TokenizerError if other.

    Surrogates, which are no characters, count as unassigned.
    """
    if name in ("Han", "IsHan", "Script=Han"):
        return of_ranges(HAN_RANGES)
    places = [at for at, category in enumerate(CATEGORIES) if name in (category, category[0])]
    if not places:
        raise TokenizerError(f"pattern: the property {quoted(name)} is not supported")
    points: Points = np.isin(categories(), places)
    return points


@cache
def blanks() -> Points:
    """\\s"""
    return of_ranges(BLANK_RANGES)


@cache
def word_points() -> Points:
    """\\w, as Unicode defines it."""
    points = of_ranges(MORE_WORD_RANGES)
    for name in ("L", "M", "Nd", "Nl", "Pc"):
        points |= property_points(name)
    return points


@cache
def punctuation() -> Points:
    """What tokenizers' stage Punctuation cuts: ASCII's signs, and category P of an older table."""
    return property_points("P") ^ of_ranges(OTHER_PUNCTUATION_RANGES)


def of_ranges(ranges: tuple[tuple[int, int], ...]) -> Points:
    points = np.zeros(N_CODE_POINTS, np.bool_)
    for first, last in ranges:
        points[first : last + 1] = True
    return points
