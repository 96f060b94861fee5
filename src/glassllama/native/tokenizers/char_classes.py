"""What kind of character stands at a place of a UTF-8 text: letter, number, blank, line end, other.

The kinds are those of unicode_tables.py, so that compiled code and patterns know the same Unicode.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_inlined
from glassllama.tokenizers.unicode_tables import N_CODE_POINTS, blanks, property_points

Bytes = NDArray[np.uint8]

OTHER, LETTER, NUMBER, BLANK, LINE_END, NOTHING = range(6)  # \p{L} \p{N} \s [\r\n], behind the end
KIND = 7  # mask: three bits of kind, and above them how many bytes the character has
WIDTH = 3  # shift
UTF8_WIDTHS = ((0, 1), (0x80, 2), (0x800, 3), (0x10000, 4))  # first code point, bytes


@cache
def character_kinds() -> Bytes:
    """(0x110000,) uint8: of each code point the kind, and its bytes in UTF-8 << WIDTH."""
    kinds = np.zeros(N_CODE_POINTS, np.uint8)
    kinds[property_points("L")] = LETTER
    kinds[property_points("N")] = NUMBER
    kinds[blanks()] = BLANK
    kinds[[ord("\r"), ord("\n")]] = LINE_END
    for first, width in UTF8_WIDTHS:
        kinds[first:] = (kinds[first:] & KIND) | (width << WIDTH)
    return kinds


@raw_inlined
def kind_at(text: Bytes, at: Int, end: Int, kinds: Bytes) -> Int:
    """Kind and width of the character that begins at a byte of valid UTF-8."""
    if at >= end:
        return NOTHING
    byte = np.int64(text[at])
    if byte < 0x80:
        return np.int64(kinds[byte])
    point = np.int64(text[at + 1]) & 0x3F  # six bits in every byte but the first
    if byte < 0xE0:
        return np.int64(kinds[(byte & 0x1F) << 6 | point])
    point = point << 6 | (np.int64(text[at + 2]) & 0x3F)
    if byte < 0xF0:
        return np.int64(kinds[(byte & 0x0F) << 12 | point])
    return np.int64(kinds[(byte & 0x07) << 18 | point << 6 | (np.int64(text[at + 3]) & 0x3F)])
