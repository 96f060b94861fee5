"""SentencePiece tokenizers against the sentencepiece and tokenizers libraries."""

from __future__ import annotations

import io
import json
import pydoc_data.topics
import random
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from glassllama.base.errors import TokenizerError
from glassllama.native.tokenizers import COMPILED
from glassllama.tokenizers.chat import Message, TemplateChat
from glassllama.tokenizers.detokenizer import Detokenizer
from glassllama.tokenizers.hf_json import pipeline_from_json
from glassllama.tokenizers.pipeline import PipelineTokenizer
from glassllama.tokenizers.sentencepiece import (
    Pieces,
    PieceType,
    SentencePieceTokenizer,
    piece_types,
    read_sentencepiece,
)
from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf
from long_mode import LONG, SEEDS
from processor_time import seconds
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

PROSE = "\n".join(pydoc_data.topics.topics.values())
CODE = "\n".join(
    path.read_text("utf-8") for path in sorted(Path(json.__file__).parent.parent.glob("[a-f]*.py"))
)
FOREIGN = (
    "Größe naïve café – “quotes” … Привет, как дела? Ελληνικά "
    "日本語のテキストです。中文文本没有空格。한국어 텍스트 हिन्दी में पाठ ก็ไม่ عربي עברית "
    "👩\u200d👩\u200d👧 😀😀😀 e\u0301\u0323 x²+y³ ½ ﬁ\u3000wide\xa0blank\u200bzero "
)
# Each tests another path through the tokenizer.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {
        "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
    },
    "gemma": {
        "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "<h1>", "\u2581\u2581",
                                 "\u2581\u2581\u2581\u2581", "\n\n", "the\u2581", "<|fim|>"],
        "control_symbols": ["<ctrl>", "[INST]"],
    },
    "defaults": {},
    "across spaces": {
        "byte_fallback": True, "split_by_whitespace": False, "split_by_unicode_script": False,
        "split_by_number": False, "remove_extra_whitespaces": False, "max_sentencepiece_length": 24,
    },
}  # fmt: skip
ODD = [
    "", " ", "  ", "\n", "a", " a", "a ", "  a  b  ", "\t\ta\t", "▁", "a▁b", "▁▁ ▁", "\0", "\ufeff",
    "<s>", "</s>", "<unk>", "<0x41>", "<s>a</s>", "<ctrl>", "[INST]", "<start_of_turn>user\nx",
    "<h1> the <h1>the the", "\n\n\n", "\ufffd", "\U0010ffff", "\ud7ff\ue000", "é" * 9,
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small BPE model for each of SETTINGS, trained by the sentencepiece library."""
    lines = (PROSE[:300_000] + "\n" + CODE[:300_000]).splitlines() + [FOREIGN] * 50
    folder = tmp_path_factory.mktemp("models")
    for name, settings in SETTINGS.items():
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, model_type="bpe", vocab_size=2000,
            normalization_rule_name="identity", num_threads=2, minloglevel=2, **settings,
        )  # fmt: skip
        (folder / f"{name}.model").write_bytes(written.getvalue())
    return {name: folder / f"{name}.model" for name in SETTINGS}


@pytest.fixture(scope="module", params=list(SETTINGS))
def pair(
    request: pytest.FixtureRequest, trained: dict[str, Path]
) -> tuple[SentencePieceTokenizer, sentencepiece.SentencePieceProcessor]:
    path = trained[request.param]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return read_sentencepiece(path), theirs


Pair = tuple[SentencePieceTokenizer, sentencepiece.SentencePieceProcessor]


def mixed(seed: int, pieces: list[str]) -> str:
    """Random text of words, spaces, special tokens, pieces of the vocabulary and any characters."""
    choice = random.Random(seed)
    parts = []
    for _ in range(choice.randrange(1, 40)):
        kind = choice.randrange(6)
        if kind == 0:
            parts.append(choice.choice(ODD))
        elif kind == 1:
            begin = choice.randrange(len(CODE) - 50)
            parts.append(CODE[begin : begin + choice.randrange(50)])
        elif kind == 2:
            parts.append(" " * choice.randrange(6) + "\n" * choice.randrange(3))
        elif kind == 3:
            parts.append(choice.choice(pieces).replace("▁", " "))
        elif kind == 4:
            parts.append(chr(choice.choice([*range(0x20, 0xD800), *range(0xE000, 0x20000)])))
        else:
            begin = choice.randrange(len(FOREIGN))
            parts.append(FOREIGN[begin : begin + choice.randrange(9)])
    return "".join(parts)


def special_on_request_only(pair: Pair, text: str) -> bool:
    """Whether our tokenizer treats as special a token that the library always parses."""
    ours, theirs = pair
    always = [special for special, id in ours.specials.items() if not theirs.is_control(id)]
    return any(special in text for special in always)


def one_replacement(text: str) -> str:
    """The library writes U+FFFD for each invalid byte, Python for groups of them."""
    return re.sub("\ufffd+", "\ufffd", text)


@pytest.mark.identical("SentencePiece: whole vocabulary", "sentencepiece")
def test_the_whole_vocabulary(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.vocab_size == theirs.vocab_size()
    for id in range(ours.vocab_size):
        piece = theirs.id_to_piece(id)
        text = piece.replace("▁", " ")
        if special_on_request_only(pair, text):
            assert id not in ours.encode(text)
            assert ours.encode(text, specials=True)[-1:] == [id]
            continue
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode("x" + text + "y") == theirs.encode("x" + text + "y")
        # After another token, so that no space is removed.
        anchor = theirs.piece_to_id("e")
        assert one_replacement(ours.decode([anchor, id])) == one_replacement(
            theirs.decode([anchor, id])
        )
        assert (id in ours.specials.values()) >= theirs.is_control(id)


@pytest.mark.identical("SentencePiece: ids of every code point", "sentencepiece")
def test_every_code_point(pair: Pair, request: pytest.FixtureRequest) -> None:
    ours, theirs = pair
    # All settings with and without byte tokens, and some with the others.
    step = 1 if request.node.callspec.params["pair"] in ("llama", "defaults") else 7
    points = [chr(n) for n in range(0, 0x30000, step) if not 0xD800 <= n < 0xE000]
    expected = theirs.encode(points)
    wrong = [p for p, ids in zip(points, expected, strict=True) if ours.encode(p) != ids]
    assert wrong == []


@pytest.mark.identical("SentencePiece: mixed texts, 100 seeds", "sentencepiece")
def test_mixed_text_of_100_seeds(pair: Pair) -> None:
    ours, theirs = pair
    pieces = [theirs.id_to_piece(id) for id in range(theirs.vocab_size())]
    for text in [*ODD, *(mixed(seed, pieces) for seed in range(SEEDS))]:
        if special_on_request_only(pair, text):
            assert not set(ours.encode(text)) & set(ours.specials.values())
            continue
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        decoder = Detokenizer(ours)
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == theirs.decode(ids)


@pytest.mark.identical("SentencePiece: prose and code", "sentencepiece")
def test_megabytes_of_prose_and_code(pair: Pair) -> None:
    ours, theirs = pair
    for text in (PROSE[300_000:], CODE[300_000 : 2_000_000 if LONG else 800_000]):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.encode_array(text[:1000]).tolist() == ours.encode(text[:1000])


def test_a_stream_that_continues_a_text_keeps_its_first_space(pair: Pair) -> None:
    ours, theirs = pair
    ids = [theirs.piece_to_id("▁of"), theirs.piece_to_id("▁the")]
    decoder = Detokenizer(ours, continues=True)
    assert "".join(map(decoder.push, ids)) == " of the"


def test_random_ids(pair: Pair) -> None:
    ours, theirs = pair
    unshown = set(ours.specials.values()) | {theirs.unk_id()}
    shown = [id for id in range(ours.vocab_size) if id not in unshown]
    choice = random.Random(0)
    blanks = [id for id in shown if theirs.id_to_piece(id).strip("▁") == ""]
    for _ in range(300):
        some = [choice.choice(choice.choice([shown, blanks or shown])) for _ in range(8)]
        ids = [choice.choice([*some, theirs.bos_id()]) for _ in range(choice.randrange(9))]
        text = ours.decode(ids)
        assert one_replacement(text) == one_replacement(theirs.decode(ids))
        decoder = Detokenizer(ours)
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == text


# tokenizer.json, against the tokenizers library

BLANKS_TO_PIECES = normalizers.Replace(" ", "▁")
BYTES_TO_TEXT = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama 2": {
        "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), BLANKS_TO_PIECES]),
        "decoder": decoders.Sequence([*BYTES_TO_TEXT, decoders.Strip(" ", 1, 0)]),
    },
    "mistral": {
        "pre_tokenizer": pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False),
        "decoder": decoders.Sequence([*BYTES_TO_TEXT, decoders.Strip(" ", 1, 0)]),
    },
    "metaspace": {
        "pre_tokenizer": pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True),
        "decoder": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    },
    "gemma": {
        "normalizer": BLANKS_TO_PIECES,
        "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous"),
        "decoder": decoders.Sequence(BYTES_TO_TEXT),
    },
}


def as_hugging_face(model: Path, family: str) -> Tokenizer:
    """A SentencePiece model written by the tokenizers library, one pair of pieces at a time."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [spm.id_to_piece(id) for id in range(spm.vocab_size())]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    normal = {piece: id for piece, id in vocab.items() if spm.get_score(id) < 0}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda p: -spm.get_score(normal[p]))
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    for stage, value in FAMILIES[family].items():
        setattr(tokenizer, stage, value)
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<tag>", "é€")])
    if family != "mistral":
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module", params=list(FAMILIES))
def json_pair(
    request: pytest.FixtureRequest, trained: dict[str, Path]
) -> tuple[PipelineTokenizer, Tokenizer]:
    theirs = as_hugging_face(trained["llama"], request.param)
    return pipeline_from_json(json.loads(theirs.to_str())), theirs


def their_ids(theirs: Tokenizer, text: str, *, specials: bool) -> list[int]:
    theirs.encode_special_tokens = not specials
    ids: list[int] = theirs.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.identical("SentencePiece: tokenizer.json", "tokenizers")
def test_json_gives_the_ids_and_texts_of_the_tokenizers_library(
    json_pair: tuple[PipelineTokenizer, Tokenizer],
) -> None:
    ours, theirs = json_pair
    assert ours.vocab_size == theirs.get_vocab_size()
    pieces = list(theirs.get_vocab())
    texts = [*ODD, "a<tag>b <tag> c", "é€é€ é", *(mixed(seed, pieces) for seed in range(SEEDS))]
    texts += [piece.replace("▁", " ") for piece in pieces] + [CODE[:150_000], PROSE[:150_000]]
    for text in texts:
        ids = their_ids(theirs, text, specials=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.encode(text, specials=True) == their_ids(theirs, text, specials=True)


def test_json_every_code_point(
    json_pair: tuple[PipelineTokenizer, Tokenizer], request: pytest.FixtureRequest
) -> None:
    ours, theirs = json_pair
    step = 1 if request.node.callspec.params["json_pair"] == "llama 2" else 7
    points = [chr(n) for n in range(0, 0x30000, step) if not 0xD800 <= n < 0xE000]
    for at in range(0, len(points), 64):
        text = " ".join(points[at : at + 64])
        assert ours.encode(text) == their_ids(theirs, text, specials=False)


def test_json_names_the_first_token_of_a_text(
    json_pair: tuple[PipelineTokenizer, Tokenizer],
) -> None:
    ours, theirs = json_pair
    assert ours.encode("hello", bos=True) == theirs.encode("hello").ids
    assert ours.stop_ids == {2}


def test_a_special_token_between_texts(json_pair: tuple[PipelineTokenizer, Tokenizer]) -> None:
    """The space before a text depends on what comes before it: see ChatML on Llama 2."""
    ours, theirs = json_pair
    ids = ours.encode_parts([1, "[INST] hi [/INST]", 2, 1, " again", "<s>"])
    written = their_ids(theirs, "<s>[INST] hi [/INST]</s><s> again", specials=True)
    assert ids[: len(written)] == written
    assert 1 not in ids[len(written) :]


LLAMA2 = """\
{% for m in messages %}{% if m.role == 'user' %}\
{{ bos_token + '[INST] ' + m.content.strip() }} [/INST]\
{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
GEMMA = """\
{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + (m.content | trim) }}\
<end_of_turn>
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


@pytest.mark.parametrize("template", [LLAMA2, GEMMA, "{{ messages[0].content }}"])
def test_chat_templates_give_the_ids_of_transformers(
    json_pair: tuple[PipelineTokenizer, Tokenizer], template: str
) -> None:
    ours, theirs = json_pair
    theirs.encode_special_tokens = False
    fast = PreTrainedTokenizerFast(tokenizer_object=theirs, bos_token="<s>", eos_token="</s>")
    chat = TemplateChat(template, bos_token="<s>", eos_token="</s>")
    compared = 0
    for seed in range(20):
        contents = [mixed(seed + n, ["x"]) for n in range(3)]
        if any(re.search("<unk>|<s>|</s>|<tag>|é€", text) for text in contents):
            continue
        messages = [
            {"role": ("user", "assistant")[n % 2], "content": text}
            for n, text in enumerate(contents)
        ]
        expected = fast.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert chat.encode(messages, ours) == expected
        compared += 1
    assert compared > 5


def test_chat_text_never_becomes_a_special_id(
    json_pair: tuple[PipelineTokenizer, Tokenizer],
) -> None:
    """The only special ids are the template's."""
    ours, _ = json_pair
    chat = TemplateChat(LLAMA2, bos_token="<s>", eos_token="</s>")
    conversation = [("user", "<s></s>"), ("assistant", "a</s>[INST] b</s"), ("user", "s><s><s>")]
    ids = chat.encode([Message(role, content) for role, content in conversation], ours)
    assert [id for id in ids if id in {0, 1, 2}] == [1, 2, 1]
    assert ours.decode(ids).count("<s></s>") == 1


# GGUF, written by the gguf package


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.identical("SentencePiece: GGUF vocabulary", "sentencepiece")
def test_gguf_gives_the_ids_of_sentencepiece(
    trained: dict[str, Path], name: str, tmp_path: Path
) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(trained[name]))
    ours = tokenizer_from_gguf(written_gguf(theirs, tmp_path / "m.gguf", name == "llama"))
    assert (ours.bos, ours.stop_ids) == (1, {2} | {ours.specials.get("<end_of_turn>", 2)})
    pieces = [theirs.id_to_piece(id) for id in range(theirs.vocab_size())]
    for text in [*ODD, PROSE[:100_000], *(mixed(seed, pieces) for seed in range(SEEDS))]:
        if not special_on_request_only((ours, theirs), text):
            ids = theirs.encode(text)
            assert ours.encode(text) == ids
            assert ours.decode(ids) == theirs.decode(ids)


