"""Characters as tokens: round trip, unseen characters, special tokens, bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.chars import CharTokenizer

TEXT = "hello, world\n"


def test_manually_computed_ids() -> None:
    tokenizer: Tokenizer = CharTokenizer("hello")
    assert tokenizer.encode("hello") == [1, 0, 2, 2, 3]  # e h l o
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("he", bos=True) == [4, 1, 0]
    assert tokenizer.stop_ids == {5}
    assert tokenizer.specials == {"<|begin|>": 4, "<|end|>": 5, "<|pad|>": 6, "<|unknown|>": 7}


@given(st.text(alphabet=TEXT))
def test_round_trip(text: str) -> None:
    tokenizer = CharTokenizer(TEXT)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_unseen_characters_become_the_unknown_token(text: str) -> None:
    tokenizer = CharTokenizer(TEXT)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "".join(c if c in TEXT else "\ufffd" for c in text)
    assert tokenizer.encode_array(text).tolist() == ids
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids)


def test_special_tokens_only_on_request() -> None:
    tokenizer = CharTokenizer(TEXT)
    written = "hello<|end|>"
    assert tokenizer.encode(written, specials=True)[-1] == tokenizer.end
    assert not {*tokenizer.encode(written)} & {tokenizer.bos, tokenizer.end, tokenizer.pad}
    assert tokenizer.decode([tokenizer.end]) == "<|end|>"


def test_unusual_text() -> None:
    tokenizer = CharTokenizer("a\x00\ufeff")
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("\ufeffa\x00")) == "\ufeffa\x00"
    assert tokenizer.encode("\ud800") == tokenizer.encode_array("\ud800").tolist() == [6]
    assert CharTokenizer("").encode("a") == [3]
    for bad in (["ab"], [""], ["\ud800"]):
        with pytest.raises(TokenizerError, match="not one character"):
            CharTokenizer(bad)


@pytest.mark.parametrize("id", [-1, 7, 2**40])
def test_ids_outside_the_vocabulary(id: int) -> None:
    with pytest.raises(TokenizerError, match=f"id {id}: not in the vocabulary, which has 0 … 6"):
        CharTokenizer("abc").decode([id])
