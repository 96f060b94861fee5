"""Vocabulary of a byte-level BPE tokenizer, and what the tokenizers of all kinds share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.special_tokens import AddedToken, AddedTokens

BYTES = tuple(bytes([value]) for value in range(256))
NEVER = 2**31 - 1  # the rank of a pair that does not merge

PairRow = tuple[int, int, int, int]  # left id, right id, rank, id of the merged token


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The contents of a file of a byte-level BPE tokenizer.

    `tokens`: the bytes of each id; None: an id without a token. Special tokens are their text.
    `ids`: bytes → id of the tokens that merging can produce; no special token is among them.
    `merges`: pair → rank. None: the rank of a pair is the id of the merged token, as in tiktoken.
    `ignore_merges`: a pretoken that is a token is not merged, but taken as it is.
    `added_tokens`: found by their text before anything else; the special ones only on request.
    `text_chunks`: splits a long text before anything else.
    `num_unknown_merges`: merges that name or make something that is not a token. A merged part that
    is not a token in the end is split into its bytes.
    """

    tokens: tuple[bytes | None, ...]
    ids: Mapping[bytes, int] = field(repr=False)
    merges: Mapping[tuple[bytes, bytes], int] | None = field(repr=False)
    split: Split
    ignore_merges: bool
    added_tokens: tuple[AddedToken, ...] = field(repr=False)
    text_chunks: Callable[[str], Iterable[str]] | None = None
    num_unknown_merges: int = 0

    def added(self, *, is_special: bool) -> dict[str, int]:
        """Text → id of the added tokens, either the special ones or the others."""
        return {t.text: t.id for t in self.added_tokens if t.is_special == is_special}

    def token_splitter(self) -> AddedTokens:
        """Splits texts at the added tokens."""
        normalizes = self.split.normalize_nfc and any(t.normalized for t in self.added_tokens)
        return AddedTokens(self.added_tokens, partial(normalize, "NFC") if normalizes else None)

    def rank(self, left: bytes, right: bytes) -> int:
        """The rank of a pair, or NEVER."""
        if self.merges is None:
            return self.ids.get(left + right, NEVER)
        return self.merges.get((left, right), NEVER)

    def pair_rows(self) -> Iterator[PairRow]:
        """Every pair that merges: of the list of merges, or all ways to split a token in two."""
        ids = self.ids
        if self.merges is not None:
            for (left, right), rank in self.merges.items():
                yield ids[left], ids[right], rank, ids[left + right]
            return
        for token, id in ids.items():
            for cut in range(1, len(token)):
                first, second = ids.get(token[:cut]), ids.get(token[cut:])
                if first is not None and second is not None:
                    yield first, second, id, id


class TokenizerBase:
    """What tokenizers of all kinds share: the bytes of each id.

    A model may have more rows of embeddings (`model_rows`; 0: no model) than its tokenizer has
    tokens: nanoGPT has 50,304 rows for the 50,257 tokens of GPT-2. `gaps` are ids below
    `vocab_size` without a token.
    """

    model_rows = 0

    def __init__(
        self, tokens: Sequence[bytes | None], *, bos: int | None, stop_ids: Iterable[int]
    ) -> None:
        self._tokens = tokens
        self.bos = bos
        self.stop_ids = frozenset(stop_ids)
        self.gaps: Sequence[int] = [id for id, token in enumerate(tokens) if token is None]
        self.notes: list[str] = []  # unusual contents of the files
        for id in (*self.stop_ids, *([] if bos is None else [bos])):
            self.token_bytes(id)  # must exist

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        raise NotImplementedError

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text without special tokens, (T,)."""
        return np.array(self.encode(text), dtype=np.uint32)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one id; of a special token its text. No bytes for a row of the model only.

        TokenizerError: the vocabulary and the model do not have the id.
        """
        token = self._tokens[id] if 0 <= id < len(self._tokens) else None
        if token is not None:
            return token
        if 0 <= id < self.model_rows:
            return b""
        last = max(len(self._tokens), self.model_rows) - 1
        raise TokenizerError(f"id {id}: not in the vocabulary, which has 0 … {last}")


def prompt_ids(tokenizer: Tokenizer, text: str, specials: bool) -> list[int]:
    """The ids of a prompt with the begin-of-text token once, even if the text starts with it."""
    ids = tokenizer.encode(text, bos=True, specials=specials)
    doubled = specials and ids[:2] == [tokenizer.bos] * 2
    return ids[1:] if doubled else ids


def surrogate_error(text: str) -> TokenizerError:
    """The error for a text that contains a lone surrogate."""
    at = next(at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return TokenizerError(
        f"text: character {at} is U+{ord(text[at]):04X}, half of a UTF-16 pair and no character; "
        "read the text as UTF-8"
    )
