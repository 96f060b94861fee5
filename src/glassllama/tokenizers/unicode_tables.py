"""Classes of Unicode characters in one fixed version of Unicode (see `unicode_data.json`).

Ids depend on which characters are letters and digits. The tables are part of the package, so that
they do not change with the installed Python or `regex`. They equal those of tiktoken and
tokenizers.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError, quoted

Points = NDArray[np.bool_]  # (N_CODE_POINTS,), a set of code points

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