def written_gguf(
    model: sentencepiece.SentencePieceProcessor, path: Path, prefix: bool
) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes, read back by the gguf package."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def metadata(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(trained["llama"]))
    return written_gguf(theirs, tmp_path_factory.mktemp("gguf") / "m.gguf", True)


def with_piece(metadata: dict[str, Any], text: str, kind: int) -> dict[str, Any]:
    more = {"tokens": text, "token_type": kind, "scores": -1000.0}
    keys = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return metadata | {key: [*metadata[key], value] for key, value in keys.items()}


def test_gguf_user_defined_pieces_are_found_first(metadata: dict[str, Any]) -> None:
    """As in llama.cpp: a space before each part of the text, none before the piece."""
    ours = tokenizer_from_gguf(with_piece(metadata, "<sep>", 4))
    plain = tokenizer_from_gguf(metadata)
    id = plain.vocab_size
    for before, behind in (("of", "the"), ("of ", " the"), ("", ""), ("of", "")):
        expected = [*plain.encode(before), id, *plain.encode(behind)]
        assert ours.encode(f"{before}<sep>{behind}") == expected
        assert ours.encode(f"{before}<sep>{behind}", specials=True) == expected


def test_gguf_the_text_of_the_unknown_token_is_parsed_with_specials(
    metadata: dict[str, Any],
) -> None:
    ours = tokenizer_from_gguf(metadata)
    assert ours.encode("of<unk>the", specials=True) == [*ours.encode("of"), 0, *ours.encode("the")]
    assert 0 not in ours.encode("of<unk>the")


