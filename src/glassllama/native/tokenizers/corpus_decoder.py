"""Decoder for many ids: copies the bytes of every token in one compiled loop."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glassllama.native.jit.compile import Int, raw_entry
from glassllama.native.jit.memory import PADDING, eight_bytes, put_eight_bytes
from glassllama.tokenizers.vocabulary import Vocabulary

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint32]
Longs = NDArray[np.int64]

NO_TOKEN = -1  # the size of an id without a token


class CorpusDecoder:
    """Ids → bytes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = vocabulary.tokens
        text = b"".join([*(token or b"" for token in tokens), bytes(PADDING)])
        self._text = np.frombuffer(text, np.uint8)
        sizes = [NO_TOKEN if token is None else len(token) for token in tokens]
        self._sizes = np.array(sizes, np.int64)
        self._begins = np.cumsum(np.maximum(self._sizes, 0)) - np.maximum(self._sizes, 0)

    def __call__(self, ids: Sequence[int]) -> bytes | None:
        """The bytes of ids; None if one of them is not in the vocabulary."""
        try:
            is_array = isinstance(ids, np.ndarray) and ids.dtype == np.uint32
            numbers = np.asarray(ids) if is_array else np.frombuffer(array("I", ids), np.uint32)
        except OverflowError:  # negative, or 2^32 or more
            return None
        size = total_size(numbers, self._sizes)
        if size == NO_TOKEN:
            return None
        out = np.empty(size + PADDING, np.uint8)
        copy_tokens(numbers, self._text, self._begins, self._sizes, out)
        return out[:size].tobytes()


@raw_entry
def total_size(ids: Ids, sizes: Longs) -> Int:
    """The number of bytes of all ids, or NO_TOKEN."""
    total = 0
    for id in ids:
        if id >= len(sizes) or sizes[id] == NO_TOKEN:
            return NO_TOKEN
        total += sizes[id]
    return total


@raw_entry
def copy_tokens(ids: Ids, text: Bytes, begins: Longs, sizes: Longs, out: Bytes) -> None:
    """Copy eight bytes at a time; the next token overwrites the excess."""
    at = 0
    for id in ids:
        begin, size = begins[id], sizes[id]
        for k in range(0, size, 8):
            put_eight_bytes(out, at + k, eight_bytes(text, begin + k))
        at += size
