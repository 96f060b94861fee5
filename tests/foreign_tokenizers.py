"""The tokenizers of Meta and Hugging Face, behind our interface.

Chat formats and the detokenizer are tested with these, so that an error in our tokenizers cannot
hide an error in them.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokenizers
from glassllama.base.errors import TokenizerError


class ForeignTokenizer:
    added: Mapping[str, int] = types.MappingProxyType({})

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        return [
            id for part in parts for id in ([part] if isinstance(part, int) else self.encode(part))
        ]

    def without_added(self, texts: Iterable[str]) -> ForeignTokenizer:
        return self


class MetaTokenizer(ForeignTokenizer):
    """Llama 3's tokenizer in Meta's implementation, which uses tiktoken."""

    def __init__(self, ranks: Path) -> None:
        self.meta = meta_modules()["tokenizer"].Tokenizer(ranks)
        self.vocab_size: int = self.meta.n_words
        self.bos: int | None = self.meta.bos_id
        self.stop_ids = frozenset(self.meta.stop_tokens)
        self.specials: Mapping[str, int] = self.meta.special_tokens

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        allowed = set(self.specials) if specials else set()
        return self.meta.encode(text, bos=bos, eos=False, allowed_special=allowed)

    def encode_array(self, text: str) -> Any:
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.meta.decode(list(ids))

    def token_bytes(self, id: int) -> bytes:
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"id: {id}")
        return self.meta.model.decode_single_token_bytes(id)


class HuggingFaceTokenizer(ForeignTokenizer):
    """A byte-level `tokenizers.Tokenizer` that parses special tokens only on request."""

    def __init__(self, inner: tokenizers.Tokenizer, bos: int | None = None) -> None:
        self.inner = tokenizers.Tokenizer.from_str(inner.to_str())
        self.vocab_size = inner.get_vocab_size()
        self.bos, self.stop_ids = bos, frozenset[int]()
        added = inner.get_added_tokens_decoder().items()
        self.specials = {token.content: id for id, token in added}

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        assert not bos
        self.inner.encode_special_tokens = not specials
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> Any:
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        raise NotImplementedError("chat formats never ask for bytes")


@lru_cache
def meta_modules() -> dict[str, Any]:
    """Meta's reference modules: `tokenizer`, `chat_format`, `datatypes`.

    chat_format imports a library for images; an empty module replaces it during the import.
    """
    library, image = types.ModuleType("PIL"), types.ModuleType("PIL.Image")
    library.Image, image.Image = image, object
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("PIL") is None:
            patch.setitem(sys.modules, "PIL", library)
            patch.setitem(sys.modules, "PIL.Image", image)
        from llama_models import datatypes
        from llama_models.llama3 import chat_format, tokenizer
    return {"chat_format": chat_format, "tokenizer": tokenizer, "datatypes": datatypes}
