"""Questions to a trace: what each layer would already say, where heads look, how long vectors are.

Shapes: B batch, T tokens, S visible tokens, C model width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glassllama.models.llama import Llama
from glassllama.walkthrough.trace import Trace

LOGITS_AT_ONCE = 1 << 25  # numbers: 128 MiB, and softmax makes as many again


def residual_places(n_layers: int) -> list[str]:
    """The residual stream from the embeddings on, after every layer: L + 1 places."""
    return ["tok_embeddings", *(f"layers.{n}" for n in range(n_layers))]


def residuals(trace: Trace) -> list[Tensor]:
    """L + 1 tensors (B, T, C). They must have been watched."""
    n_layers = sum(place.startswith("layers.") and place.count(".") == 1 for place in trace)
    return [trace[place] for place in residual_places(n_layers)]


def residual_norms(trace: Trace) -> Tensor:
    """Length of every token's vector after the embeddings and after each layer: (L + 1, B, T)."""
    return torch.stack([x.float().norm(dim=-1) for x in residuals(trace)])


def attention_entropy(weights: Tensor) -> Tensor:
    """How widely each head looks, in bits: (B, H, T, S) -> (B, H, T).

    0 where all weight is on one token, log2(n) where it is spread evenly over n.
    """
    nats: Tensor = torch.special.entr(weights.float()).sum(-1)
    return nats / math.log(2)


@dataclass(frozen=True)
class Predictions:
    """The likeliest next tokens, likeliest first: `ids` and `probs`, both (…, k)."""

    ids: Tensor
    probs: Tensor


def predictions(logits: Tensor, k: int = 1) -> Predictions:
    """(…, V) -> the k likeliest tokens after each position."""
    probs, ids = logits.float().softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return Predictions(ids, probs)


@torch.no_grad()
def logit_lens(
    model: Llama, trace: Trace, k: int = 5, positions: Sequence[int] | None = None
) -> Predictions:
    """What the model would say if it stopped after each layer: (L + 1, B, T, k).

    Each residual goes through the last norm and the output matrix; the last of them is the
    model's own answer. With `positions`, only after these of the T tokens. Source: "interpreting
    GPT: the logit lens" (nostalgebraist, 2020).
    """
    device = model.tok_embeddings.weight.device
    wanted = slice(None) if positions is None else list(positions)
    xs = torch.stack([x[:, wanted] for x in residuals(trace)])  # (L + 1, B, T, C)
    # As many layers at a time as memory bears: a streamed model reads its output matrix for each.
    at_once = max(1, LOGITS_AT_ONCE // (xs[0, ..., 0].numel() * model.config.vocab_size))
    parts = [
        predictions(model.logits(model.norm(x.to(device))), k) for x in torch.split(xs, at_once)
    ]
    return Predictions(
        torch.cat([part.ids for part in parts]).cpu(),
        torch.cat([part.probs for part in parts]).cpu(),
    )
