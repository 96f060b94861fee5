"""The small files next to a tokenizer, read as transformers does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from glassllama.base.errors import TokenizerError
from glassllama.weights.tokenizer import (
    chat_template_from_folder,
    template_tokens_from_folder,
    tokenizer_from_folder,
)
from processor_time import seconds
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "<|im_start|>user\nhi there<|im_end|>", "a <tool>and<tool>b", "<|im_end|><|im_end|>",
    "the [PAD]fox", "<mark>the quick</s>brown", "hi", "<extra>says <|x|>",
]  # fmt: skip
# After a token, sentencepiece and llama.cpp turn one space into two and transformers does not.
WITH_BLANKS = [" hi", "a <tool> and <tool> b", "<mark> the </s> fox", "[PAD] <extra> <|x|>\n"]


def row(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special, **plain, **flags}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SentencePiece model of about 300 pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "corpus.txt").write_text("the quick brown fox says hi to user and assistant\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["the quick brown fox says hi"] * 9, trainer)
    folder = tmp_path_factory.mktemp("bytewise")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def size_of(folder: Path) -> int:
    return tokenizer_from_folder(folder).vocab_size


def with_files(source: Path, folder: Path, files: dict[str, Any]) -> Path:
    """A folder with the source's tokenizer and these files. "+n" is the n-th id after it."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    size = size_of(source)
    for name, content in files.items():
        text = json.dumps(content)
        for n in range(9):
            text = text.replace(f'"+{n}": {{', f'"{size + n}": {{').replace(
                f'"+{n}"', str(size + n)
            )
        (folder / name).write_text(text)
    return folder


CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
MARKS = {"<|im_start|>": "+0", "<|im_end|>": "+1"}
DECODER = {"+0": row("<|im_start|>"), "+1": row("<|im_end|>"), "+2": row("<tool>")}
SIDE_FILES: dict[str, dict[str, Any]] = {
    "added_tokens.json": {"added_tokens.json": {**MARKS, "<tool>": "+2"}},
    "added_tokens_decoder": {"tokenizer_config.json": {"added_tokens_decoder": DECODER}},
    "the decoder takes precedence over the older files": {
        "tokenizer_config.json": {"added_tokens_decoder": DECODER},
        "added_tokens.json": {"<other>": "+0"},
        "special_tokens_map.json": {"eos_token": "<other>"},
    },
    "an added end token": {
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
        "added_tokens.json": MARKS,
    },
    "an end token in the special tokens map": {
        "added_tokens.json": MARKS,
        "special_tokens_map.json": {"eos_token": row("<|im_end|>")},
    },
    "additional_special_tokens": {
        "tokenizer_config.json": {"additional_special_tokens": ["<|x|>", "<mark>"]},
    },
    "extra_special_tokens, a list": {
        "tokenizer_config.json": {"extra_special_tokens": ["<extra>", "<mark>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<mark>", "<tool>"]},
    },
    "extra_special_tokens, named": {
        "tokenizer_config.json": {"extra_special_tokens": {"mark_token": "<mark>"}},
    },
    "new tokens in the order of transformers, not of the file": {
        "tokenizer_config.json": {
            "tool_token": "<tool>", "additional_special_tokens": ["<|x|>"], "mask_token": "<mark>",
            "pad_token": "[PAD]", "extra_special_tokens": [], "sep_token": "<extra>",
        },
    },
    "two lists of the older name": {
        "tokenizer_config.json": {"additional_special_tokens": ["<|x|>", "<mark>"]},
        "special_tokens_map.json": {"additional_special_tokens": ["<tool>"]},
    },
    "tokens with other role names": {
        "tokenizer_config.json": {"pad_token": "[PAD]", "tool_token": "<tool>"},
    },
    "special in one file, numbered in the other": {
        "added_tokens.json": {"<mark>": "+1", "[PAD]": "+0"},
        "special_tokens_map.json": {"pad_token": "[PAD]", "additional_special_tokens": ["<mark>"]},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pieces", "bytewise"])
@pytest.mark.parametrize("name", SIDE_FILES)
@pytest.mark.identical("ids with tokens of side files", "transformers")
def test_tokens_of_side_files(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, name: str
) -> None:
    files = SIDE_FILES[name]
    tokenizer_class = {"pieces": "LlamaTokenizer", "bytewise": "PreTrainedTokenizerFast"}[kind]
    config = {
        **CONFIG,
        "tokenizer_class": tokenizer_class,
        **files.get("tokenizer_config.json", {}),
    }
    folder = with_files(
        request.getfixturevalue(kind), tmp_path, {**files, "tokenizer_config.json": config}
    )
    theirs, ours = AutoTokenizer.from_pretrained(folder), tokenizer_from_folder(folder)
    for text in TEXTS + (WITH_BLANKS if kind == "bytewise" else []):
        assert ours.encode(text, specials=True) == theirs.encode(text, add_special_tokens=False)
    assert theirs.eos_token_id in ours.stop_ids
    assert {*ours.specials.values()} >= {*theirs.all_special_ids} - {0}
    named = template_tokens_from_folder(folder)
    assert named.items() <= theirs.special_tokens_map.items()
    assert named["eos_token"] == theirs.eos_token


# With a tokenizer.model transformers ignores additional_special_tokens.
NEW_TOKENS: dict[str, dict[str, Any]] = {
    "extra_special_tokens, named, and a list of the older name": {
        "tokenizer_config.json": {
            "extra_special_tokens": {"image": "<|x|>", "mark_token": "<mark>"},
            "additional_special_tokens": ["<tool>", "<extra>"],
        }
    },
    "a bos token that no file adds leaves its id free": {
        "tokenizer_config.json": {"bos_token": "<begin>", "pad_token": "[PAD]"}
    },
    "the last flags of a token": {
        "tokenizer_config.json": {
            "mask_token": "<mark>",
            "extra_special_tokens": [{"__type": "AddedToken", **row("<mark>", True, rstrip=True)}],
        }
    },
}


@pytest.mark.parametrize("name", NEW_TOKENS)
@pytest.mark.identical("ids with tokens of side files", "transformers")
def test_new_tokens_get_the_same_ids_as_in_transformers(
    bytewise: Path, tmp_path: Path, name: str
) -> None:
    files = NEW_TOKENS[name]
    files["tokenizer_config.json"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    folder = with_files(bytewise, tmp_path, files)
    theirs, ours = AutoTokenizer.from_pretrained(folder), tokenizer_from_folder(folder)
    for text in TEXTS + WITH_BLANKS:
        assert ours.encode(text, specials=True) == theirs.encode(text, add_special_tokens=False)
    assert template_tokens_from_folder(folder) == theirs.special_tokens_map


def test_a_token_of_the_vocabulary_named_as_special_becomes_a_control_token(
    bytewise: Path, tmp_path: Path
) -> None:
    document = json.loads((bytewise / "tokenizer.json").read_text())
    document["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    config = {"eos_token": "</s>", "pad_token": "h", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_from_folder(tmp_path)
    assert tokenizer.specials == {"</s>": 2}
    assert tokenizer.encode("the</s>", specials=True)[-1] == 2
    assert 2 not in tokenizer.encode("the</s>")
    assert tokenizer.decode(tokenizer.encode("hhh")) == "hhh", (
        "a single letter does not become special"
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"added_tokens.json": {"<x>": "5"}}, "added_tokens.json: <x> must be a whole number"),
        ({"added_tokens.json": {"<x>": -1}}, "added_tokens.json: <x> must be a whole number"),
        ({"added_tokens.json": {"<x>": 2**40}}, "added_tokens.json: <x> must be a whole number"),
        ({"added_tokens.json": {"": 300}}, "added_tokens.json: a token is empty"),
        ({"added_tokens.json": {"<x>": 2}}, "'<x>' has the id 2, which is that of '</s>'"),
        ({"added_tokens.json": []}, "added_tokens.json: must hold a JSON object"),
        ({"special_tokens_map.json": {"eos_token": 7}}, "map.json: eos_token must be text"),
        ({"special_tokens_map.json": {"eos_token": {}}}, "map.json: eos_token: content is missing"),
        ({"special_tokens_map.json": {"pad_token": ""}}, "pad_token must be a text that is not"),
        ({"special_tokens_map.json": {"extra_special_tokens": 1}}, "tokens must be"),
        ({"tokenizer_config.json": {"additional_special_tokens": [5]}}, "tokens: 0"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "decoder: expected"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": row("<x>")}}}, "must be ids"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"300": "<x>"}}}, "300: expected"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"300": row("<x>", lstrip=1)}}},
         "300: lstrip must be true or false"),  # type: ignore[arg-type]
        ({"tokenizer_config.json": {"add_bos_token": "yes"}}, "must be true or false"),
        ({"tokenizer_config.json": {"eos_token": "<|nowhere|>"}}, "is no token of"),
        ({"generation_config.json": {"eos_token_id": True}}, "eos_token_id is True"),
        ({"generation_config.json": {"eos_token_id": [10**400]}}, "eos_token_id is "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pieces", "bytewise"])
def test_errors_name_wrong_side_files(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, files: dict[str, Any], words: str
) -> None:
    folder = with_files(request.getfixturevalue(kind), tmp_path, files)
    with pytest.raises(TokenizerError) as raised:
        tokenizer_from_folder(folder)
    assert words in str(raised.value)
    assert str(folder / next(iter(files))) in str(raised.value)
    assert "\n" not in str(raised.value)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3),
        st.sampled_from(["<s>", "</s>", "the", "<new>"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["content", "special", "lstrip", "0", "2", "300", "<new>", "name"]),
            inner, max_size=3,
        ),
    ),
    max_leaves=6,
)  # fmt: skip
KEYS = [
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "bos_token",
    "eos_token", "pad_token", "x_token", "add_bos_token", "eos_token_id", "chat_template", "<new>",
]  # fmt: skip
NAMES = [
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.json",
]  # fmt: skip


@settings(max_examples=int(os.environ.get("GLASSLLAMA_FUZZ", "150")), deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(NAMES), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
        min_size=1, max_size=2,
    ),
    st.sampled_from(["pieces", "bytewise"]),
)  # fmt: skip
def test_any_side_file_is_read_or_refused_with_one_line(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, Any],
    kind: str,
) -> None:
    folder = with_files(request.getfixturevalue(kind), tmp_path_factory.mktemp("any"), {})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for read in (tokenizer_from_folder, chat_template_from_folder, template_tokens_from_folder):
        message = ""
        try:
            read(folder)
        except TokenizerError as refused:
            message = str(refused)
        assert "\n" not in message
        assert len(message) < 1000


