"""Unicode tables of one version, independent of installed packages."""

from __future__ import annotations

import numpy as np
import pytest
import tiktoken

from glassllama.base.errors import TokenizerError
from glassllama.native.tokenizers.pretokenizer import LETTER, NUMBER, character_classes
from glassllama.tokenizers.patterns import (
    N_CODE_POINTS,
    categories,
    compiled,
    property_points,
    punctuation_points,
    unicode_data,
    word_points,
)
from glassllama.tokenizers.pretokenizer import OTHER_SPLITS, SPLITS, Split, blocks
from long_mode import LONG
from tokenizers import Regex, pre_tokenizers

EVERY = [chr(point) for point in range(N_CODE_POINTS) if not 0xD800 <= point < 0xE000]
YOUNG = "\U00011de1\U00011de3\U00016ff4\U0001e6c0\u088f\U000323b0"  # since Unicode 17


def of_tiktoken(pattern: str) -> list[int]:
    one_by_one = {bytes([value]): value for value in range(256)}
    encoding = tiktoken.Encoding(
        "one class", pat_str=pattern, mergeable_ranks=one_by_one, special_tokens={}
    )
    return [ord(char) for char in bytes(encoding.encode_ordinary("".join(EVERY))).decode()]


def of_tokenizers(pattern: str) -> list[int]:
    stage = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    parts = ("".join(EVERY[at : at + 4096]) for at in range(0, len(EVERY), 4096))
    return [ord(c) for part in parts for _, span in stage.pre_tokenize_str(part)
            for c in part[slice(*span)]]  # fmt: skip


@pytest.mark.parametrize(
    "name", [*"LMNPSZC", *unicode_data()["categories"], "Han"] if LONG else ["L", "N", "P", "M"]
)
@pytest.mark.identical("categories of every code point", "tiktoken, tokenizers")
def test_categories_are_those_of_tiktoken_and_tokenizers(name: str) -> None:
    ours = np.flatnonzero(property_points(name))
    ours = ours[(ours < 0xD800) | (ours >= 0xE000)].tolist()
    assert of_tokenizers(rf"\p{{{name}}}") == ours
    if name != "Cn":  # unknown to Rust
        assert of_tiktoken(rf"\p{{{name}}}") == ours


def test_words_and_punctuation() -> None:
    assert of_tiktoken(r"\w") == np.flatnonzero(word_points()).tolist()
    strip = pre_tokenizers.Punctuation("removed")
    signs = [ord(c) for c in EVERY[:0x3100] if not strip.pre_tokenize_str(c)]
    assert signs == np.flatnonzero(punctuation_points()[:0x3100]).tolist()


def test_the_version_is_fixed() -> None:
    """Characters of a later version are unassigned: neither letters nor digits, whatever version
    of Unicode the installed `regex` has."""
    assert unicode_data()["version"] == "16.0"
    names = unicode_data()["categories"]
    assert {names[categories()[ord(char)]] for char in YOUNG} == {"Cn"}
    classes = character_classes()
    assert not {int(classes[ord(char)]) & 7 for char in YOUNG} & {LETTER, NUMBER}
    for split in (*SPLITS.values(), *OTHER_SPLITS.values()):
        expected = Split(split.patterns).pretokens("x\uffff1")  # a noncharacter: never assigned
        for char in YOUNG:
            words = [word.replace("\uffff", char) for word in expected]
            assert Split(split.patterns).pretokens(f"x{char}1") == words


PATTERNS = [
    r"\w", r"[\w]", r"\W", r"\d+", r"[^\w\s]+", r"[[:punct:]]", r"\h", r"\bx|\Bo", r"^.", r".$",
    r"(?i:[sdmt]|LL)", r"[a-z&&[^aeiou]]+", r"[]a]", r"[\]\-a]", r"\x{e9}|\u00e4|[\x41-\x43]",
    r" ?[^(\s|[.,!?…。，、।۔،])]+", r"[^\r\n\p{L}\p{N}]?+\p{L}++", r"(?:\p{Lu}|(x))y?",
    r"a{2,3}|b{,2}c",
    r"\p{^L}+",
    r"(?<=a)b|(?<!a)c|(?=d)d|(?>e+)f", r"(?i)word|o(?-i:X)", r"[一-龥ࠀ-一]+", r"\p{Han}+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_tokenizers(pattern: str) -> None:
    text = "It's a CAB, don'T x² Word oX aab bc ac deef\r\n__ é ä 日本語 12½ ſLL "
    text += "’q\u0301]-[ ⅷⓐ\u200d^ "
    text += "".join(map(chr, range(0x20, 0x700, 3)))
    stage = pre_tokenizers.Split(Regex(pattern), "isolated")
    expected = [text[begin:end] for _, (begin, end) in stage.pre_tokenize_str(text)]
    assert compiled(pattern).split(text) == expected


@pytest.mark.parametrize("pattern", ["(", ")", "[", "[b-a]", r"\p{", r"\x{zz}", r"\u12", "*", "\\"])
def test_damaged_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(TokenizerError, match="pattern") as fault:
        compiled(pattern)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("name", [*SPLITS, *OTHER_SPLITS])
def test_blocks_of_a_long_text_change_no_pretoken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = {**SPLITS, **OTHER_SPLITS}[name]
    text = "It's 12345 \u00e9te\u0301 words, (and)\r\n\n  more  \tof \U0001f999\u0301 x\ny"
    text = f"{text} \u65e5\u672c ok \n" * 40
    whole = split.pretokens(text)
    monkeypatch.setattr("glassllama.tokenizers.pretokenizer.BLOCK", 20)
    assert len([*blocks(text)]) > 40
    assert [word for words in split.pretoken_batches(text) for word in words] == whole
