"""Text → words: the first step of every BPE tokenizer. Merges never reach across a word's border.

    "I'm 2 years   old" → I 'm ␣2 ␣years ␣␣ ␣old          (GPT-2)

A tokenizer is only exact with the very pattern it was trained with. Letters are \\p{L}, digits
\\p{N}, blanks \\s, in the sense of Unicode; a blank before a word belongs to the word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from glassllama.tokenizers.patterns import compiled

BLOCK = 2**18  # characters of a long text that are split together
# A letter ends its word where a blank follows, in every pattern below: there a text may be cut.
BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])(?=[ \n])")
# GPT-2 (Radford et al., 2019): its encoder's pattern. English endings, words, numbers, the rest.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3: `pat_str` of Meta's tokenizer. Endings in any case, numbers in groups of three, a word
# may take one sign before it, line ends stay together.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 2: as Llama 3, with every digit alone.
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# A first stage that isolates digits, one by one or in runs, and leaves what is between whole.
EACH_DIGIT = r"\p{N}|\P{N}+"
DIGIT_RUNS = r"\p{N}+|\P{N}+"


# Mistral's Tekken, and GPT-4o's and Llama 4's, which takes English endings to the word: a word is
# capitals and then small letters.
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    TEKKEN.replace(f"{SMALL}+|", f"{SMALL}+{ENDINGS}|")
    .replace(f"{SMALL}*|", f"{SMALL}*{ENDINGS}|")
    .replace(r"|\p{N}|", r"|\p{N}{1,3}|")
)
# Falcon, and llama.cpp's own default, which has one sign less in the first pattern.
SIGNS = r"[\p{P}\$\+<=>\^~\|`]+"
THREE_DIGITS = "[0-9][0-9][0-9]"
DEFAULT = (SIGNS.replace("`", ""), GPT2.removesuffix(r"|\s+"), r"\p{N}+", THREE_DIGITS)
# DeepSeek: line ends, words, signs, ideographs with kana or Hangul, digits.
CJK = "[一-龥\u0800-一가-\ud7ff]+"
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")
CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗ"
    "ὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭ"
    "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛ"
    "Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_LLM = (
    *(r"[\r\n]", rf"\s?[{CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"),
    *(r"\s+$", CJK, r"\p{N}+"),
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
VIKING = (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")


@dataclass(frozen=True)
class Split:
    """How text falls into words: patterns, each splitting the pieces that the last one left.

    What a pattern does not match stays a piece, so that the words joined are the text again, once
    it is in `normal_form` (Unicode's NFC, where the tokenizer wants it; else the text as it is).
    """

    patterns: tuple[str, ...]
    normal_form: bool = False

    def words(self, text: str) -> list[str]:
        """The words of a text, in order; none is empty."""
        pieces = [unicodedata.normalize("NFC", text) if self.normal_form else text]
        for pattern in self.patterns:
            find = compiled(pattern).words
            pieces = [word for piece in pieces for word in find(piece)]
        return [piece for piece in pieces if piece]

    def word_lists(self, text: str) -> Iterator[list[str]]:
        """The same words as `words` gives, some at a time: memory for a part of a long text."""
        for block in blocks(text):
            yield self.words(block)


def blocks(text: str) -> Iterator[str]:
    """A text in parts of about BLOCK characters, cut where every pattern here ends a word."""
    begin = 0
    while len(text) - begin > 2 * BLOCK:
        found = BETWEEN_WORDS.search(text, begin + BLOCK)
        if found is None:
            break
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:] if begin else text


SPLITS = {
    "llama3": Split((LLAMA3,)),
    "gpt2": Split((GPT2,)),
    "smollm": Split((EACH_DIGIT, GPT2)),
    "qwen2": Split((QWEN2,), normal_form=True),
}
# Patterns that GGUF files name and that a vocabulary of one's own is not learned with.
OTHER_SPLITS = {
    "tekken": Split((TEKKEN,)),
    "gpt-4o": Split((GPT4O,)),
    "falcon": Split((SIGNS, GPT2, THREE_DIGITS)),
    "default": Split(DEFAULT),
    "deepseek-llm": Split(DEEPSEEK_LLM),
    "deepseek-coder": Split(DEEPSEEK_CODER),
    "deepseek-v3": Split(DEEPSEEK_V3),
    "viking": Split(VIKING),
}
