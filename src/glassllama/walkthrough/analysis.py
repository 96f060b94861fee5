"""Analysis of traces: logit lens, attention entropy, norms of the residual stream, divergence.

Shapes: B batch, T tokens, S visible tokens, C model width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glassllama.walkthrough.manual_block import Transformer
from glassllama.walkthrough.tracing import Trace

MOST_LOGITS = 1 << 25  # float32 numbers computed at a time: 128 MiB, and as many for the softmax


def residual_stream(trace: Trace) -> list[Tensor]:
    """The residual stream before the first and after each layer: L + 1 tensors (B, T, C).

    They must have been recorded, with `hooks=["*embeddings", "layers.*"]` for instance.
    """
    n_layers = sum(name.startswith("layers.") and name.count(".") == 1 for name in trace)
    first = "embeddings" if "embeddings" in trace else "tok_embeddings"  # GPT adds positions
    return [trace[name] for name in (first, *(f"layers.{n}" for n in range(n_layers)))]


def residual_norms(trace: Trace) -> Tensor:
    """L2 norm of each token's vector before the first and after each layer: (L + 1, B, T)."""
    return torch.stack([x.float().norm(dim=-1) for x in residual_stream(trace)])


def attention_entropy(weights: Tensor) -> Tensor:
    """Entropy of each row of attention weights, in bits: (B, H, T, S) -> (B, H, T).

    0 if one token has all the weight, log2(n) if n tokens have the same weight.
    """
    nats: Tensor = torch.special.entr(weights.float()).sum(-1)
    return nats / math.log(2)


def kl_divergence(logits: Tensor, other: Tensor) -> float:
    """Kullback-Leibler divergence of softmax(other) from softmax(logits), both (V,), in bits."""
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum().clamp(min=0)) / math.log(2)


@dataclass(frozen=True)
class Predictions:
    """The most probable next tokens, in descending order: `ids` and `probs`, both (…, k)."""

    ids: Tensor
    probs: Tensor


def predictions(logits: Tensor, k: int = 1) -> Predictions:
    """(…, V) -> the k most probable tokens after each position."""
    probs, ids = logits.float().softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return Predictions(ids, probs)


def predictions_by_row(logits: Tensor, k: int = 1) -> Predictions:
    """The same for (T, V), one row at a time: a copy of all logits could be large."""
    rows = [predictions(row, k) for row in logits]
    return Predictions(torch.stack([r.ids for r in rows]), torch.stack([r.probs for r in rows]))


@torch.no_grad()
def logit_lens(
    model: Transformer, trace: Trace, k: int = 5, positions: Sequence[int] | None = None
) -> Predictions:
    """Predictions from the residual stream before the first and after each layer: (L + 1, B, T, k).

    Each goes through the last norm and the output matrix, so the last of them is the model's own
    prediction. With `positions`, only after these of the T tokens. Source: "interpreting GPT: the
    logit lens" (nostalgebraist, 2020).
    """
    device = model.tok_embeddings.weight.device
    columns = slice(None) if positions is None else list(positions)
    xs = torch.stack([x[:, columns] for x in residual_stream(trace)])  # (L + 1, B, T, C)
    # Several layers at a time: a streamed model reads its output matrix once for each group.
    group = max(1, MOST_LOGITS // (xs[0, ..., 0].numel() * model.config.vocab_size))
    parts = [predictions(model.logits(model.norm(x.to(device))), k) for x in torch.split(xs, group)]
    return Predictions(
        torch.cat([part.ids for part in parts]).cpu(),
        torch.cat([part.probs for part in parts]).cpu(),
    )
