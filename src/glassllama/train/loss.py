"""How wrong the model was: cross-entropy of the next tokens, in nats, a piece of logits at a time.

With a vocabulary of 128,000 the logits of a batch are by far its largest tensor. Here they exist
for `chunk` positions at once, in the forward and in the backward pass: each piece keeps its hidden
states only and computes its logits again when gradients are wanted.

Shapes: B batch, T tokens, C model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glassllama.models.language_model import LanguageModel

IGNORED = -100  # a target that is not to be predicted; PyTorch's own convention


def summed_loss(model: LanguageModel, h: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """(B, T, C) hidden states, (B, T) targets -> the sum of -log p over all targets, float32."""
    h, targets = h.flatten(0, 1), targets.flatten()  # (B·T, C), (B·T,)
    if len(h) <= chunk:
        return _piece(model, h, targets)
    pieces = [
        checkpoint(_piece, model, *piece, use_reentrant=False)
        for piece in zip(h.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(pieces).sum()


def _piece(model: LanguageModel, h: Tensor, targets: Tensor) -> Tensor:
    logits = model.logits(h).float()  # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