def test_gguf_without_scores_or_types_loads(metadata: dict[str, Any]) -> None:
    """Scores are equal then, so the leftmost pair goes first; pieces are normal, bytes by name."""
    whole = tokenizer_from_gguf(metadata)
    untyped = {k: v for k, v in metadata.items() if k != "tokenizer.ggml.token_type"}
    ours = tokenizer_from_gguf(untyped)
    for text in ("of the 🦙", PROSE[:2000], "<s>", "</s>"):
        assert ours.encode(text) == whole.encode(text)
    assert {*whole.specials} == {*ours.specials} == {"<s>", "</s>"}
    ours = tokenizer_from_gguf({k: v for k, v in metadata.items() if "scores" not in k})
    assert ours.decode(ours.encode("of the 🦙")) == "of the 🦙"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "a", "b", "ab", "ba"]
    small = tokenizer_from_gguf({"tokenizer.ggml.model": "llama",
                                 "tokenizer.ggml.tokens": pieces,
                                     "tokenizer.ggml.add_space_prefix": False})  # fmt: skip
    assert small.encode("aba") == [261, 259]
    assert small.encode("é") == [3 + 0xC3, 3 + 0xA9]


def test_gguf_empty_and_equal_pieces(metadata: dict[str, Any]) -> None:
    """An empty piece is never used; of equal ones the last is used, as in llama.cpp."""
    plain = tokenizer_from_gguf(metadata)
    for kind in (1, 3, 4, 5):
        ours = tokenizer_from_gguf(with_piece(metadata, "", kind))
        assert ours.encode("of the", specials=True) == plain.encode("of the")
        assert ours.decode([plain.vocab_size]) == ""
    ours = tokenizer_from_gguf(with_piece(metadata, "e", 1))
    assert ours.encode("▁e")[-1:] == [plain.vocab_size]


