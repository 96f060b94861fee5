"""The simplest tokenizer: a character is a token. For small models and first lessons.

    "hello" → characters e h l o → ids 1 0 2 2 3

The characters of the training text come first, in the order of their code points; then begin, end,
pad and unknown. A character that was not in the training text becomes *unknown*, and unknown
decodes to U+FFFD (�): the text lives on, and the reader sees what the model could not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.bpe import alternatives
from glassllama.tokenizers.rows import Rows

CONTROLS = ("<|begin|>", "<|end|>", "<|pad|>", "<|unknown|>")
REPLACEMENT = "\ufffd"
N_CODE_POINTS = 0x110000


class CharTokenizer(Rows):
    """Text ↔ ids, one per character; a `base.interfaces.Tokenizer`.

    Odd input: the empty text has no ids; NUL and BOM are characters like any other; a lone
    surrogate, as it is in no training text, is unknown.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        """`characters`: a text, or any collection of characters; each counts once."""
        self.characters = tuple(sorted(set(characters)))
        if bad := [char for char in self.characters if len(char) != 1 or is_surrogate(char)]:
            raise TokenizerError(f"characters: {quoted(bad[0])} is not one character")
        n = len(self.characters)
        self.specials: Mapping[str, int] = MappingProxyType(
            {text: n + at for at, text in enumerate(CONTROLS)}
        )
        begin, self.end, self.pad, self.unknown = self.specials.values()
        self.bos: int | None = begin  # None where the model has seen no beginnings
        self.stop_ids = frozenset({self.end})
        self._texts = (*self.characters, *CONTROLS[:-1], REPLACEMENT)
        self._ids = {char: id for id, char in enumerate(self.characters)}
        self._pattern = alternatives(CONTROLS)

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text; with `specials`, control tokens written in it become their ids."""
        ids = [self.bos] if bos and self.bos is not None else []
        if not specials or self._pattern is None:
            return ids + [self._ids.get(char, self.unknown) for char in text]
        for at, piece in enumerate(self._pattern.split(text)):
            ids += [self.specials[piece]] if at % 2 else self.encode(piece)
        return ids

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text without control tokens, (T,)."""
        table = np.full(N_CODE_POINTS, self.unknown, np.uint32)
        table[[ord(char) for char in self.characters]] = np.arange(len(self.characters))
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids: NDArray[np.uint32] = table[points]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([self._text(id) for id in ids])

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 of one id; a control token's is its text, unknown's that of U+FFFD."""
        return self._text(id).encode()

    def _text(self, id: int) -> str:
        if not 0 <= id < len(self._texts):
            return self.bytes_without_token(id, len(self._texts)).decode()
        return self._texts[id]


def is_surrogate(char: str) -> bool:
    return "\ud800" <= char <= "\udfff"
