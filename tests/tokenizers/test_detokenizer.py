"""Streaming: text is returned as soon as it is complete, stop strings are never shown."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreign_tokenizers import MetaTokenizer
from glassllama.base.errors import GenerationError, TokenizerError
from glassllama.tokenizers.detokenizer import Detokenizer, StopStrings

MIXED = "naïve café — 日本語のテキスト 👩‍👩‍👧 हिन्दी ก็ e\u0301\u0323 \U0001f1ea\U0001f1fa 0"


@pytest.fixture(scope="module")
def llama3(llama3_ranks: Path) -> MetaTokenizer:
    return MetaTokenizer(llama3_ranks)


def streamed(tokenizer: MetaTokenizer, ids: list[int]) -> tuple[list[str], str]:
    decoder = Detokenizer(tokenizer)
    return [decoder.push(id) for id in ids], decoder.finish()


def test_parts_join_to_the_text_and_characters_are_whole(llama3: MetaTokenizer) -> None:
    pieces, rest = streamed(llama3, llama3.encode(MIXED))
    assert "".join(pieces) == MIXED
    assert rest == ""
    assert "" in pieces, "some character of this text is split between tokens"


def test_text_comes_with_the_token_that_completes_it(llama3: MetaTokenizer) -> None:
    ids = llama3.encode("a " + "\U0001f9ff" + " b")
    decoder = Detokenizer(llama3)
    shown = ""
    for n, id in enumerate(ids, 1):
        shown += decoder.push(id)
        # Complete characters are never delayed: only the bytes of an incomplete one are missing.
        so_far = b"".join(llama3.token_bytes(i) for i in ids[:n])
        assert shown == so_far.decode("utf-8", errors="ignore")


@given(st.integers(0, 2**32))
def test_streaming_any_ids_equals_decode(llama3: MetaTokenizer, seed: int) -> None:
    choice = random.Random(seed)
    # Half of the ids are single bytes (the first 256), so that invalid UTF-8 is frequent.
    ids = [choice.randrange(choice.choice([256, 128_000])) for _ in range(choice.randrange(40))]
    pieces, rest = streamed(llama3, ids)
    assert "".join(pieces) + rest == llama3.decode(ids)


def test_invalid_bytes_are_shown_at_the_end(llama3: MetaTokenizer) -> None:
    first_byte = next(i for i in range(256) if llama3.token_bytes(i) == b"\xf0")
    pieces, rest = streamed(llama3, [first_byte])
    assert (pieces, rest) == ([""], "\ufffd")


def test_special_tokens_are_not_shown(llama3: MetaTokenizer) -> None:
    ids = llama3.encode("<|begin_of_text|>one<|eot_id|> two", specials=True)
    pieces, rest = streamed(llama3, ids)
    assert "".join(pieces) + rest == "one two"


def test_an_id_outside_the_vocabulary_is_an_error(llama3: MetaTokenizer) -> None:
    with pytest.raises(TokenizerError):
        Detokenizer(llama3).push(llama3.vocab_size)


# Stop strings


def by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The rule in plain Python: earliest end, then longest; neither it nor the text after it is
    shown."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stopper = StopStrings(stops)
    shown = "".join(stopper.push(piece) for piece in pieces) + stopper.finish()
    return shown, stopper.matched


@given(
    st.text("ab<", max_size=30),
    st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 30)),
)
def test_every_division_of_the_text_follows_the_rule(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(borders)]
    expected = by_definition(text, stops)
    assert run(stops, pieces) == expected
    assert run(stops, list(text)) == expected


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    stopper = StopStrings(["</answer>"])
    assert [stopper.push(p) for p in ["42 <", "/ans", "wer", "> never", " more"]] == [
        "42 ", "", "", "", "",
    ]  # fmt: skip
    assert stopper.matched == "</answer>"
    assert stopper.finish() == ""


def test_withheld_text_is_returned_as_soon_as_possible() -> None:
    stopper = StopStrings(["</answer>"])
    assert [stopper.push(p) for p in ["a <", "/ans", "</", "x"]] == ["a ", "", "</ans", "</x"]
    assert stopper.push("</") == ""
    assert stopper.finish() == "</"


def test_the_stop_string_that_ends_first_wins() -> None:
    assert run(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")
    assert run(["b", "ab"], ["xab"]) == ("x", "ab")  # both end here: nothing of either is shown
    assert run([], ["abc"]) == ("abc", None)


def test_a_long_stop_string_takes_linear_time() -> None:
    """The worst case: a text that nearly equals the stop string throughout, one character at a
    time."""
    stops = ["a" * 50_000 + "b"]
    assert run(stops, ["a"] * 200_000) == ("a" * 200_000, None)


@pytest.mark.parametrize(
    "stops",
    [[""], ["a", ""], [3], "END", ["a" * 10**6], ["ab" * 20_000] * 2],
    ids=["empty", "one empty", "a number", "one text", "one too long", "too long together"],
)
def test_unusable_stop_strings_are_refused(stops: list[str]) -> None:
    with pytest.raises(GenerationError, match="stop:"):
        StopStrings(stops)