@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja"])
def test_side_files_that_are_too_large_are_not_read(
    bytewise: Path, tmp_path: Path, name: str
) -> None:
    folder = with_files(bytewise, tmp_path, {})
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)  # a sparse file without data on the disk
    read = chat_template_from_folder if name.startswith("chat") else tokenizer_from_folder

    def refused() -> None:
        with pytest.raises(TokenizerError, match="has more than 16,777,216 bytes, which no such"):
            read(folder)

    assert seconds(refused, enough=0.5) < 0.5


@pytest.mark.parametrize("id", [200_000, 4_194_303])
def test_ids_far_beyond_the_tokens_are_refused(bytewise: Path, tmp_path: Path, id: int) -> None:
    """Nothing is allocated by the size of an id; long token names are shortened in errors."""
    for changed, name in (("vocab", "x" * 5000), ("added", "<|far|>")):
        folder = with_files(bytewise, tmp_path, {})
        document = json.loads((folder / "tokenizer.json").read_text())
        if changed == "vocab":
            document["model"]["vocab"][name] = id
        else:
            more = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
            document["added_tokens"].append({"id": id, "content": name, "special": True, **more})
        (folder / "tokenizer.json").write_text(json.dumps(document))
        with pytest.raises(TokenizerError, match=f"ids run from 0 to {id}; expected 0 to at most"):
            tokenizer_from_folder(folder)
        document["model"]["vocab"][name + "\n"] = "text"
        (folder / "tokenizer.json").write_text(json.dumps(document))
        with pytest.raises(TokenizerError, match="must be an id") as refused:
            tokenizer_from_folder(folder)
        assert len(str(refused.value)) < 400
        assert "\n" not in str(refused.value)


def test_a_template_in_a_separate_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ three }}"}))
    assert chat_template_from_folder(tmp_path) == "{{ three }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ two }}"}))
    assert chat_template_from_folder(tmp_path) == "{{ two }}"
    (tmp_path / "chat_template.jinja").write_text("{{ one }}")
    assert chat_template_from_folder(tmp_path) == "{{ one }}"


def test_notices_name_files_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"vocab\.json with merges\.txt does not say how"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("content", [[-1], {"a": 1}, 7, None])
def test_an_added_token_without_a_valid_text_is_refused(
    bytewise: Path, tmp_path: Path, content: Any
) -> None:
    folder = with_files(bytewise, tmp_path, {})
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"] = [*document.get("added_tokens", []), {"id": 1, "content": content}]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 0}))
    with pytest.raises(TokenizerError, match="added_tokens"):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize(
    "config",
    [
        None, {}, {"legacy": True}, {"legacy": False}, {"legacy": None},
        {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": None},
        {"legacy": True, "add_prefix_space": False},
    ],
)  # fmt: skip
@pytest.mark.identical("ids of tokenizer.model with and without `legacy`", "transformers")
def test_where_a_space_is_added(
    pieces: Path, tmp_path: Path, model_type: str, config: dict[str, Any] | None
) -> None:
    """Before the first word, or after each control token, too."""
    files = {"config.json": {"model_type": model_type}}
    folder = with_files(pieces, tmp_path, files)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = AutoTokenizer.from_pretrained(folder), tokenizer_from_folder(folder)
    for text in ("<s>fox says</s>hi", " hi  fox", "<s> hi", "hi", "<s>", ""):
        assert ours.encode(text, specials=True) == theirs.encode(text, add_special_tokens=False)


def test_added_tokens_must_agree_with_a_tiktoken_file(tmp_path: Path, llama3_ranks: Path) -> None:
    shutil.copy(llama3_ranks, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|eot_id|>": 128009}))
    assert tokenizer_from_folder(tmp_path).vocab_size == 128_256
    for wrong in ({"<|mark|>": 128256}, {"<|eot_id|>": 128010}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(TokenizerError, match=r"added_tokens.json: .* is no token of"):
            tokenizer_from_folder(tmp_path)
