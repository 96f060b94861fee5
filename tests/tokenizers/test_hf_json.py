"""tokenizer.json: the ids of the tokenizers library; unsupported contents are refused."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_level_families import FAMILIES, mixed_text, trained
from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.bpe import CHARACTER_TO_BYTE, to_bytes
from glassllama.tokenizers.hf_json import tokenizer_from_json
from glassllama.tokenizers.vocabulary import read_json
from tokenizers import AddedToken, Tokenizer, processors

SPECIALS = ["<|begin|>", "<|end|>"]
TEXT = "".join(mixed_text(seed) for seed in range(1000, 1040))


def ours(foreign: Tokenizer) -> Any:
    return read(json.loads(foreign.to_str()))


def read(document: dict[str, Any]) -> Any:
    return tokenizer_from_json(document)


@pytest.fixture(scope="module", params=FAMILIES)
def foreign(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param, TEXT, size=1500, specials=SPECIALS)


def test_same_ids_and_text(foreign: Tokenizer) -> None:
    tokenizer = ours(foreign)
    assert tokenizer.vocab_size == foreign.get_vocab_size()
    for seed in range(60):
        text = mixed_text(seed) + "".join(SPECIALS)
        ids = foreign.encode(text).ids
        assert tokenizer.encode(text, specials=True) == ids
        assert tokenizer.decode(ids) == foreign.decode(ids, skip_special_tokens=False)
        foreign.encode_special_tokens = True
        assert tokenizer.encode(text) == foreign.encode(text).ids
        foreign.encode_special_tokens = False


def test_added_tokens_in_any_text(foreign: Tokenizer) -> None:
    foreign = Tokenizer.from_str(foreign.to_str())
    plain = ["<tool>", "<tool_call>", "   ", "naïve", "über🦙"]
    foreign.add_tokens([AddedToken(text, normalized=False) for text in plain])
    tokenizer = ours(foreign)
    text = "a <tool_call>{}</tool><tool>    naïve über🦙 <|end|>"
    foreign.encode_special_tokens = True
    assert tokenizer.encode(text) == foreign.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_that_look_special_are_special(foreign: Tokenizer) -> None:
    """Fine-tuned models declare chat tokens as ordinary added tokens."""
    foreign = Tokenizer.from_str(foreign.to_str())
    foreign.add_tokens([AddedToken("<|im_end|>", normalized=False)])
    tokenizer = ours(foreign)
    id = tokenizer.specials["<|im_end|>"]
    assert id == foreign.token_to_id("<|im_end|>")
    assert id not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.encode("a<|im_end|>b", specials=True) == foreign.encode("a<|im_end|>b").ids


def test_bos_is_that_of_the_post_processor(foreign: Tokenizer) -> None:
    foreign = Tokenizer.from_str(foreign.to_str())
    begin = foreign.token_to_id("<|begin|>")
    for template, bos in (("<|begin|> $A", begin), ("$A", None)):
        foreign.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=template, special_tokens=[("<|begin|>", begin)]
                ),
            ]
        )
        tokenizer = ours(foreign)
        assert tokenizer.bos == bos
        assert tokenizer.encode("some text", bos=True) == foreign.encode("some text").ids
    foreign.post_processor = processors.TemplateProcessing(
        single="<|begin|> <|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    with pytest.raises(TokenizerError, match=r"post_processor: single must be the text"):
        ours(foreign)


@pytest.mark.parametrize("kind", [processors.RobertaProcessing, processors.BertProcessing])
def test_bos_is_the_first_token_of_the_post_processor(foreign: Tokenizer, kind: Any) -> None:
    foreign = Tokenizer.from_str(foreign.to_str())
    begin = foreign.token_to_id("<|begin|>")
    foreign.post_processor = kind(("x", 3), ("<|begin|>", begin))
    tokenizer = ours(foreign)
    assert [*tokenizer.encode("some text", bos=True), 3] == foreign.encode("some text").ids


def test_pretokens_do_not_become_added_tokens_outside_the_model(foreign: Tokenizer) -> None:
    """Also with `ignore_merges`, where pretokens that are tokens are not merged."""
    document = json.loads(foreign.to_str())
    document["model"]["ignore_merges"] = True
    theirs = Tokenizer.from_str(json.dumps(document))
    theirs.add_tokens([AddedToken("</", single_word=True, normalized=False)])
    for text in ("b</s>", "b</ x", " </ "):
        assert ours(theirs).encode(text) == theirs.encode(text).ids
        assert [*ours(theirs).encode_array(text)] == theirs.encode(text).ids


def test_the_header_line_of_merges_txt_is_not_a_merge(foreign: Tokenizer) -> None:
    document = json.loads(foreign.to_str())
    merges = [" ".join(pair) for pair in document["model"]["merges"]]
    document["model"]["merges"] = ["#version: 0.2", *merges]
    theirs = Tokenizer.from_str(json.dumps(document))
    assert ours(theirs).encode("some text") == theirs.encode("some text").ids
    assert read(document).vocabulary.merges == ours(foreign).vocabulary.merges


def test_byte_alphabet() -> None:
    assert len(CHARACTER_TO_BYTE) == len({*CHARACTER_TO_BYTE.values()}) == 256
    assert to_bytes("ĠlowĊ") == b" low\n"
    for written in ("a b", "日", "\ud800", "\xad"):
        with pytest.raises(TokenizerError, match="stands for no byte"):
            to_bytes(written)


def pre(*stages: dict[str, Any]) -> dict[str, Any]:
    last = {"type": "ByteLevel", "add_prefix_space": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*stages, last]}}


def split(pattern: Any, behavior: str = "Isolated") -> dict[str, Any]:
    return pre({"type": "Split", "pattern": pattern, "behavior": behavior})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"stemmer": 1}, "stemmer"),
    "model type": ({"model.type": "WordPiece"}, "model: type must be BPE, got 'WordPiece'"),
    "dropout": ({"model.dropout": 0.1}, "model: dropout"),
    "end of word": ({"model.end_of_word_suffix": "</w>"}, "model: end_of_word_suffix"),
    "no vocab": ({"model.vocab": None}, "model: vocab is missing"),
    "vocab list": ({"model.vocab": [["a", 0.0]]}, "model: vocab: expected an object"),
    "id is text": ({"model.vocab": {"a": "0"}}, "vocab: a must be an id from 0"),
    "id is true": ({"model.vocab": {"a": True}}, "vocab: a must be an id from 0"),
    "id below zero": ({"model.vocab.a": -1}, "-1"),
    "id of 2^40": ({"model.vocab.a": 2**40}, "1099511627776"),
    "id of 10^400": ({"model.vocab.a": 10**400}, "a whole number of 1329 bits"),
    "id twice": ({"model.vocab.a": 300}, "vocab gives an id to two tokens"),
    "empty token": ({"model.vocab.": 5000}, "vocabulary: a token is empty"),
    "empty merge": ({"model.merges": [["a", "☃"]]}, "merges: number 0"),
    "merge of three": ({"model.merges": ["a b c"]}, "merges: number 0"),
    "merge is a number": ({"model.merges": [7]}, "merges: number 0"),
    "merge of lists": ({"model.merges": [[[], []]]}, "merges: number 0"),
    "no merges": ({"model.merges": {}}, "model: merges must be a list"),
    "flag is text": ({"model.ignore_merges": "yes"}, "ignore_merges must be true or false"),
    "normalizer": ({"normalizer": {"type": "Precompiled"}}, "normalizer: type must be one of NFC"),
    "normalizer in a sequence": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Bert"}]}},
        "normalizer: normalizers: type must be one of NFC",
    ),
    "many stages": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 65}}, "65 stages",
    ),
    "decoder": ({"decoder": {"type": "Metaspace"}}, "decoder must be ByteLevel"),
    "no decoder": ({"decoder": None}, "decoder must be ByteLevel"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "decoder: type must be one of ByteFallback"),
    "unknown stage": (pre({"type": "UnicodeScripts"}), "type must be one of Split, .*'UnicodeScri"),
    "unknown behavior": (split({"Regex": "a"}, "Torn"), "behavior must be one of Isolated"),
    "unknown escape": (split({"Regex": r"\Gx"}), r"'\\G' is not supported"),
    "unknown property": (split({"Regex": r"\p{Greek}"}), "property 'Greek' is not supported"),
    "unknown group": (split({"Regex": r"(?P<x>a)"}), r"'\(\?P<' is not supported"),
    "a group is open": (split({"Regex": "(a"}), "a group is not closed"),
    "a class is open": (split({"Regex": "[a"}), "it ends too early"),
    "pattern is a number": (split(7), "pattern: expected an object, got 7"),
    "two patterns": (split({"Regex": "a", "String": "a"}), "an object with a String or a Regex"),
    "long pattern": (split({"Regex": "a" * 20_000}), "pattern: 20000 characters"),
    "stages are text": ({"pre_tokenizer": "ByteLevel"}, "pre_tokenizer: expected an object"),
    "post-processor": ({"post_processor": {"type": "Processing"}}, "post_processor: type"),
    "ends": ({"post_processor": {"type": "BertProcessing", "cls": ["a"]}}, "cls must be a token"),
    "template": ({"post_processor": {"type": "TemplateProcessing"}}, "single is missing"),
    "template without its token": (
        {"post_processor": {"type": "TemplateProcessing", "special_tokens": {}, "single": [
            {"SpecialToken": {"id": "<|x|>"}}, {"Sequence": {"id": "A"}}]}},
        "<|x|> is missing",
    ),
    "flag of a token": (
        {"added_tokens": [{"id": 0, "content": "<|begin|>", "special": True, "lstrip": 1}]},
        "lstrip must be true or false, got 1",
    ),
    "added token without id": ({"added_tokens": [{"content": "x", "special": True}]}, "id is miss"),
    "added tokens share an id": (
        {"added_tokens": [{"id": 4000, "content": c, "special": True} for c in ("☃", "☄")]},
        "two added tokens have the id 4000",
    ),
    "added token has another's id": (
        {"added_tokens": [{"id": 40, "content": "☃", "special": True}]}, "id 40 is given to two",
    ),
    "added tokens are a number": ({"added_tokens": 7}, "added_tokens must be a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_contents_are_refused(name: str) -> None:
    changes, words = REFUSED[name]
    document = changed(json.loads(LLAMA_LIKE), changes)
    with pytest.raises(TokenizerError, match=words) as fault:
        read(document)
    assert "\n" not in str(fault.value)


LLAMA_LIKE = trained("llama3", TEXT, size=400, specials=SPECIALS).to_str()


def changed(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(document)
    for field, value in changes.items():
        *outer, last = field.split(".")
        place = document
        for name in outer:
            place = place[name]
        place[last] = value
    return document


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_invalid_json(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(TokenizerError, match=str(path)):
        read_json(path)


def test_a_lone_surrogate_in_an_added_token() -> None:
    document = json.loads(LLAMA_LIKE)
    document["added_tokens"].append({"id": 4000, "content": "\ud800", "special": False})
    tokenizer = read(document)
    assert tokenizer.decode([4000]) == "\ufffd" * 3


def places(document: Any, depth: int = 5) -> list[tuple[Any, ...]]:
    """Paths to every value, the first three of a long list or table."""
    if depth == 0 or not isinstance(document, dict | list):
        return [()]
    keys = [*document][:3] if len(document) > 20 else [*document]
    keys = keys if isinstance(document, dict) else [*range(min(len(document), 3))]
    return [(), *((key, *rest) for key in keys for rest in places(document[key], depth - 1))]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.text(max_size=3) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
PIPELINE = json.loads(LLAMA_LIKE) | {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|begin|>"}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0]}},
    },
}


@settings(max_examples=int(os.environ.get("GLASSLLAMA_FUZZ", "300")), deadline=None)
@given(st.sampled_from(places(PIPELINE)[1:]), VALUES)
def test_damaged_files_are_refused_or_have_no_effect(place: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(PIPELINE)
    at: Any = document
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with contextlib.suppress(TokenizerError):
        tokenizer = read(document)
        assert tokenizer.decode(tokenizer.encode("a text", bos=True)).endswith("a text")
