"""Write tokenizers/unicode_data.py: what each code point is, as tiktoken and tokenizers know it.

python docs/make_unicode_data.py      (with the dev extra; a test compares all code points)
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken

from tokenizers import pre_tokenizers

TARGET = Path(__file__).parent.parent / "src" / "glassllama" / "tokenizers" / "unicode_data.py"
VERSION = "16.0"  # of tiktoken 0.14's and tokenizers 0.23's tables of categories
CATEGORIES = (
    "Cn Cc Cf Co Ll Lm Lo Lt Lu Mc Me Mn Nd Nl No Pc Pd Pe Pf Pi Po Ps Sc Sk Sm So Zl Zp Zs"
).split()
N_CODE_POINTS = 0x110000
EVERY = [chr(point) for point in range(N_CODE_POINTS) if not 0xD800 <= point < 0xE000]
LINE = 92  # characters


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
    TARGET.write_text(
        '"""Made by docs/make_unicode_data.py: general categories of every code point."""\n\n'
        f'VERSION = "{VERSION}"\n'
        f'CATEGORIES = (\n    "{" ".join(CATEGORIES)}"\n).split()\n'
        + "MORE_WORD_RANGES = (\n"
        + "".join(f"    {line},\n" for line in lines_of_ranges(more))
        + ")  # fmt: skip\n"
        + "# Where tokenizers' Punctuation, which has older tables, is not category P.\n"
        + "OTHER_PUNCTUATION_RANGES = (\n"
        + "".join(f"    {line},\n" for line in lines_of_ranges(differ))
        + ")  # fmt: skip\n"
        "# zlib, base 85: the category of each run of code points, then its length as a varint.\n"
        "RUNS = (\n" + "".join(f'    "{line}"\n' for line in cut(packed(runs))) + ")\n",
        "utf-8",
    )


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


def lines_of_ranges(pairs: list[tuple[int, int]]) -> list[str]:
    return [", ".join(map(str, pairs[at : at + 5])) for at in range(0, len(pairs), 5)]


def varint(number: int) -> bytes:
    written = b""
    while number > 0x7F:
        written += bytes([number & 0x7F | 0x80])
        number >>= 7
    return written + bytes([number])


def packed(raw: bytes) -> str:
    return base64.b85encode(zlib.compress(raw, 9)).decode()


def cut(text: str) -> list[str]:
    return [text[at : at + LINE] for at in range(0, len(text), LINE)]


if __name__ == "__main__":
    main()
