"""Where words end: the split patterns of pretokenizer.py by hand, for compiled code.

A pattern of alternatives that is tried at every place becomes a decision on the kinds of the next
characters: letter, number, blank, line end, other (char_classes.py). A test holds both ways of
splitting equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.byte_scan import WINDOW, eight_bytes, letters_in, trailing_zeros
from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.native.tokenizers.char_classes import (
    BLANK,
    KIND,
    LETTER,
    LINE_END,
    NUMBER,
    OTHER,
    WIDTH,
    kind_at,
)
from glassllama.native.tokenizers.pretokenizer_simd import ONE, words_after
from glassllama.tokenizers.pretokenizer import EACH_DIGIT, GPT2, LLAMA3, QWEN2

Bytes = NDArray[np.uint8]

LLAMA3_RULE, QWEN2_RULE, GPT2_RULE, SMOLLM_RULE = range(4)
RULES = {
    (LLAMA3,): LLAMA3_RULE,
    (QWEN2,): QWEN2_RULE,
    (GPT2,): GPT2_RULE,
    (EACH_DIGIT, GPT2): SMOLLM_RULE,
}
LONGEST_NUMBER = 3  # Llama 3: \p{N}{1,3}

SPACE, APOSTROPHE = 0x20, 0x27
TO_LOWER = 0x20  # the bit between a capital and its small letter in ASCII
S, T, R, E, V, M, L, D = (ord(letter) for letter in "strevmld")
LONG_S = (0xC5, 0xBF)  # UTF-8 of ſ, which is an s where case does not matter


@raw_inlined
def run_end(text: Bytes, at: Int, end: Int, kinds: Bytes, kind: Int) -> Int:
    """Behind all characters of one kind that follow each other from here."""
    while True:
        found = kind_at(text, at, end, kinds)
        if found & KIND != kind:
            return at
        at += found >> WIDTH


@raw_inlined
def letters_end(text: Bytes, at: Int, end: Int, kinds: Bytes) -> Int:
    """Behind all letters that follow each other from here: run_end, eight at once in ASCII."""
    while True:
        run = letters_in(eight_bytes(text, at))
        at += run
        if run < 8:
            if text[at] < 0x80:
                return at
            found = kind_at(text, at, end, kinds)
            if found & KIND != LETTER:
                return at
            at += found >> WIDTH


@raw_inlined
def ending_size(text: Bytes, at: Int, end: Int, any_case: bool) -> Int:
    """Bytes of an English ending ('s 't 're 've 'm 'll 'd) that begins here; 0: there is none."""
    if at + 1 >= end:
        return 0
    lower = TO_LOWER if any_case else 0
    first = np.int64(text[at + 1]) | lower
    if first in (S, T, M, D):
        return 2
    if at + 2 >= end:
        return 0
    if any_case and text[at + 1] == LONG_S[0] and text[at + 2] == LONG_S[1]:
        return 3
    second = np.int64(text[at + 2]) | lower
    is_ending = second == E if first in (R, V) else first == L and second == L
    return 3 if is_ending else 0


@raw_compiled
def blanks_end(text: Bytes, at: Int, end: Int, kinds: Bytes, line_ends: bool) -> Int:
    """Blanks are one word, up to the last line end; else all but one that the next word takes."""
    begin, last, behind_line_end = at, at, 0
    while True:
        found = kind_at(text, at, end, kinds)
        kind = found & KIND
        if kind != BLANK and kind != LINE_END:
            break
        last = at
        at += found >> WIDTH
        if kind == LINE_END:
            behind_line_end = at
    if line_ends and behind_line_end > 0:
        return behind_line_end
    return at if at >= end or last == begin else last


@raw_inlined
def number_end(text: Bytes, at: Int, end: Int, kinds: Bytes, longest: Int) -> Int:
    for _ in range(longest):
        found = kind_at(text, at, end, kinds)
        if found & KIND != NUMBER:
            break
        at += found >> WIDTH
    return at


@raw_inlined
def llama3_end(text: Bytes, at: Int, end: Int, kinds: Bytes, longest_number: Int) -> Int:
    """The end of the word that begins here, by the pattern LLAMA3 (or QWEN2)."""
    first = kind_at(text, at, end, kinds)
    kind, after = first & KIND, at + (first >> WIDTH)
    if kind == LETTER:
        return letters_end(text, after, end, kinds)
    if kind == NUMBER:
        return number_end(text, at, end, kinds, longest_number)
    if text[at] == APOSTROPHE:
        size = ending_size(text, at, end, True)
        if size > 0:
            return at + size
    second = kind_at(text, after, end, kinds) & KIND
    if kind != LINE_END and second == LETTER:
        return letters_end(text, after, end, kinds)
    if kind == OTHER or (text[at] == SPACE and second == OTHER):
        signs = run_end(text, after, end, kinds, OTHER)
        return run_end(text, signs, end, kinds, LINE_END)
    return blanks_end(text, at, end, kinds, True)


@raw_compiled
def gpt2_end(text: Bytes, at: Int, end: Int, kinds: Bytes) -> Int:
    """The end of the word that begins here, by the pattern GPT2."""
    if text[at] == APOSTROPHE:
        size = ending_size(text, at, end, False)
        if size > 0:
            return at + size
    begin = at + 1 if text[at] == SPACE else at
    kind = kind_at(text, begin, end, kinds) & KIND
    if kind == LETTER:
        return letters_end(text, begin, end, kinds)
    if kind in (NUMBER, OTHER):
        return run_end(text, begin, end, kinds, kind)
    return blanks_end(text, at, end, kinds, False)


@raw_inlined
def piece_end(text: Bytes, at: Int, end: Int, kinds: Bytes, rule: Int) -> Int:
    """The end of the piece within which words are looked for; SMOLLM isolates numbers first."""
    if rule != SMOLLM_RULE:
        return end
    found = kind_at(text, at, end, kinds)
    while True:
        at += found >> WIDTH
        if found & KIND == NUMBER:
            return at
        found = kind_at(text, at, end, kinds)
        if found & KIND == NUMBER or at >= end:
            return at


@raw_inlined
def word_end(text: Bytes, at: Int, end: Int, kinds: Bytes, rule: Int) -> Int:
    """The end of the word that begins here in a piece that reaches to `end`; at < end."""
    if rule <= QWEN2_RULE:
        longest_number = LONGEST_NUMBER if rule == LLAMA3_RULE else 1
        return llama3_end(text, at, end, kinds, longest_number)
    return gpt2_end(text, at, end, kinds)


@raw_inlined
def next_ends(
    text: Bytes, at: Int, stop: Int, rule: Int, kinds: Bytes, ends: NDArray[np.int64], n: Int
) -> Int:
    """The ends of one to 64 words from text[at] on into ends[n:]; the new n. at < stop."""
    if rule <= QWEN2_RULE and at + WINDOW <= stop:
        begins = words_after(text, at, rule == QWEN2_RULE, kinds)
        if begins != 0:
            while begins != 0:
                ends[n] = at + trailing_zeros(begins)
                begins &= begins - ONE
                n += 1
            return n
    ends[n] = word_end(text, at, stop, kinds, rule)
    return n + 1


@raw_entry
def word_ends(text: Bytes, size: Int, rule: Int, kinds: Bytes, ends: NDArray[np.int64]) -> Int:
    """The ends of all words of text[:size], padded UTF-8, into `ends`; how many they are.

    `ends` has room for as many as the text has bytes, and 64.
    """
    at, stop, n = 0, 0, 0
    while at < size:
        if at == stop:
            stop = piece_end(text, at, size, kinds, rule)
        n = next_ends(text, at, stop, rule, kinds, ends, n)
        at = ends[n - 1]
    return n
