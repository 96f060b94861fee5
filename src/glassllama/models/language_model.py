"""Base class of all language models: the methods that do not depend on the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.nn.hooks import HookPoint
from glassllama.nn.init import initialize
from glassllama.nn.kv_cache import KVCache


class LanguageModel(nn.Module):
    """Ids to logits. A model holds weights only; past tokens are in the cache, an argument.

    A subclass defines `tok_embeddings`, `output` if the embeddings are not tied, and `hidden`.
    `config` is its frozen dataclass, with `vocab_size` and `max_seq_len` at least.
    """

    takes_embeddings: ClassVar[bool] = False  # whether `hidden` has `embeddings` and `prefix`
    tok_embeddings: nn.Embedding
    output: nn.Module

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.last_logits = HookPoint()

    def initialize(self, generator: torch.Generator) -> None:
        """Fill with small random weights (nn/init.py), the same for the same generator."""
        initialize(self, generator, getattr(self.config, "n_layers", 0))

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache on the weights' device, in their dtype."""
        c, weight = self.config, self.tok_embeddings.weight
        return KVCache(
            n_layers=c.n_layers,
            batch=batch,
            n_kv_heads=c.n_kv_heads,
            max_len=max_len,
            head_dim=c.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C), the input of the first layer."""
        embeddings: Tensor = self.tok_embeddings(ids)
        return embeddings  # (B, T, C)

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, C), the hidden states after the last norm.

        With a cache the ids follow the tokens in it, and are added to it. `lengths` are the numbers
        of real ids if rows are padded on the right; outputs of padding have no meaning. `segments`
        (B, T) numbers the documents of packed rows (without a cache): a token sees its own document
        only. Raises GenerationError if the cache is full.
        """
        raise NotImplementedError

    def logits(self, h: Tensor) -> Tensor:
        """(…, C) -> (…, V) float32, the logits of the next token.

        Separate from `hidden`, so that a loss can be computed in chunks.
        """
        return self.last_logits(self.cap_logits(self.multiply_output(h).float()))  # (…, V)

    def multiply_output(self, h: Tensor) -> Tensor:
        """h times the output matrix, which may be the embeddings. (…, C) -> (…, V)."""
        if self.config.tie_embeddings:
            return F.linear(h, self.tok_embeddings.weight)
        product: Tensor = self.output(h)
        return product

    def cap_logits(self, logits: Tensor) -> Tensor:
        """What a family does with the products; here nothing. (…, V) float32 -> same."""
        return logits

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; arguments as in `hidden`."""
        return self.logits(self.hidden(ids, cache, lengths=lengths, segments=segments))
