"""Text → words: the first step of every BPE tokenizer. Merges never reach across a word's border.

    "I'm 2 years   old" → I 'm ␣2 ␣years ␣␣ ␣old          (GPT-2)

A tokenizer is only exact with the very pattern it was trained with, so patterns are known by name
here and an unknown one is an error for those who read files. Letters are \\p{L}, digits \\p{N},
blanks \\s, in the sense of Unicode; a blank before a word belongs to the word.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

import regex  # type: ignore[import-untyped]

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


@dataclass(frozen=True)
class Split:
    """How text falls into words: patterns, each splitting the pieces that the last one left.

    Every pattern covers every character, so that the words joined are the text again, once it is
    in `normal_form` (Unicode's NFC, where the tokenizer wants it; the text as it is otherwise).
    """

    patterns: tuple[str, ...]
    normal_form: bool = False

    def words(self, text: str) -> list[str]:
        """The words of a text, in order; none is empty."""
        pieces = [unicodedata.normalize("NFC", text) if self.normal_form else text]
        for pattern in self.patterns:
            find = compiled(pattern).findall
            pieces = [word for piece in pieces for word in find(piece)]
        return pieces


@cache
def compiled(pattern: str) -> Any:
    return regex.compile(pattern)


SPLITS = {
    "llama3": Split((LLAMA3,)),
    "gpt2": Split((GPT2,)),
    "smollm": Split((EACH_DIGIT, GPT2)),
    "qwen2": Split((QWEN2,), normal_form=True),
}
