"""The tokenizer of a checkpoint: GGUF metadata written by the gguf package, and published
folders."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from byte_level_families import FAMILIES, GGUF_NAMES, mixed_text, trained
from glassllama.base.errors import TokenizerError
from glassllama.formats.gguf import open_gguf
from glassllama.tokenizers.bpe import BytePairTokenizer
from glassllama.tokenizers.sentencepiece import SentencePieceTokenizer, read_sentencepiece
from glassllama.tokenizers.tiktoken_file import read_meta_tokenizer
from glassllama.tokenizers.vocabulary import read_json, stop_ids_by_name
from glassllama.weights.tokenizer import chat_template_from_folder, tokenizer_from_folder
from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf
from tokenizers import AddedToken, Tokenizer, processors

TEXT = "".join(mixed_text(seed) for seed in range(2000, 2030))
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Tokenizer]:
    return request.param, trained(request.param, TEXT, size=900, specials=SPECIALS)


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return trained("llama3", TEXT, size=900, specials=SPECIALS)


def gguf_of(foreign: Tokenizer, path: Path, pre: str, **more: Any) -> dict[str, Any]:
    """Metadata of a file written by the gguf package."""
    model = json.loads(foreign.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    added = ["<tool>", "ÿ naïve", "[unused]"]
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    kinds[: len(SPECIALS)] = [gguf.TokenType.CONTROL] * len(SPECIALS)
    kinds += [gguf.TokenType.USER_DEFINED] * 2 + [gguf.TokenType.UNUSED]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *added])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, value in more.items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(open_gguf(path).metadata)


def test_gguf(tmp_path: Path, family: tuple[str, Tokenizer]) -> None:
    name, foreign = family
    tokenizer = tokenizer_from_gguf(gguf_of(foreign, tmp_path / "a.gguf", GGUF_NAMES[name]))
    size = foreign.get_vocab_size()
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.bos == (0 if name == "llama3" else None)
    assert tokenizer.stop_ids == {1, 2, 3}
    assert {*tokenizer.specials} == {*SPECIALS}
    for seed in range(30):
        text = mixed_text(seed)
        ids = foreign.encode(text).ids
        assert tokenizer.encode(text, specials=True) == ids
    assert tokenizer.encode("<tool>ÿ naïve") == [size, size + 1]
    assert tokenizer.decode([size, size + 1, size + 2]) == "<tool>ÿ naïve[unused]"
    assert size + 2 not in tokenizer.encode("[unused]", specials=True)


def test_gguf_begin_and_stops(tmp_path: Path, llama: Tokenizer) -> None:
    def read(pre: str, **more: Any) -> Any:
        return tokenizer_from_gguf(gguf_of(llama, tmp_path / "a.gguf", pre, **more))

    assert read("llama-v3", add_bos_token=False).bos is None
    assert read("smollm", add_bos_token=True).bos == 0
    assert read("smollm", eot_token_id=7, eom_token_id=8).stop_ids == {1, 2, 3, 7, 8}
    assert read("llama3").encode("x", bos=True)[0] == 0
    beyond = read("llama3", eot_token_id=70_000)
    assert beyond.stop_ids == read("llama3").stop_ids
    assert beyond.notes == [
        f"tokenizer.ggml: eot_token_id is 70000, beyond the {beyond.vocab_size} tokens: not used"
    ]


# llama.cpp (2026-11) ends an answer at all of these but four.
NAMES = (
    "<|bos|> <|eos|> <|im_start|> <|im_end|> <|end|> <|eot_id|> <|eom_id|> <|endoftext|> "
    "<|end_of_text|> </s> <end_of_turn> <|end_of_turn|> <EOT> <|EOT|> <｜end▁of▁sentence｜> <eos> "
    "[EOS]"
).split()
GOES_ON = {"<|bos|>", "<|im_start|>", "<|end_of_turn|>", "<|EOT|>"}


@pytest.mark.parametrize("kind", [1, 3, 4], ids=["normal", "control", "user defined"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_gguf_stop_tokens_by_name_as_in_llama_cpp(model: str, kind: int) -> None:
    bytes_ = {"gpt2": [*"abc"], "llama": [f"<0x{byte:02X}>" for byte in range(256)]}[model]
    tokens = [*bytes_, *NAMES]
    kinds = [{"gpt2": 1, "llama": 6}[model]] * len(bytes_) + [kind] * (len(tokens) - len(bytes_))
    metadata = {
        "model": model, "pre": "gpt-2", "tokens": tokens, "token_type": kinds, "merges": [],
        "scores": [0.0] * len(tokens), "eos_token_id": tokens.index("<|eos|>"),
    }  # fmt: skip
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    ends = {tokens[id] for id in tokenizer.stop_ids}
    assert ends == {name for name in tokens if name in NAMES and name not in GOES_ON}
    by_name = ends - ({"<|eos|>"} if kind == 1 else set())  # this one is known by its id only
    assert {*tokenizer.specials} >= by_name, "text never becomes one"
    assert len(tokenizer.encode("<|im_end|></s>", specials=True)) == 2


def test_contradictory_stop_tokens() -> None:
    def ends(*names: str) -> set[str]:
        return {names[id] for id in stop_ids_by_name({name: id for id, name in enumerate(names)})}

    assert ends("<|end|>", "<|return|>", "x") == {"<|end|>", "<|return|>"}
    assert ends("<|end|>", "<|return|>", "<|call|>") == {"<|return|>", "<|call|>"}
    assert ends("<|end|>", "<|flush|>", "<|calls|>") == {"<|flush|>", "<|calls|>"}
    assert ends("</s>", "<|tool_response>") == {"<|tool_response>"}


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "pre unknown": ({"pre": "bert-bge"}, "pre is 'bert-bge'.*llama-bpe.*smollm.*qwen2.*tekken"),
    "pre missing": ({"pre": None}, "tokenizer.ggml: pre is missing; known are llama-bpe"),
    "pre is a list": ({"pre": ["llama-bpe"]}, r"pre must be text, got \['llama-bpe'\]"),
    "another model": ({"model": "bert"}, "model must be 'gpt2' .* got 'bert'"),
    "no model": ({"model": None}, "tokenizer.ggml: model is missing"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml: tokens is missing"),
    "tokens are a number": ({"tokens": 5}, "tokens must be a list of texts, got 5"),
    "no merges": ({"merges": None}, "tokenizer.ggml: merges is missing"),
    "merges are numbers": ({"merges": np.arange(3)}, "merges must be a list of texts"),
    "types too few": ({"token_type": np.ones(3, int)}, "token_type has 3 values for"),
    "types are floats": ({"token_type": np.ones(903)}, "token_type must be a list of whole"),
    "type unknown": ({"token_type": [9] * 903}, "token_type: 9 has no place"),
    "types are lists": ({"token_type": [[1]] * 903}, "token_type must be a list of whole"),
    "not byte-level": ({"token_type": [1] * 903, "tokens": ["▁a"] * 903}, "no byte has one"),
    "id is text": ({"eos_token_id": "2"}, "eos_token_id must be a whole number from 0 to"),
    "id below zero": ({"bos_token_id": -2}, "bos_token_id must be a whole number from 0 to"),
    "id of 2^31": ({"bos_token_id": 2**31}, "bos_token_id must be a whole number from 0 to"),
    "id of 10^400": ({"bos_token_id": 10**400}, "got <a whole number of 1329 bits>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_gguf(tmp_path: Path, llama: Tokenizer, name: str) -> None:
    changes, words = BROKEN[name]
    metadata = gguf_of(llama, tmp_path / "a.gguf", "llama-bpe")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(TokenizerError, match=words) as fault:
        tokenizer_from_gguf(metadata)
    assert "\n" not in str(fault.value)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64), st.floats(), st.text(max_size=3),
    st.lists(st.text(max_size=3), max_size=4), st.lists(st.integers(0, 9), max_size=4),
    st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=3),
)  # fmt: skip
KEYS = [
    "model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id",
    "eot_token_id", "eom_token_id", "add_bos_token",
]  # fmt: skip


def small_gguf(**changes: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "c", "ab", "bc", "<|last|>"],
        "token_type": np.array([1, 1, 1, 1, 1, 3], np.int32), "merges": ["a b", "b c"],
        "eos_token_id": 5,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}


def test_a_note_counts_merges_of_unknown_tokens() -> None:
    """As llama.cpp loads them: merged parts that are not tokens are split into bytes."""
    merges = ["b c", "bc a", "a b", "☃ a", "a", " b", "bca c"]
    tokenizer = tokenizer_from_gguf(small_gguf(merges=merges))
    assert isinstance(tokenizer, BytePairTokenizer)
    assert tokenizer.notes == [
        "tokenizer: 5 merges have parts that are not tokens; these are split into bytes"
    ]
    assert tokenizer.encode("bc") == [4]
    assert tokenizer.encode("bca") == [1, 2, 0]  # merged to "bca", which is not a token
    assert tokenizer.encode("abc") == [0, 4]
    long = "bca" * 300
    assert tokenizer.encode(long) == [1, 2, 0] * 300  # merged with a heap
    assert tokenizer.encode_array(long).tolist() == tokenizer.encode(long)
    assert tokenizer_from_gguf(small_gguf()).notes == []  # type: ignore[attr-defined]


def test_the_last_of_equal_special_tokens_is_used_and_all_are_tokens() -> None:
    tokens = ["a", "b", "<s>", "<s>", "<x>", "<x>"]
    metadata = small_gguf(
        tokens=tokens, token_type=[1, 1, 3, 3, 4, 4], merges=[], bos_token_id=2, eos_token_id=3,
        add_bos_token=True,
    )  # fmt: skip
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("a<s><x>", bos=True, specials=True) == [2, 0, 3, 5]
    assert [tokenizer.token_bytes(id).decode() for id in range(6)] == tokens
    assert list(tokenizer.gaps) == []


def test_equal_tokens_and_merges_as_in_llama_cpp() -> None:
    """The last of equal tokens, the first of equal merges; empty and invalid tokens are unused."""
    tokens = ["a", "b", "c", "ab", "bc", "a", "", "☃", "abc"]
    metadata = small_gguf(tokens=tokens, token_type=None, merges=["a b", "b c", "a b", "ab c"])
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("a") == [5]
    assert tokenizer.encode("abc") == [8]
    assert [tokenizer.token_bytes(id) for id in (0, 6, 7)] == [b"a", b"", "☃".encode()]


def test_the_id_2_32_minus_1_means_none() -> None:
    for none in (2**32 - 1, -1):
        assert tokenizer_from_gguf(small_gguf(eos_token_id=none)).stop_ids == frozenset()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_too_large_is_not_read(folder: Path, name: str) -> None:
    (folder / "tokenizer.json").unlink()
    with (folder / name).open("wb") as file:
        file.truncate(2**28 + 1)  # sparse files without data on the disk
    with pytest.raises(TokenizerError, match=f"{name}: has more than 268,435,456 bytes"):
        tokenizer_from_folder(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, read_meta_tokenizer, read_sentencepiece):
        with pytest.raises(TokenizerError, match="pipe: is not a regular file"):
            read(tmp_path / "pipe")


@settings(max_examples=int(os.environ.get("GLASSLLAMA_FUZZ", "300")), deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_damaged_metadata_is_refused_or_has_no_effect(changes: dict[str, Any]) -> None:
    metadata = {
        "model": "gpt2", "pre": "llama-bpe", "tokens": ["a", "b", "ab", "<|end|>"],
        "token_type": np.array([1, 1, 1, 3], np.int32), "merges": ["a b"], "eos_token_id": 3,
    }  # fmt: skip
    named = {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}
    with contextlib.suppress(TokenizerError):
        tokenizer = tokenizer_from_gguf(named)
        assert tokenizer.decode(tokenizer.encode("ab<|end|>", specials=True)) is not None


@pytest.fixture
def folder(tmp_path: Path, llama: Tokenizer) -> Path:
    """A folder saved by transformers, with Llama 3's post-processor."""
    begin = llama.token_to_id("<|begin_of_text|>")
    foreign = Tokenizer.from_str(llama.to_str())
    foreign.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    saved = PreTrainedTokenizerFast(
        tokenizer_object=foreign, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    saved.save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **fields: Any) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | fields))