@pytest.fixture(scope="module")
def many_added(
    trained: dict[str, Path],
) -> tuple[SentencePieceTokenizer, sentencepiece.SentencePieceProcessor, list[str]]:
    """As in Gemma's files: thousands of user-defined pieces that begin alike, and runs."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained["gemma"].read_bytes())
    known = {piece.piece for piece in proto.pieces}
    texts = [f"<unused{n}>" for n in range(5000)] + [
        char * n for char in "\n▁=" for n in range(2, 32)
    ]
    texts = [text for text in texts if text not in known]
    for text in texts:
        proto.pieces.add(piece=text, score=0.0, type=int(PieceType.USER_DEFINED))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    pieces, numbers = zip(*((piece.piece, piece.type) for piece in proto.pieces), strict=True)
    settings = {"add_prefix": False, "drop_prefix": False}
    scores = tuple(piece.score for piece in proto.pieces)
    types = piece_types(pieces, numbers)
    ours = SentencePieceTokenizer(Pieces(texts=pieces, types=types, scores=scores, **settings))
    return ours, theirs, texts


@pytest.mark.identical("SentencePiece: thousands of user-defined pieces", "sentencepiece")
def test_thousands_of_user_defined_pieces(many_added: Any) -> None:
    ours, theirs, texts = many_added
    choice = random.Random(3)
    parts = [*texts, *texts[-90:] * 50, "<", "<unused", "a", " ", "▁", "\n", "<unused1", "é", "="]
    for _ in range(300):
        text = "".join(choice.choices(parts, k=30))
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("part", ["<", "<unused", "<unused499", "<unused4999>", "=", "\n "])
def test_a_million_characters_of_user_defined_pieces(many_added: Any, part: str) -> None:
    """With thousands of alternatives at every `<`, a regular expression takes minutes."""
    ours, _, _ = many_added
    text = (part * 1_000_000)[:1_000_000]
    ours.encode("<" * 1000)  # compiles the code for long words
    assert seconds(lambda: ours.encode(text), enough=5) <= 5


# Faults


@pytest.fixture(scope="module")
def warm(trained: dict[str, Path]) -> SentencePieceTokenizer:
    tokenizer = read_sentencepiece(trained["llama"], COMPILED)
    tokenizer.encode("a" * 1000 + " " * 1000)  # compiles the code for long words
    return tokenizer


@pytest.mark.parametrize("unit", [" ", "\n", "^", "a", "0", "😀", "\u0301"])
def test_a_million_of_one_character(warm: SentencePieceTokenizer, unit: str) -> None:
    """Round trip, at most 5 s: quadratic time would be minutes."""
    text = unit * 1_000_000

    def there_and_back() -> None:
        assert warm.decode(warm.encode(text)) == text

    assert seconds(there_and_back, enough=5) <= 5


def test_a_lone_surrogate_is_refused(trained: dict[str, Path]) -> None:
    """A lone surrogate is refused, everything else in ODD is text."""
    for name in ("llama", "defaults"):
        with pytest.raises(TokenizerError, match=r"character 1 is U\+D800"):
            read_sentencepiece(trained[name]).encode("a\ud800")


@pytest.mark.parametrize("id", [-1, 2000, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(trained: dict[str, Path], id: int) -> None:
    tokenizer = read_sentencepiece(trained["llama"])
    for use in (tokenizer.token_bytes, lambda id: tokenizer.decode([5, id])):
        with pytest.raises(TokenizerError, match=f"id {id}: not in the vocabulary, .* 0 … 1999"):
            use(id)


def test_special_tokens_are_read_only_on_request(trained: dict[str, Path]) -> None:
    """Also those that Gemma's file declares as ordinary added tokens."""
    tokenizer = read_sentencepiece(trained["gemma"])
    for text in tokenizer.specials:
        assert not set(tokenizer.encode(f"a{text}b")) & set(tokenizer.specials.values())
        assert tokenizer.specials[text] in tokenizer.encode(f"a{text}b", specials=True)
    assert {"<start_of_turn>", "<|fim|>", "<ctrl>"} <= set(tokenizer.specials)
    assert "<h1>" not in tokenizer.specials


