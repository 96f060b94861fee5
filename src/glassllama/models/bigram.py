"""The bigram: the least model there is. What comes next depends on the last token alone.

One table, V × V: row i holds the logits of what follows token i. Trained, its softmax becomes how
often each pair of tokens occurs in the text; counting pairs would give the same (a test does).

Shapes: B batch, T new tokens, V vocabulary; the model's width C is V, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from glassllama.base.config import require_sizes
from glassllama.nn.init import initialise
from glassllama.nn.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class BigramConfig:
    """`max_seq_len` is the length of the texts in training. It bounds no generation: what comes
    next depends on the last token alone, so `unbounded` tells the loop to have no limit."""

    vocab_size: int
    max_seq_len: int
    unbounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_sizes(self, "vocab_size", "max_seq_len")


class Bigram(nn.Module):
    """Ids to logits, by looking them up."""

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.vocab_size)

    def initialise(self, generator: torch.Generator) -> None:
        """Begin anew: close to "all tokens are equally likely"."""
        initialise(self, generator, n_layers=0)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """Without layers there is nothing to keep but how long each row is."""
        weight = self.tok_embeddings.weight
        return KVCache(
            n_layers=0, batch=batch, n_kv_heads=1, max_len=max_len, head_dim=1,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, V). Arguments as in models/llama.py; `segments` change nothing."""
        batch, count = ids.shape
        if cache is not None:
            new = [count] * batch if lengths is None else lengths
            cache.reserve(new)
            cache.advance(new)
        return self.tok_embeddings(ids)  # (B, T, V)

    def logits(self, h: Tensor) -> Tensor:
        """(…, V) -> (…, V) float32: the rows of the table are logits already."""
        return h.float()

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
