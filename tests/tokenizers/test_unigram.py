"""Unigram against sentencepiece, and SigLIP's tokenizer against transformers'."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import SiglipTokenizer as TheirTokenizer

from byte_level_families import mixed_text
from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.unigram import read_siglip_tokenizer
from processor_time import seconds

ROMEO = (Path(__file__).parent.parent / "romeo_and_juliet.txt").read_text(encoding="utf-8")
KINDS: dict[str, dict[str, Any]] = {
    "nmt_nfkc": {},  # SentencePiece's own, with a table of replacements
    "nmt_nfkc_cf": {"normalization_rule_name": "nmt_nfkc_cf"},
    "identity": {"normalization_rule_name": "identity"},
    "spaces stay": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "bytes": {"byte_fallback": True},
    "user-defined": {"user_defined_symbols": ["<image>", "O Romeo", "ﬁ"]},
}
TEXTS = [
    "", " ", "  a   b  ", "Hello, world!", "ﬁne ﬂow ①②③ ㍻ Ⅷ Å é", "\u3000全角　スペース",
    "a\tb\nc\r\nd",
    "🙂👩‍👩‍👧 zero\u200bwidth \ufeffbom", "▁▁ under ▁", "x" * 300,
    "<image> O Romeo, Romeo! ﬁ<image>",
    "Straße ΣΑΣ İstanbul", "한국어 日本語 العربية हिन्दी", "\x00\x01\x7f control", "e\u0301 é ﷺ",
    "½ ¼ ㎏ ™ ﬀ ＡＢＣ", "<unk> <s> </s>",
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("spiece")
    (folder / "text.txt").write_text(ROMEO[:120_000], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"), vocab_size=600,
        model_type="unigram", minloglevel=2, num_threads=1, **KINDS[request.param],
    )  # fmt: skip
    return folder / "spiece.model"


def texts() -> list[str]:
    chance = random.Random(0)
    alphabet = "ab ▁\tÉéﬁ①½ﬀ한字🙂\u0301\u200b  "
    many = ["".join(chance.choices(alphabet, k=chance.randrange(1, 40))) for _ in range(400)]
    lines = [line for line in ROMEO.splitlines() if line][:300]
    return [*TEXTS, *many, *lines, *(mixed_text(seed) for seed in range(40))]


def test_ids_equal_sentencepiece(model: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(str(model))
    ours = read_siglip_tokenizer(model).encoder
    for text in texts():
        assert ours.encode(text) == theirs.encode(text), text


def test_normalization_equals_sentencepiece(model: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(str(model))
    ours = read_siglip_tokenizer(model).encoder
    for text in texts():
        assert ours.normalize(text) == theirs.normalize(text).replace(" ", "▁"), text


def test_siglip_equals_transformers(model: Path) -> None:
    theirs = TheirTokenizer(str(model))
    ours = read_siglip_tokenizer(model, 16)
    if ours.encoder.replacements is None or not ours.encoder.pieces.trim:
        pytest.skip("SigLIP's vocabulary has the usual normalization")
    own = ("a photo of a cat.", "", "Two  CATS; (and) a dog?!", "It's \n here")
    for text in (*own, *texts()[17:]):
        if "▁" in text or "\x00" in text:
            continue  # transformers' own way to drop the first space needs other characters
        expected = theirs(text, padding="max_length", max_length=16, truncation=True)["input_ids"]
        assert ours.encode(text) == expected, text
    batch = ours.encode_batch(["a", "photo of a cat"])
    assert batch.shape == (2, 16)
    assert batch[0].tolist() == ours.encode("a")


def test_linear_time(model: Path) -> None:
    ours = read_siglip_tokenizer(model).encoder
    for text in ("Romeo and Juliet " * 3000, "x" * 50_000, "①" * 20_000):
        assert seconds(lambda text=text: ours.encode(text), enough=8) < 8


def test_damaged_files(model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    chance = random.Random(0)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(3):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        path = tmp_path / "spiece.model"
        path.write_bytes(broken[: chance.choice([len(broken), chance.randrange(len(broken))])])
        message = ""
        try:
            read_siglip_tokenizer(path).encode("A photo of ﬁve cats ①")
        except TokenizerError as error:
            message = str(error)
        assert "\n" not in message
    with pytest.raises(TokenizerError, match=r"missing\.model"):
        read_siglip_tokenizer(tmp_path / "missing.model")


def test_a_lone_surrogate(model: Path) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        read_siglip_tokenizer(model).encode("a\ud800b")


def test_a_model_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(ROMEO[:20_000], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "bpe"), vocab_size=300,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(TokenizerError, match="expected unigram, got bpe"):
        read_siglip_tokenizer(tmp_path / "bpe.model")