def test_damaged_models_are_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    """Truncated or with a changed byte: an error that names the file, or a valid vocabulary."""
    whole = trained["llama"].read_bytes()
    path = tmp_path / "tokenizer.model"
    choice = random.Random(0)
    refused = 0
    for _ in range(80):
        at = len(whole) - choice.randrange(1, choice.choice([600, len(whole)]))  # settings, pieces
        changed = whole[:at] + bytes([choice.randrange(256)]) + whole[at + 1 :]
        path.write_bytes(choice.choice([whole[:at], changed]))
        error = error_of(path)
        refused += error is not None
        assert error is None or (str(path) in error and "\n" not in error)
    assert refused > 20
    with pytest.raises(TokenizerError, match="missing: cannot be read"):
        read_sentencepiece(tmp_path / "missing")
    for content in (b"", b"hello", b"IQ== 0\nIg== 1\n"):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match="is no SentencePiece model"):
            read_sentencepiece(path)


def error_of(path: Path) -> str | None:
    try:
        read_sentencepiece(path).encode("hello")
    except TokenizerError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "trainer_spec.model_type: expected bpe, got unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "'nmt_nfkc' is not supported, only identity is"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix: not supported"),
    ],
)
def test_other_model_types_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE[:50_000].splitlines()), model_prefix=str(tmp_path / "m"),
        vocab_size=300, minloglevel=2,
        **{"model_type": "bpe", "normalization_rule_name": "identity", **options},
    )  # fmt: skip
    with pytest.raises(TokenizerError, match=re.escape(message)):
        read_sentencepiece(tmp_path / "m.model")


