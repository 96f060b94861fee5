"""A character tokenizer as `tokenizer.json`: a form that Hugging Face's tokenizers reads, too.

There it is a "WordLevel" model whose words are single characters: each is split off, looked up, and
joined again without anything between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.chars import CONTROLS, CharTokenizer

EVERY_CHARACTER = r"[\s\S]"
MODEL = "WordLevel"


def char_document(tokenizer: CharTokenizer) -> dict[str, Any]:
    """The object to write as tokenizer.json."""
    words = [*tokenizer.characters, *CONTROLS]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_control(text, id) for text, id in tokenizer.specials.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": EVERY_CHARACTER},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": MODEL,
            "vocab": {word: id for id, word in enumerate(words)},
            "unk_token": CONTROLS[-1],
        },
    }


def _control(text: str, id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": True}


def is_char_document(document: Mapping[str, Any]) -> bool:
    model = document.get("model")
    return isinstance(model, dict) and model.get("type") == MODEL


def chars_from_document(document: Mapping[str, Any]) -> CharTokenizer:
    """The tokenizer of such an object. TokenizerError: it holds anything else besides."""
    vocab = document["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise TokenizerError("model.vocab must be an object of characters and ids")
    tokenizer = CharTokenizer(word for word in vocab if word not in CONTROLS)
    written = char_document(tokenizer)
    if strange := sorted(
        key for key in {*document, *written} if document.get(key) != written.get(key)
    ):
        raise TokenizerError(
            f"{', '.join(strange)}: not as in a vocabulary of characters, the one kind of "
            f"{MODEL} that is supported"
        )
    return tokenizer
