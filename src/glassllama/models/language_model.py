"""The interface of all language models: bigram, GPT, Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glassllama.nn.kv_cache import KVCache


class LanguageModel(Protocol):
    """Ids to logits; each is a `torch.nn.Module` as well.

    `config` is the frozen dataclass it was made from, with `vocab_size` and `max_seq_len` at least.
    """

    tok_embeddings: nn.Embedding

    @property
    def config(self) -> Any: ...

    def initialize(self, generator: torch.Generator) -> None:
        """Fill with random weights, the same for the same generator."""
        ...

    def new_cache(self, batch: int, max_len: int) -> KVCache: ...

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, C); arguments as in models/llama.py."""
        ...

    def logits(self, h: Tensor) -> Tensor:
        """(…, C) -> (…, V) float32; separate from `hidden`, so that a loss can be chunked."""
        ...

    def __call__(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, V): logits(hidden(…))."""
        ...