def test_gguf_ids_beyond_the_vocabulary_are_replaced_by_defaults(metadata: dict[str, Any]) -> None:
    """As in llama.cpp, with a note; an empty precompiled_charsmap is ignored."""
    usual = tokenizer_from_gguf(metadata)
    beyond = {"bos_token_id": 9000, "eos_token_id": 9001, "eot_token_id": 9002}
    changed = {f"tokenizer.ggml.{key}": id for key, id in beyond.items()}
    changed["tokenizer.ggml.precompiled_charsmap"] = np.uint8([])
    tokenizer = tokenizer_from_gguf(metadata | changed)
    assert (tokenizer.bos, tokenizer.stop_ids) == (usual.bos, usual.stop_ids)
    assert [note.split(" is ")[0] for note in tokenizer.notes] == [
        f"tokenizer.ggml: {key}" for key in beyond
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "tokenizer.ggml: tokens is missing"),
        ({"tokens": [1, 2]}, "tokenizer.ggml: tokens must be a list of texts, got [1, 2]"),
        ({"scores": [0.0]}, "tokenizer.ggml: scores has 1 values for 2000 tokens"),
        ({"scores": [float("nan")] * 2000}, "scores must be a list of finite numbers"),
        ({"token_type": [9] * 2000}, "type 9 of a token is not known"),
        ({"token_type": [-1] * 2000}, "token_type must be a list of whole numbers"),
        ({"token_type": [6] * 2000}, "a byte is written"),
        ({"eos_token_id": "x"}, "eos_token_id must be a whole number from 0 to 2147483647"),
        ({"eos_token_id": 10**400}, "eos_token_id must be a whole number from 0 to 2147483647"),
        ({"add_bos_token": "no"}, "add_bos_token must be true or false, got 'no'"),
        ({"precompiled_charsmap": [1]}, "precompiled_charsmap must be none"),
        ({"precompiled_charsmap": np.uint8([1, 2])}, "precompiled_charsmap must be none"),
        ({"precompiled_charsmap": "x"}, "precompiled_charsmap must be none"),
        ({"precompiled_charsmap": 5}, "precompiled_charsmap must be none"),
    ],
)
def test_errors_name_wrong_gguf_metadata(
    trained: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(trained["llama"]))
    metadata = written_gguf(theirs, tmp_path / "m.gguf", True)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(TokenizerError, match=re.escape(message)):
        tokenizer_from_gguf(metadata)


