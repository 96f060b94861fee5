"""Pre-tokenization in compiled code: where the pretokens of a UTF-8 text end.

The split patterns of tokenizers/pretokenizer.py, written out by hand. A list of alternatives that
is tried at every position becomes a decision on the classes of the next characters: letter, number,
whitespace, newline, other. For Llama 3 and Qwen 2 a second way decides 64 bytes at once. Tests hold
both to the patterns. In this package a pretoken is called a word.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_compiled, raw_entry, raw_inlined
from glassllama.native.jit.memory import (
    WINDOW,
    bytes_within,
    eight_bytes,
    leading_zeros,
    letters_in,
    trailing_zeros,
)
from glassllama.tokenizers.patterns import N_CODE_POINTS, property_points, whitespace_points
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

TO_LOWER = 0x20  # the bit that differs between upper and lower case in ASCII
S, T, R, E, V, M, L, D = (ord(letter) for letter in "strevmld")
LONG_S = (0xC5, 0xBF)  # UTF-8 of ſ, which is an s where case does not matter

# Classes of characters: \p{L}, \p{N}, \s, [\r\n]; END_OF_TEXT: after the last character.
OTHER, LETTER, NUMBER, WHITESPACE, NEWLINE, END_OF_TEXT = range(6)
CLASS_MASK, WIDTH_SHIFT = 7, 3  # of an entry: the class in three bits, above it the UTF-8 width
UTF8_WIDTHS = ((0, 1), (0x80, 2), (0x800, 3), (0x10000, 4))  # first code point, bytes

ONE, TWO, THREE, LAST = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(63)
DOUBLINGS = (np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(8), np.uint64(16), np.uint64(32))
CAPITAL_A, SMALL_A, LETTERS = ord("A"), ord("a"), 26
ZERO, DIGITS = ord("0"), 10
SPACE, APOSTROPHE, TAB, LINE_FEED, RETURN = 0x20, 0x27, 0x09, 0x0A, 0x0D
VERTICAL_TAB, VERTICAL_TAB_AND_FORM_FEED = 0x0B, 2
FIRST_NON_ASCII, NUM_NON_ASCII = 0x80, 0x80
FIRST_CONTINUATION, NUM_CONTINUATION = 0x80, 0x40  # bytes of a character but its first
ALL = np.uint64(2**64 - 1)


@cache
def character_classes() -> Bytes:
    """(0x110000,) uint8: class of each code point | its UTF-8 width << WIDTH_SHIFT."""
    classes = np.zeros(N_CODE_POINTS, np.uint8)
    classes[property_points("L")] = LETTER
    classes[property_points("N")] = NUMBER
    classes[whitespace_points()] = WHITESPACE
    classes[[ord("\r"), ord("\n")]] = NEWLINE
    for first, width in UTF8_WIDTHS:
        classes[first:] = (classes[first:] & CLASS_MASK) | (width << WIDTH_SHIFT)
    return classes


@raw_inlined
def class_at(text: Bytes, at: Int, end: Int, classes: Bytes) -> Int:
    """The entry (class and width) of the character that starts at a byte of valid UTF-8."""
    if at >= end:
        return END_OF_TEXT
    byte = np.int64(text[at])
    if byte < 0x80:
        return np.int64(classes[byte])
    point = np.int64(text[at + 1]) & 0x3F  # six bits in every byte after the first
    if byte < 0xE0:
        return np.int64(classes[(byte & 0x1F) << 6 | point])
    point = point << 6 | (np.int64(text[at + 2]) & 0x3F)
    if byte < 0xF0:
        return np.int64(classes[(byte & 0x0F) << 12 | point])
    return np.int64(classes[(byte & 0x07) << 18 | point << 6 | (np.int64(text[at + 3]) & 0x3F)])


@raw_inlined
def run_end(text: Bytes, at: Int, end: Int, classes: Bytes, char_class: Int) -> Int:
    """The end of the run of characters of one class that starts at `at`."""
    while True:
        found = class_at(text, at, end, classes)
        if found & CLASS_MASK != char_class:
            return at
        at += found >> WIDTH_SHIFT


@raw_inlined
def letters_end(text: Bytes, at: Int, end: Int, classes: Bytes) -> Int:
    """`run_end` for letters; ASCII letters eight bytes at once."""
    while True:
        run = letters_in(eight_bytes(text, at))
        at += run
        if run < 8:
            if text[at] < 0x80:
                return at
            found = class_at(text, at, end, classes)
            if found & CLASS_MASK != LETTER:
                return at
            at += found >> WIDTH_SHIFT


@raw_inlined
def contraction_size(text: Bytes, at: Int, end: Int, any_case: bool) -> Int:
    """Bytes of an English contraction ('s 't 're 've 'm 'll 'd) that starts here, or 0."""
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
    is_contraction = second == E if first in (R, V) else first == L and second == L
    return 3 if is_contraction else 0


@raw_compiled
def whitespace_end(text: Bytes, at: Int, end: Int, classes: Bytes, up_to_newline: bool) -> Int:
    """The end of a run of whitespace: after its last newline, if `up_to_newline` and it has one.

    Otherwise the last character is left to the next word, unless it is the only one.
    """
    begin, last, after_newline = at, at, 0
    while True:
        found = class_at(text, at, end, classes)
        char_class = found & CLASS_MASK
        if char_class != WHITESPACE and char_class != NEWLINE:
            break
        last = at
        at += found >> WIDTH_SHIFT
        if char_class == NEWLINE:
            after_newline = at
    if up_to_newline and after_newline > 0:
        return after_newline
    return at if at >= end or last == begin else last


@raw_inlined
def number_end(text: Bytes, at: Int, end: Int, classes: Bytes, longest: Int) -> Int:
    for _ in range(longest):
        found = class_at(text, at, end, classes)
        if found & CLASS_MASK != NUMBER:
            break
        at += found >> WIDTH_SHIFT
    return at


@raw_inlined
def llama3_end(text: Bytes, at: Int, end: Int, classes: Bytes, longest_number: Int) -> Int:
    """The end of the word that starts here, by the pattern LLAMA3 or QWEN2."""
    first = class_at(text, at, end, classes)
    char_class, after = first & CLASS_MASK, at + (first >> WIDTH_SHIFT)
    if char_class == LETTER:
        return letters_end(text, after, end, classes)
    if char_class == NUMBER:
        return number_end(text, at, end, classes, longest_number)
    if text[at] == APOSTROPHE:
        size = contraction_size(text, at, end, True)
        if size > 0:
            return at + size
    second = class_at(text, after, end, classes) & CLASS_MASK
    if char_class != NEWLINE and second == LETTER:
        return letters_end(text, after, end, classes)
    if char_class == OTHER or (text[at] == SPACE and second == OTHER):
        others_end = run_end(text, after, end, classes, OTHER)
        return run_end(text, others_end, end, classes, NEWLINE)
    return whitespace_end(text, at, end, classes, True)


@raw_compiled
def gpt2_end(text: Bytes, at: Int, end: Int, classes: Bytes) -> Int:
    """The end of the word that starts here, by the pattern GPT2."""
    if text[at] == APOSTROPHE:
        size = contraction_size(text, at, end, False)
        if size > 0:
            return at + size
    begin = at + 1 if text[at] == SPACE else at
    char_class = class_at(text, begin, end, classes) & CLASS_MASK
    if char_class == LETTER:
        return letters_end(text, begin, end, classes)
    if char_class in (NUMBER, OTHER):
        return run_end(text, begin, end, classes, char_class)
    return whitespace_end(text, at, end, classes, False)


@raw_inlined
def segment_end(text: Bytes, at: Int, end: Int, classes: Bytes, rule: Int) -> Int:
    """The end of the segment in which words are searched; SMOLLM isolates each number first."""
    if rule != SMOLLM_RULE:
        return end
    found = class_at(text, at, end, classes)
    while True:
        at += found >> WIDTH_SHIFT
        if found & CLASS_MASK == NUMBER:
            return at
        found = class_at(text, at, end, classes)
        if found & CLASS_MASK == NUMBER or at >= end:
            return at


@raw_inlined
def word_end(text: Bytes, at: Int, end: Int, classes: Bytes, rule: Int) -> Int:
    """The end of the word that starts at `at` in a segment that ends at `end`; at < end."""
    if rule <= QWEN2_RULE:
        longest_number = LONGEST_NUMBER if rule == LLAMA3_RULE else 1
        return llama3_end(text, at, end, classes, longest_number)
    return gpt2_end(text, at, end, classes)


# Word starts of Llama 3 and Qwen 2, 64 bytes at once. A window of text that starts with a word
# becomes a bit mask for each class of characters, one bit per byte. Shifts of the masks then give
# the starts of the next words, all at once:
#
#     text         I'm  two. Yes
#     letters      101  111  111
#     others       010     1
#     whitespace      11    1        the second one belongs to the word after it
#     starts       11 11    11       not at m: it belongs to the apostrophe before it
#
# Of a character of several bytes each byte has a bit; whether it is a letter is looked up. Only
# what these masks decide is answered, up to a position where the rest of the window does not
# matter. Whitespace and numbers beyond ASCII, words that start with an apostrophe and long numbers
# are left to `word_end`.


@raw_inlined
def whitespace_before_newline(whitespace: Int, newlines: Int) -> Int:
    """The runs of whitespace that are followed by a newline."""
    runs, found = whitespace, whitespace & (newlines >> ONE)
    for step in DOUBLINGS:
        found |= runs & (found >> step)
        runs &= runs >> step
    return found


@raw_inlined
def word_starts(text: Bytes, at: Int, digits_alone: bool, classes: Bytes) -> Int:
    """A bit for each position of text[at : at + 64] where a word starts, except `at` itself.

    A word must start at `at`. The bits are complete up to the highest one; there may be none.
    """
    non_ascii = bytes_within(text, at, FIRST_NON_ASCII, NUM_NON_ASCII)
    letters = bytes_within(text, at, CAPITAL_A, LETTERS) | bytes_within(text, at, SMALL_A, LETTERS)
    known, continuation = ALL, non_ascii
    if non_ascii != 0:
        continuation = bytes_within(text, at, FIRST_CONTINUATION, NUM_CONTINUATION)
        wide_letters, unknown = classify_wide(text, at, non_ascii & ~continuation, classes)
        letters |= whole_characters(wide_letters, continuation)
        known = (unknown - ONE) & ~unknown  # everything before the first unknown
    digits = bytes_within(text, at, ZERO, DIGITS) & known
    newlines = bytes_within(text, at, LINE_FEED, 1) | bytes_within(text, at, RETURN, 1)
    spaces = bytes_within(text, at, SPACE, 1) & known
    whitespace = bytes_within(text, at, VERTICAL_TAB, VERTICAL_TAB_AND_FORM_FEED)
    whitespace = (bytes_within(text, at, TAB, 1) | whitespace) & known | spaces
    letters, newlines = letters & known, newlines & known
    others = known & ~(letters | digits | whitespace | newlines)

    starts = letters & ((newlines | digits) << ONE)
    not_alone = others & ~continuation & ((others | spaces) << ONE)
    if continuation != 0:
        not_alone = whole_characters(not_alone, continuation)
    starts |= letters & (not_alone << ONE)  # a single other character joins the word after it
    starts |= digits if digits_alone else digits & ~(digits << ONE)
    starts |= others & ~((others | spaces) << ONE)
    breaks = newlines  # what forms one word with the newline after it
    if whitespace & (newlines >> ONE) != 0:
        before = whitespace_before_newline(whitespace, newlines)
        taken = newlines & ~(newlines + (newlines & (others << ONE)))  # directly after others
        starts |= before & (taken << ONE)
        breaks |= before
        whitespace &= ~before
    starts |= breaks & ~(breaks << ONE) & ~(newlines & (others << ONE))
    starts |= whitespace & ~(whitespace << ONE) | whitespace & ~(whitespace >> ONE)
    return (
        starts
        & before_trailing_whitespace(known & ~(whitespace | breaks))
        & before_undecided(text, at, starts, letters, digits, digits_alone)
    )


@raw_inlined
def classify_wide(text: Bytes, at: Int, firsts: Int, classes: Bytes) -> tuple[Int, Int]:
    """Masks of the characters that are letters, and of those that are whitespace or numbers."""
    letters, unknown = firsts & ~firsts, firsts & ~firsts
    while firsts != 0:
        rest = firsts & (firsts - ONE)
        first = firsts ^ rest
        position = at + trailing_zeros(firsts)
        char_class = class_at(text, position, position + 1, classes) & CLASS_MASK
        letters |= first * np.uint64(char_class == LETTER)  # no branch: unpredictable
        unknown |= first * np.uint64((char_class != LETTER) & (char_class != OTHER))
        firsts = rest
    return letters, unknown


@raw_inlined
def whole_characters(firsts: Int, continuation: Int) -> Int:
    """The masks of first bytes, extended to all bytes of these characters (up to four)."""
    firsts |= (firsts << ONE) & continuation
    firsts |= (firsts << ONE) & continuation
    return firsts | (firsts << ONE) & continuation


@raw_inlined
def before_trailing_whitespace(not_whitespace: Int) -> Int:
    """The positions up to the whitespace that ends the window: more of it may follow."""
    if not_whitespace == 0:
        return not_whitespace
    return (TWO << (LAST - np.uint64(leading_zeros(not_whitespace))) << ONE) - ONE


@raw_inlined
def before_undecided(
    text: Bytes, at: Int, starts: Int, letters: Int, digits: Int, digits_alone: bool
) -> Int:
    """The positions after the first, up to the first word that is left to `word_end`."""
    undecided = bytes_within(text, at, APOSTROPHE, 1) & (letters >> ONE)
    if not digits_alone:
        undecided |= digits & (digits >> ONE) & (digits >> TWO) & (digits >> THREE)
    undecided &= starts | ONE
    first = undecided & (~undecided + ONE)
    return ((first << ONE) - ONE) & ~ONE


@raw_inlined
def next_ends(
    text: Bytes, at: Int, stop: Int, rule: Int, classes: Bytes, ends: NDArray[np.int64], n: Int
) -> Int:
    """Write the ends of the next 1 to 64 words into ends[n:]; returns the new n. at < stop."""
    if rule <= QWEN2_RULE and at + WINDOW <= stop:
        starts = word_starts(text, at, rule == QWEN2_RULE, classes)
        if starts != 0:
            while starts != 0:
                ends[n] = at + trailing_zeros(starts)
                starts &= starts - ONE
                n += 1
            return n
    ends[n] = word_end(text, at, stop, classes, rule)
    return n + 1


@raw_entry
def word_ends(text: Bytes, size: Int, rule: Int, classes: Bytes, ends: NDArray[np.int64]) -> Int:
    """Write the ends of all words of text[:size], padded UTF-8, into `ends`; returns their number.

    `ends` must have 64 more elements than the text has bytes.
    """
    at, stop, n = 0, 0, 0
    while at < size:
        if at == stop:
            stop = segment_end(text, at, size, classes, rule)
        n = next_ends(text, at, stop, rule, classes, ends, n)
        at = ends[n - 1]
    return n
