"""Spaces as ▁ in a tokenizer.json, in all forms: ids and texts of the tokenizers library.

Metaspace as pre-tokenizer and as decoder, the normalizers Prepend and Replace of Llama 2, Mistral
and Gemma, byte fallback, unknown tokens. The vocabularies are small and trained here.
"""

from __future__ import annotations

import json
import random
from itertools import product
from typing import Any

import pytest

from byte_level_families import mixed_text
from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.detokenizer import Detokenizer
from glassllama.tokenizers.hf_json import tokenizer_from_json
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = "".join(mixed_text(seed) for seed in range(20))
WORDS = ["the", " the", " ", "  ", "▁", "▁▁", "\n", "\n\n", "\t", "café", "é", "日本語", "😀",
         "123", "<unk>", "<s>", "ab", "Word", "§", "I'm"]  # fmt: skip
N, P, D = normalizers, pre_tokenizers, decoders
BYTES_TO_TEXT = [D.Replace("▁", " "), D.ByteFallback(), D.Fuse()]
SCHEMES = [*product(("always", "first", "never"), (True, False))]
FORMS: dict[str, tuple[Any, Any, Any]] = {
    # normalizer, pre-tokenizer, decoder
    "Llama 2": (
        N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]), None,
        D.Sequence([*BYTES_TO_TEXT, D.Strip(" ", 1, 0)]),
    ),
    "Mistral 0.3": (
        None, P.Metaspace("▁", prepend_scheme="first", split=False),
        D.Sequence([*BYTES_TO_TEXT, D.Strip(" ", 1, 0)]),
    ),
    "Gemma": (
        N.Replace(" ", "▁"), P.Split(" ", "merged_with_previous"), D.Sequence(BYTES_TO_TEXT),
    ),
    "Replace by a pattern": (
        N.Replace(Regex(r"\s"), "▁"), P.Split(Regex("▁+"), "isolated"), D.Sequence(BYTES_TO_TEXT),
    ),
    "Removed": (N.Replace(" ", "▁"), P.Split("▁", "removed"), D.Sequence(BYTES_TO_TEXT)),
    "inverted": (
        N.Replace(" ", "▁"), P.Split(Regex("▁+"), "isolated", invert=True),
        D.Sequence(BYTES_TO_TEXT),
    ),
} | {
    f"Metaspace {scheme} {split}": (
        None, P.Metaspace("▁", scheme, split),
        D.Sequence([D.ByteFallback(), D.Metaspace("▁", scheme, split)]),
    )
    for scheme, split in SCHEMES
}  # fmt: skip


def trained(form: str, seed: int) -> Tokenizer:
    """A random vocabulary, with pieces for the bytes or without, and other options of the model."""
    chance = random.Random(f"{form} {seed}")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = FORMS[form]
    has_bytes = chance.random() < 0.7
    specials = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256 if has_bytes else 0))]
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + chance.randrange(60, 400), limit_alphabet=50,
        special_tokens=specials, show_progress=False,
    )  # fmt: skip
    begin = chance.randrange(len(TEXT) // 2)
    lines = [TEXT[at : at + 60] for at in range(begin, len(TEXT), 60)]
    tokenizer.train_from_iterator([*lines, "the  the café " * 99], trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:2]
    document["model"] |= {
        "byte_fallback": has_bytes, "fuse_unk": chance.random() < 0.7,
        "ignore_merges": chance.random() < 0.3,
    }  # fmt: skip
    return Tokenizer.from_str(json.dumps(document))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.identical("ids and texts with spaces as ▁", "tokenizers")
def test_ids_and_texts(form: str) -> None:
    chance = random.Random(1)
    for seed in range(6):
        theirs = trained(form, seed)
        ours = tokenizer_from_json(json.loads(theirs.to_str()))
        texts = ["".join(chance.choices(WORDS, k=chance.randrange(14))) for _ in range(100)]
        for text in [*texts, *(mixed_text(seed, pieces=60) for seed in range(5))]:
            ids = theirs.encode(text).ids
            assert ours.encode(text, specials=True) == ids, text
            decoded = theirs.decode(ids)
            assert ours.decode(ids) == decoded, text
            stream = Detokenizer(ours)
            assert "".join([*map(stream.push, ids), stream.finish()]) == decoded, text


@pytest.mark.parametrize("adds", [True, False])
def test_the_boolean_of_old_files(adds: bool) -> None:
    """`add_prefix_space` is today's prepend_scheme "always" or "never"."""
    document = json.loads(trained("Metaspace always True", 0).to_str())
    name = "always" if adds else "never"
    today = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": name}
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": adds, "str_rep": "▁"}
    theirs = Tokenizer.from_str(json.dumps(document | {"pre_tokenizer": today}))
    ours = tokenizer_from_json(document | {"pre_tokenizer": old})
    for text in ("the café", " the", "", "▁the"):
        assert ours.encode(text) == theirs.encode(text).ids
    contradictory = {**today, "prepend_scheme": "first", "add_prefix_space": False}
    with pytest.raises(TokenizerError, match="add_prefix_space must be true with"):
        tokenizer_from_json(document | {"pre_tokenizer": contradictory})
