"""GPT-2: embeddings with learned positions, blocks of attention and feed-forward, logits.

Source: GPT-2 (Radford et al., 2019). It differs from models/llama.py in four parts: learned
positions instead of RoPE, LayerNorm instead of RMSNorm, as many KV heads as query heads, and a
feed-forward network without a gate.

Shapes: B batch, T new tokens, S visible tokens, C model width, H heads, D head width, F ffn width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.base.config import require_choice, require_positive, require_sizes
from glassllama.base.errors import ConfigError, GenerationError
from glassllama.models.language_model import LanguageModel
from glassllama.nn.attention import attend, join_heads, positions_and_mask, split_heads
from glassllama.nn.hooks import HookPoint
from glassllama.nn.kv_cache import KVCache

Activation = Literal["gelu", "gelu_tanh", "relu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The configuration of a GPT; sizes in elements.

    GPT-2's own activation is "gelu_tanh", an approximation of "gelu". Without `bias` neither the
    matrices nor the norms have one.
    """

    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int  # the number of learned positions
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-5
    bias: bool = True
    tie_embeddings: bool = True
    architecture: ClassVar[str] = "gpt2"
    unbounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_sizes(
            self, "dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "max_seq_len"
        )  # fmt: skip
        if self.dim % self.n_heads:
            raise ConfigError(
                f"dim must be a multiple of n_heads, got {self.dim} and {self.n_heads}"
            )
        require_choice(self, "activation", ACTIVATIONS)
        require_positive(self, "norm_eps")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads


@dataclass(frozen=True)
class ForwardContext:
    """What all blocks share in one forward pass."""

    mask: Tensor | None  # (B or 1, 1, T, S), True if visible; None: causal from the first token on
    cache: KVCache | None
    new: Sequence[int]  # real new tokens per row; the rest of T is padding on the right


class Attention(nn.Module):
    """Project to heads, attend, project back."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.layer = config.n_heads, layer
        self.wq = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.wk = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.wv = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.wo = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.q, self.k, self.v = HookPoint(), HookPoint(), HookPoint()
        self.scores, self.weights, self.heads = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        q = self.q(split_heads(self.wq(x), self.n_heads))  # (B, H, T, D)
        k = self.k(split_heads(self.wk(x), self.n_heads))  # (B, H, T, D)
        v = self.v(split_heads(self.wv(x), self.n_heads))  # (B, H, T, D)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v, context.new)  # (B, H, S, D)
        heads = self.heads(self.attend(q, k, v, context.mask))  # (B, H, T, D)
        return self.wo(join_heads(heads))  # (B, T, C)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask, self.scores, self.weights)  # (B, H, T, D)


class FeedForward(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)
        self.activated = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        features = self.activated(self.activation(self.up(x)))  # (B, T, F)
        return self.down(features)  # (B, T, C)


class Block(nn.Module):
    """Pre-norm transformer block: x = x + attention(norm(x)); x = x + feed_forward(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)
        self.attention = Attention(config, layer)
        self.after_attention = HookPoint()
        self.ffn_norm = nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = self.after_attention(x + self.attention(self.attention_norm(x), context))  # (B, T, C)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, T, C)


class GPT(LanguageModel):
    """Embeddings of tokens and positions, blocks, norm, output matrix."""

    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.pos_embeddings = nn.Embedding(config.max_seq_len, config.dim)
        self.embeddings = HookPoint()  # the sum of both
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache, for at most as many tokens as there are positions."""
        return super().new_cache(batch, min(max_len, self.config.max_seq_len))

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        *,
        lengths: Sequence[int] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, C); see LanguageModel.hidden.

        Raises GenerationError if a row would be longer than the number of learned positions.
        """
        new = [ids.shape[1]] * ids.shape[0] if lengths is None else lengths
        positions, mask = positions_and_mask(ids, cache, new, segments)  # (B, T), (B or 1, 1, T, S)
        past = [0] * len(new) if cache is None else cache.lengths
        longest = max(seen + n for seen, n in zip(past, new, strict=True))
        if longest > self.config.max_seq_len:
            raise GenerationError(
                f"{longest} tokens, but only {self.config.max_seq_len} positions were learned"
            )
        # Padding may be after the last position; its outputs have no meaning.
        positions = positions.clamp(max=self.config.max_seq_len - 1)

        x = self.embeddings(self.tok_embeddings(ids) + self.pos_embeddings(positions))  # (B, T, C)
        context = ForwardContext(mask, cache, new)
        for layer in self.layers:
            x = layer(x, context)  # (B, T, C)
        if cache is not None:
            cache.advance(new)
        return self.norm(x)  # (B, T, C)