@pytest.mark.parametrize(
    ("stage", "value", "message"),
    [
        ("normalizer", {"type": "Precompiled"}, "normalizer: type must be one of NFC, "),
        ("pre_tokenizer", {"type": "BertPreTokenizer"}, "pre_tokenizer: type must be one of Split"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "decoder must be ByteLevel"),
        ("decoder", {"type": "WordPiece"}, "decoder: type must be one of ByteFallback"),
        ("decoder", None, "decoder is missing"),
        ("post_processor", {"type": "Sentences"}, "post_processor: type must be ByteLevel"),
        ("model", {"type": "Unigram"}, "model: type must be BPE, got 'Unigram'"),
        ("model", {"type": "BPE", "dropout": 0.1}, "model: dropout must be null, got 0.1"),
        ("model", {"type": "BPE", "vocab": {"a": 3}, "merges": ["a b"]}, "merges: number 0"),
        ("model", {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}, "id to two tokens"),
        ("added_tokens", [{"id": 5}], "added_tokens[0]: content is missing"),
        ("added_tokens", [{"id": 5, "content": "x", "special": True, "lstrip": 1}],
         "added_tokens[0]: lstrip must be true or false, got 1"),
    ],
)  # fmt: skip
def test_unsupported_json_is_refused(
    trained: dict[str, Path], stage: str, value: Any, message: str
) -> None:
    document = json.loads(as_hugging_face(trained["llama"], "llama 2").to_str())
    with pytest.raises(TokenizerError, match=re.escape(message)):
        pipeline_from_json({**document, stage: value})
