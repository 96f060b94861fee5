"""Where words end, 64 bytes at once: the rules of Llama 3 and Qwen 2 in word_ends.py, on bits.

A window of text that begins with a word becomes a mask for each kind of character: a bit for each
byte. Where the next words begin then follows from shifts, for all of them together:

    text       I'm  two. Yes
    letters    101  111  111
    signs      010     1
    blanks        11    1        the second one takes the word behind it
    begins     11 11    11       m: the sign before it took it

Only what these masks decide is answered: ASCII, up to a place where the rest of the window does not
matter. Words that begin with an apostrophe or hold long numbers are left to word_ends.py as well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glassllama.tokenizers.compiled import Int, inlined
from glassllama.tokenizers.eight_bytes import bytes_within, leading_zeros

Bytes = NDArray[np.uint8]

ONE, TWO, THREE, LAST = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(63)
DOUBLINGS = (np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(8), np.uint64(16), np.uint64(32))
CAPITAL_A, SMALL_A, LETTERS = ord("A"), ord("a"), 26
ZERO, DIGITS = ord("0"), 10
SPACE, APOSTROPHE, TAB, LINE_FEED, RETURN = 0x20, 0x27, 0x09, 0x0A, 0x0D
VERTICAL_TAB, VERTICAL_TAB_AND_FORM_FEED = 0x0B, 2
FIRST_BEYOND_ASCII, BEYOND_ASCII = 0x80, 0x80


@inlined
def up_to_line_end(blanks: Int, line_ends: Int) -> Int:
    """The runs of blanks that a line end follows."""
    runs, found = blanks, blanks & (line_ends >> ONE)
    for step in DOUBLINGS:
        found |= runs & (found >> step)
        runs &= runs >> step
    return found


@inlined
def words_after(text: Bytes, at: Int, digits_alone: bool) -> Int:
    """A bit for each place of text[at : at + 64] where a word begins, but for the one at `at`.

    A word must begin at `at`. The bits are true up to the highest; there may be none.
    """
    beyond = bytes_within(text, at, FIRST_BEYOND_ASCII, BEYOND_ASCII)
    ascii_ = (beyond - ONE) & ~beyond  # what is before the first byte of another character
    letters = bytes_within(text, at, CAPITAL_A, LETTERS) | bytes_within(text, at, SMALL_A, LETTERS)
    digits = bytes_within(text, at, ZERO, DIGITS) & ascii_
    line_ends = bytes_within(text, at, LINE_FEED, 1) | bytes_within(text, at, RETURN, 1)
    spaces = bytes_within(text, at, SPACE, 1) & ascii_
    blanks = bytes_within(text, at, VERTICAL_TAB, VERTICAL_TAB_AND_FORM_FEED)
    blanks = (bytes_within(text, at, TAB, 1) | blanks) & ascii_ | spaces
    letters, line_ends = letters & ascii_, line_ends & ascii_
    signs = ascii_ & ~(letters | digits | blanks | line_ends)

    begins = letters & ((line_ends | digits) << ONE)
    begins |= letters & (signs << ONE) & ((signs | spaces) << TWO)  # a sign alone takes the word
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
        & decided(ascii_ & ~(blanks | breaks))
        & before_hard(text, at, begins, letters, digits, digits_alone)
    )


@inlined
def decided(black: Int) -> Int:
    """The places up to the first of the blanks that the window ends with: more may follow."""
    if black == 0:
        return black
    return (TWO << (LAST - np.uint64(leading_zeros(black))) << ONE) - ONE


@inlined
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