def test_folder_of_transformers(folder: Path, llama: Tokenizer) -> None:
    tokenizer = tokenizer_from_folder(folder)
    assert isinstance(tokenizer, BytePairTokenizer)
    text = mixed_text(5)
    assert tokenizer.encode(text, bos=True, specials=True) == [0, *llama.encode(text).ids]
    assert tokenizer.stop_ids == {1, 2, 3}


def test_folder_settings(folder: Path) -> None:
    config, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    edit(config, add_bos_token=True, bos_token={"content": "<|eot_id|>"}, eos_token="e")
    edit(generation, eos_token_id=[2, 77])
    edit(folder / "config.json", eos_token_id=88)
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.stop_ids == {1, 2, 3, 77, *tokenizer.encode("e")}
    generation.unlink()
    assert 88 in tokenizer_from_folder(folder).stop_ids
    edit(folder / "config.json", eos_token_id=None)
    edit(config, eos_token=None)
    assert tokenizer_from_folder(folder).stop_ids == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("tokenizer_config.json", {"eos_token": "<|nowhere|>"}, "eos_token is '<|nowhere|>'"),
        ("tokenizer_config.json", {"eos_token": 7}, "eos_token must be text, got 7"),
        ("generation_config.json", {"eos_token_id": 900}, "eos_token_id is 900; expected .* 899"),
        ("generation_config.json", {"eos_token_id": ["x"]}, "eos_token_id is ['x']"),
        ("tokenizer.json", {"normalizer": {"type": "Bert"}}, "normalizer: type must be one of NFC"),
        ("tokenizer.json", {"model": []}, "model: expected an object"),
    ],
)
def test_broken_folder(folder: Path, name: str, fields: dict[str, Any], words: str) -> None:
    edit(folder / name, **fields)
    with pytest.raises(TokenizerError) as fault:
        tokenizer_from_folder(folder)
    before, _, after = words.partition(" .* ")
    assert str(folder / name) in str(fault.value)
    assert before in str(fault.value)
    assert after in str(fault.value)


