"""The simplest tokenizer: every character is a token. For small models.

    "hello" → characters e h l o → ids 1 0 2 2 3

The ids are those of the characters of the training text in the order of their code points, then
begin, end, pad and unknown. A character that was not in the training text becomes unknown, which
decodes to U+FFFD (�).

In `tokenizer.json` it is a "WordLevel" model of single characters, which Hugging Face's tokenizers
reads as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.patterns import N_CODE_POINTS
from glassllama.tokenizers.vocabulary import TokenizerBase, pattern_of, split_stage, tokenizer_json

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|unknown|>")
REPLACEMENT = "\ufffd"
EVERY_CHARACTER = r"[\s\S]"
MODEL = "WordLevel"


class CharTokenizer(TokenizerBase):
    """Text ↔ ids, one per character; a `base.interfaces.Tokenizer`.

    The empty text has no ids. NUL and BOM are ordinary characters. A lone surrogate is unknown.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        """`characters`: a text, or any collection of characters; repetitions have no effect."""
        self.characters = tuple(sorted(set(characters)))
        if bad := [char for char in self.characters if len(char) != 1 or is_surrogate(char)]:
            raise TokenizerError(f"characters: {quoted(bad[0])} is not one character")
        n = len(self.characters)
        self.specials = MappingProxyType({text: n + at for at, text in enumerate(SPECIAL_TOKENS)})
        begin, self.end, self.pad, self.unknown = self.specials.values()
        texts = (*self.characters, *SPECIAL_TOKENS[:-1], REPLACEMENT)
        # Models that were trained without `begin` set `bos` to None.
        super().__init__([text.encode() for text in texts], bos=begin, stop_ids=[self.end])
        self._ids = {char: id for id, char in enumerate(self.characters)}
        self._pattern = pattern_of(SPECIAL_TOKENS)

    def _id_lists(self, text: str, specials: bool, at_start: bool) -> Iterator[list[int]]:
        for n, part in enumerate(self._pattern.split(text) if specials else [text]):
            if n % 2:  # text, token, text, …
                yield [self.specials[part]]
            else:
                yield [self._ids.get(char, self.unknown) for char in part]

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text without special tokens, (T,)."""
        table = np.full(N_CODE_POINTS, self.unknown, np.uint32)
        table[[ord(char) for char in self.characters]] = np.arange(len(self.characters))
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids: NDArray[np.uint32] = table[points]
        return ids


def is_surrogate(char: str) -> bool:
    return "\ud800" <= char <= "\udfff"


def char_document(tokenizer: CharTokenizer) -> dict[str, Any]:
    """The tokenizer as the object of a tokenizer.json."""
    words = (*tokenizer.characters, *SPECIAL_TOKENS)
    return tokenizer_json(
        tokenizer.specials,
        normalizer=None,
        pre_tokenizer=split_stage(EVERY_CHARACTER),
        post_processor=None,
        decoder={"type": "Fuse"},
        model={
            "type": MODEL,
            "vocab": {word: id for id, word in enumerate(words)},
            "unk_token": SPECIAL_TOKENS[-1],
        },
    )


def chars_from_document(document: Mapping[str, Any]) -> CharTokenizer | None:
    """The tokenizer of such an object; None: its model is another.

    TokenizerError: it has anything that we do not write.
    """
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != MODEL:
        return None
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise TokenizerError("model.vocab must be an object of characters and ids")
    tokenizer = CharTokenizer(word for word in vocab if word not in SPECIAL_TOKENS)
    written = char_document(tokenizer)
    keys = {*document, *written}
    if different := sorted(key for key in keys if document.get(key) != written.get(key)):
        raise TokenizerError(
            f"{', '.join(different)}: not as in a vocabulary of characters, the one kind of "
            f"{MODEL} that is supported"
        )
    return tokenizer
