"""Finding many texts in a text: the matches of a regular expression with the longest first."""

from __future__ import annotations

import random
import re

from glassllama.tokenizers.vocabulary import TokenTrie


def test_matches_are_those_of_a_regular_expression() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        letters = chance.choice(["ab", "a^-]", "\n▁<>", "é𝕏\ud800"])
        some = ["".join(chance.choices(letters, k=chance.randrange(6))) for _ in range(8)]
        texts = some[: chance.randrange(9)]
        text = "".join(chance.choices(letters + "c", k=40))
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        trie, at = TokenTrie(texts), chance.randrange(40)
        assert trie.split(text) == pattern.split(text)
        spans = [found.span() for found in pattern.finditer(text)]
        assert [found.span() for found in trie.finditer(text)] == spans
        ours, theirs = trie.search(text, at), pattern.search(text, at)
        assert (ours and (ours.span(), ours[0])) == (theirs and (theirs.span(), theirs[0]))


def test_long_texts_are_found() -> None:
    """A nested pattern of these would be too deep for Python's `re`."""
    trie = TokenTrie("x" * n for n in range(1, 5000, 7))
    assert [found.span() for found in trie.finditer("x" * 4999 + "y" + "xx")] == [
        (0, 4999), (5000, 5001), (5001, 5002)
    ]  # fmt: skip