def test_tokenizer_model_is_recognized_by_its_content(
    tmp_path: Path, llama3_ranks: Path, folder: Path
) -> None:
    weights = tmp_path / "download" / "Llama3.1-8B"
    weights.mkdir(parents=True)
    with pytest.raises(TokenizerError, match="no tokenizer; looked for ") as fault:
        tokenizer_from_folder(weights)
    assert str(weights / "tokenizer.model") in str(fault.value)
    assert str(weights.parent / "tokenizer.model") in str(fault.value)
    shutil.copy(llama3_ranks, weights.parent / "tokenizer.model")
    assert (
        tokenizer_from_folder(weights).vocab_size == 128_256
    )  # Meta's folders contain it one level above
    shutil.copy(folder / "tokenizer.json", weights)
    assert tokenizer_from_folder(weights).vocab_size == 900  # tokenizer.json takes precedence


@pytest.mark.parametrize("adds", [True, False, None])
@pytest.mark.parametrize("template", [True, False])
def test_texts_start_as_in_transformers(folder: Path, template: bool, adds: bool | None) -> None:
    """The post_processor of tokenizer.json decides; add_bos_token has no effect."""
    if not template:
        edit(folder / "tokenizer.json", post_processor=None)
    edit(
        folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|begin_of_text|>", **({} if adds is None else {"add_bos_token": adds}),
    )  # fmt: skip
    tokenizer = tokenizer_from_folder(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("a b", bos=True) == theirs.encode("a b")
    assert any("add_bos_token" in note for note in tokenizer.notes) == (adds == (not template))


def test_sentencepiece_folders(tmp_path: Path) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"the {n} quick brown foxes\n" for n in range(2000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        minloglevel=2,
    )  # fmt: skip
    edit(tmp_path / "generation_config.json", eos_token_id=[2, 300])
    edit(tmp_path / "tokenizer_config.json", add_bos_token=False, eos_token="</s>")
    tokenizer = tokenizer_from_folder(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode("the quick 😀 fox") == processor.encode("the quick 😀 fox")
    assert tokenizer.stop_ids == {2, 300}
    assert tokenizer.bos is None


def test_named_chat_templates_as_transformers_reads_them(tmp_path: Path, llama: Tokenizer) -> None:
    llama.save(str(tmp_path / "tokenizer.json"))
    more = tmp_path / "additional_chat_templates"
    more.mkdir()

    def check(wanted: str, chat_template: Any, **files: str) -> None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for name, text in files.items():
            path = tmp_path / "chat_template.jinja" if name == "main" else more / f"{name}.jinja"
            path.write_text(text)
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert chat_template_from_folder(tmp_path) == theirs.get_chat_template() == wanted

    check("d", {"tool_use": "t", "default": "d"})
    named = [{"name": "default", "template": "d"}, {"name": "default", "template": "later"}]
    check("later", named)
    check("main", named, main="main", tool_use="t")
    check("own", named, default="own")


def test_chat_templates(tmp_path: Path) -> None:
    assert chat_template_from_folder(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    edit(config, chat_template="{{ one }}")
    assert chat_template_from_folder(tmp_path) == "{{ one }}"
    named = [
        {"name": "tool_use", "template": "{{ t }}"},
        {"name": "default", "template": "{{ d }}"},
    ]
    edit(config, chat_template=named)
    assert chat_template_from_folder(tmp_path) == "{{ d }}"
    for bad in (7, named[:1], {"name": "default"}):
        edit(config, chat_template=bad)
        with pytest.raises(TokenizerError, match=r"tokenizer_config.json: chat_template"):
            chat_template_from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ é }}", "utf-8")
    assert chat_template_from_folder(tmp_path) == "{{ é }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: is no UTF-8"):
        chat_template_from_folder(tmp_path)


def test_added_tokens_of_transformers(folder: Path) -> None:
    """add_special_tokens and add_tokens of a fine-tuned model, saved and read."""
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.add_special_tokens({"pad_token": "<|pad|>"})
    theirs.add_tokens([AddedToken("<think>"), AddedToken("Größe")])
    theirs.save_pretrained(folder)
    ours = tokenizer_from_folder(folder)
    text = "<think>Die Größe<|pad|> ist 4</think>"
    assert ours.encode(text, bos=True, specials=True) == theirs(text)["input_ids"]
    assert ours.specials["<|pad|>"] == theirs.pad_token_id
    assert ours.specials["<|pad|>"] not in ours.encode(text)
