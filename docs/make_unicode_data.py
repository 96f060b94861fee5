"""Write tokenizers/unicode_data.json: the general category of every code point.

python docs/make_unicode_data.py      (with the dev extra)

The categories are those of tiktoken and tokenizers; a test compares all code points.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken

from tokenizers import pre_tokenizers

TARGET = Path(__file__).parent.parent / "src" / "glassllama" / "tokenizers" / "unicode_data.json"
VERSION = "16.0"  # of tiktoken 0.14's and tokenizers 0.23's tables of categories
CATEGORIES = (
    "Cn Cc Cf Co Ll Lm Lo Lt Lu Mc Me Mn Nd Nl No Pc Pd Pe Pf Pi Po Ps Sc Sk Sm So Zl Zp Zs"
).split()
N_CODE_POINTS = 0x110000
EVERY = [chr(point) for point in range(N_CODE_POINTS) if not 0xD800 <= point < 0xE000]


def main() -> None:
    categories = np.zeros(N_CODE_POINTS, np.uint8)
    for number, name in enumerate(CATEGORIES[1:], 1):
        categories[of_tiktoken(rf"\p{{{name}}}")] = number
    starts = np.flatnonzero(np.diff(categories, prepend=255))
    lengths = np.diff(starts, append=N_CODE_POINTS)
    runs = bytes(categories[starts]) + b"".join(varint(int(length)) for length in lengths)
    strip = pre_tokenizers.Punctuation("removed")
    signs = [ord(char) for char in EVERY if not strip.pre_tokenize_str(char)]
    by_category = {p for p in range(N_CODE_POINTS) if CATEGORIES[categories[p]].startswith("P")}
    differ = ranges(sorted({*signs} ^ by_category))
    words = np.isin(categories, [n for n, c in enumerate(CATEGORIES) if c[0] in "LM"])
    words |= np.isin(categories, [CATEGORIES.index(c) for c in ("Nd", "Nl", "Pc")])
    more = ranges(sorted({*of_tiktoken(r"\w")} - {*np.flatnonzero(words).tolist()}))
    document = {
        "comment": "Made by docs/make_unicode_data.py: general categories of all code points.",
        "version": VERSION,
        "categories": CATEGORIES,
        "more_word_ranges": more,
        "other_punctuation_ranges": differ,  # Punctuation of tokenizers has older tables
        "runs": base64.b85encode(zlib.compress(runs, 9)).decode(),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def of_tiktoken(pattern: str) -> list[int]:
    one_by_one = {bytes([value]): value for value in range(256)}
    encoding = tiktoken.Encoding(
        "one class", pat_str=pattern, mergeable_ranks=one_by_one, special_tokens={}
    )
    return [ord(char) for char in bytes(encoding.encode_ordinary("".join(EVERY))).decode()]


def ranges(points: Iterable[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for point in points:
        if found and found[-1][1] == point - 1:
            found[-1] = (found[-1][0], point)
        else:
            found.append((point, point))
    return found


def varint(number: int) -> bytes:
    written = b""
    while number > 0x7F:
        written += bytes([number & 0x7F | 0x80])
        number >>= 7
    return written + bytes([number])


if __name__ == "__main__":
    main()
