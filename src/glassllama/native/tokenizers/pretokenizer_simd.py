"""Where words end, 64 bytes at once: the rules of Llama 3 and Qwen 2 in pretokenizer.py,
on bits.

A window of text that begins with a word becomes a mask for each kind of character: a bit for each
byte. Where the next words begin then follows from shifts, for all of them together:

    text       I'm  two. Yes
    letters    101  111  111
    signs      010     1
    blanks        11    1        the second one takes the word behind it
    begins     11 11    11       m: the sign before it took it

A character of several bytes has a bit for each: whether it is a letter is looked up, one by one.
Only what these masks decide is answered, up to a place where the rest of the window does not
matter. Blanks and numbers beyond ASCII, words that begin with an apostrophe and long numbers are
left to pretokenizer.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.byte_scan import bytes_within, leading_zeros, trailing_zeros
from glassllama.native.jit.compile import Int, raw_inlined
from glassllama.native.tokenizers.char_classes import KIND, LETTER, OTHER, kind_at

Bytes = NDArray[np.uint8]

ONE, TWO, THREE, LAST = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(63)
DOUBLINGS = (np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(8), np.uint64(16), np.uint64(32))
CAPITAL_A, SMALL_A, LETTERS = ord("A"), ord("a"), 26
ZERO, DIGITS = ord("0"), 10
SPACE, APOSTROPHE, TAB, LINE_FEED, RETURN = 0x20, 0x27, 0x09, 0x0A, 0x0D
VERTICAL_TAB, VERTICAL_TAB_AND_FORM_FEED = 0x0B, 2
FIRST_BEYOND_ASCII, BEYOND_ASCII = 0x80, 0x80
FIRST_INNER, INNER = 0x80, 0x40  # bytes of a character but its first
ALL = np.uint64(2**64 - 1)


@raw_inlined
def up_to_line_end(blanks: Int, line_ends: Int) -> Int:
    """The runs of blanks that a line end follows."""
    runs, found = blanks, blanks & (line_ends >> ONE)
    for step in DOUBLINGS:
        found |= runs & (found >> step)
        runs &= runs >> step
    return found


@raw_inlined
def words_after(text: Bytes, at: Int, digits_alone: bool, kinds: Bytes) -> Int:
    """A bit for each place of text[at : at + 64] where a word begins, but for the one at `at`.

    A word must begin at `at`. The bits are true up to the highest; there may be none.
    """
    beyond = bytes_within(text, at, FIRST_BEYOND_ASCII, BEYOND_ASCII)
    letters = bytes_within(text, at, CAPITAL_A, LETTERS) | bytes_within(text, at, SMALL_A, LETTERS)
    known, inner = ALL, beyond
    if beyond != 0:
        inner = bytes_within(text, at, FIRST_INNER, INNER)
        wide_letters, unknown = wide_kinds(text, at, beyond & ~inner, kinds)
        letters |= whole(wide_letters, inner)
        known = (unknown - ONE) & ~unknown  # what is before the first of them
    digits = bytes_within(text, at, ZERO, DIGITS) & known
    line_ends = bytes_within(text, at, LINE_FEED, 1) | bytes_within(text, at, RETURN, 1)
    spaces = bytes_within(text, at, SPACE, 1) & known
    blanks = bytes_within(text, at, VERTICAL_TAB, VERTICAL_TAB_AND_FORM_FEED)
    blanks = (bytes_within(text, at, TAB, 1) | blanks) & known | spaces
    letters, line_ends = letters & known, line_ends & known
    signs = known & ~(letters | digits | blanks | line_ends)

    begins = letters & ((line_ends | digits) << ONE)
    not_alone = signs & ~inner & ((signs | spaces) << ONE)
    if inner != 0:
        not_alone = whole(not_alone, inner)
    begins |= letters & (not_alone << ONE)  # a sign alone takes the word
    begins |= digits if digits_alone else digits & ~(digits << ONE)
    begins |= signs & ~((signs | spaces) << ONE)
    breaks = line_ends  # what is one word with a line end behind it
    if blanks & (line_ends >> ONE) != 0:
        before = up_to_line_end(blanks, line_ends)
        taken = line_ends & ~(line_ends + (line_ends & (signs << ONE)))  # right behind signs
        begins |= before & (taken << ONE)
        breaks |= before
        blanks &= ~before
    begins |= breaks & ~(breaks << ONE) & ~(line_ends & (signs << ONE))
    begins |= blanks & ~(blanks << ONE) | blanks & ~(blanks >> ONE)
    return (
        begins
        & decided(known & ~(blanks | breaks))
        & before_hard(text, at, begins, letters, digits, digits_alone)
    )


@raw_inlined
def wide_kinds(text: Bytes, at: Int, firsts: Int, kinds: Bytes) -> tuple[Int, Int]:
    """Of the characters with these first bytes: which are letters, and which blanks or numbers."""
    letters, unknown = firsts & ~firsts, firsts & ~firsts
    while firsts != 0:
        rest = firsts & (firsts - ONE)
        first = firsts ^ rest
        place = at + trailing_zeros(firsts)
        kind = kind_at(text, place, place + 1, kinds) & KIND
        letters |= first * np.uint64(kind == LETTER)  # no branch: one cannot tell which comes
        unknown |= first * np.uint64((kind != LETTER) & (kind != OTHER))
        firsts = rest
    return letters, unknown


@raw_inlined
def whole(firsts: Int, inner: Int) -> Int:
    """All bytes of the characters with these first bytes, and up to three inner ones."""
    firsts |= (firsts << ONE) & inner
    firsts |= (firsts << ONE) & inner
    return firsts | (firsts << ONE) & inner


@raw_inlined
def decided(black: Int) -> Int:
    """The places up to the first of the blanks that the window ends with: more may follow."""
    if black == 0:
        return black
    return (TWO << (LAST - np.uint64(leading_zeros(black))) << ONE) - ONE


@raw_inlined
def before_hard(
    text: Bytes, at: Int, begins: Int, letters: Int, digits: Int, digits_alone: bool
) -> Int:
    """The places behind the first, up to the first word that is left to others."""
    hard = bytes_within(text, at, APOSTROPHE, 1) & (letters >> ONE)
    if not digits_alone:
        hard |= digits & (digits >> ONE) & (digits >> TWO) & (digits >> THREE)
    hard &= begins | ONE
    first = hard & (~hard + ONE)
    return ((first << ONE) - ONE) & ~ONE
