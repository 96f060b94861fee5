"""Bigram model: the next token depends on the last token only.

One table, V × V: row i holds the logits of the token after token i. After training its softmax is
the relative frequency of each pair of tokens in the text (a test compares it with counts).

Shapes: B batch, T new tokens, V vocabulary; the model's width C is V, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from glassllama.base.config import require_sizes
from glassllama.models.language_model import LanguageModel
from glassllama.nn.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class BigramConfig:
    """The configuration of a bigram.

    `max_seq_len` is the length of a row in training. Generation has no limit (`unbounded`), because
    the next token depends on the last one only.
    """

    vocab_size: int
    max_seq_len: int
    architecture: ClassVar[str] = "bigram"
    unbounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_sizes(self, "vocab_size", "max_seq_len")


class Bigram(LanguageModel):
    """Ids to logits by lookup."""

    config: BigramConfig

    def __init__(self, config: BigramConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.vocab_size)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """A cache without layers: it holds the lengths of the rows only."""
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
        """(B, T) ids -> (B, T, V); see LanguageModel.hidden. `segments` have no effect."""
        batch, count = ids.shape
        if cache is not None:
            new = [count] * batch if lengths is None else lengths
            cache.reserve(new)
            cache.advance(new)
        return self.tok_embeddings(ids)  # (B, T, V)

    def logits(self, h: Tensor) -> Tensor:
        """(…, V) -> (…, V) float32: hidden states are logits already."""
        return self.last_logits(h.float())  # (…, V)
