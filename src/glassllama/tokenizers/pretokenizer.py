"""Pre-tokenization: text → pretokens, the first step of BPE. Nothing merges across pretokens.

    "I'm 2 years   old" → I 'm ␣2 ␣years ␣␣ ␣old          (GPT-2)

A tokenizer gives the right ids only with the pattern it was trained with. Letters are \\p{L},
digits \\p{N}, whitespace \\s, as Unicode defines them; a space belongs to the word after it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from glassllama.tokenizers.patterns import compiled

BLOCK = 2**18  # characters of a long text that are split together
# Every pattern below ends a pretoken between a letter and a space: a text may be cut there.
BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])(?=[ \n])")
# GPT-2 (Radford et al., 2019): English contractions, words, numbers, the rest.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3: `pat_str` of Meta's tokenizer. Contractions in any case, numbers in groups of three, a
# word may include one other character before it, newlines stay together.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 2: as Llama 3, with single digits.
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# A first step that isolates digits, one by one or in runs.
EACH_DIGIT = r"\p{N}|\P{N}+"
DIGIT_RUNS = r"\p{N}+|\P{N}+"

# Mistral's Tekken; GPT-4o and Llama 4, where a contraction belongs to its word. A word is upper
# case, then lower case letters.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    TEKKEN.replace(f"{LOWER}+|", f"{LOWER}+{CONTRACTIONS}|")
    .replace(f"{LOWER}*|", f"{LOWER}*{CONTRACTIONS}|")
    .replace(r"|\p{N}|", r"|\p{N}{1,3}|")
)
# Falcon, and llama.cpp's default, which has one character less in the first pattern.
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
THREE_DIGITS = "[0-9][0-9][0-9]"
DEFAULT = (PUNCTUATION.replace("`", ""), GPT2.removesuffix(r"|\s+"), r"\p{N}+", THREE_DIGITS)
# DeepSeek: newlines, words, punctuation, ideographs with kana or Hangul, digits.
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
    """How a text is split: each pattern splits the parts that the pattern before it made.

    Text that a pattern does not match is a part, too: all pretokens joined are the text again, in
    Unicode's normal form NFC if `normalize_nfc`.
    """

    patterns: tuple[str, ...]
    normalize_nfc: bool = False

    def pretokens(self, text: str) -> list[str]:
        """The pretokens of a text, in order; none is empty."""
        parts = [unicodedata.normalize("NFC", text) if self.normalize_nfc else text]
        for pattern in self.patterns:
            split = compiled(pattern).split
            parts = [found for part in parts for found in split(part)]
        return [part for part in parts if part]

    def pretoken_batches(self, text: str) -> Iterator[list[str]]:
        """The same pretokens, a block of the text at a time: bounded memory for a long text."""
        for block in blocks(text):
            yield self.pretokens(block)


def blocks(text: str) -> Iterator[str]:
    """A text in parts of about BLOCK characters, cut where every pattern ends a pretoken."""
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
    "qwen2": Split((QWEN2,), normalize_nfc=True),
}
# Patterns that GGUF files name; vocabularies are not learned with them.
OTHER_SPLITS = {
    "tekken": Split((TEKKEN,)),
    "gpt-4o": Split((GPT4O,)),
    "falcon": Split((PUNCTUATION, GPT2, THREE_DIGITS)),
    "default": Split(DEFAULT),
    "deepseek-llm": Split(DEEPSEEK_LLM),
    "deepseek-coder": Split(DEEPSEEK_CODER),
    "deepseek-v3": Split(DEEPSEEK_V3),
    "viking": Split(VIKING),
}
